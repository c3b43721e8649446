"""What a group of workers is started for. Imports nothing: the launcher and Ray Train's controller load it."""

from enum import StrEnum


class WorkerTask(StrEnum):
    """The task of a group of workers; it travels to them by its value, as plain text."""

    TRAIN = "train"  # the run, or what is left of it
    EVALUATE = "evaluate"  # decode the validation shards with one checkpoint
    MEASURE = "measure"  # time the first steps; write nothing
    PROBE = "probe"  # report the hardware; touch no data
