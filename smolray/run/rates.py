"""Rates of a run, from its newest step events.

In: step events of the log. Out: amounts per second, and the seconds that are left.
"""

from collections.abc import Sequence

from smolray.run.events import Event

RATE_STEPS = 20  # rates are those of this many newest steps
ETA_STEPS = 100  # the time left follows from this many newest steps: one slow step must not change it much


def rate(steps: Sequence[Event], name: str) -> float | None:
    """The field `name` per second of training, over the newest steps; None where no step has it."""
    known = [(e[name], e["seconds"]) for e in steps[-RATE_STEPS:] if e.get(name) is not None and e.get("seconds")]
    return sum(k[0] for k in known) / sum(k[1] for k in known) if known else None


def seconds_left(steps: Sequence[Event], total_steps: int | None) -> float | None:
    """The remaining steps at the pace of the last hundred, by the wall clock: evaluation and saving count.

    Steps of an earlier attempt do not count, nor does the time between attempts. None where nothing is known.
    """
    if not steps or not total_steps:
        return None

    last = steps[-1]
    window = [e for e in steps[-ETA_STEPS - 1 :] if e.get("attempt") == last.get("attempt")]
    first = window[0]
    done = last["step"] - first["step"]
    pace = (last["time"] - first["time"]) / done if done else last.get("seconds")
    return None if pace is None else round((total_steps - last["step"]) * pace, 1)
