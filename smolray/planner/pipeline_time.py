"""Seconds of an optimizer step of a pipeline: its schedule simulated.

In: a Workload (the mean micro-batch), the layers, the GPU and the link of every stage. Out: StepTime.
"""

from collections.abc import Sequence

import numpy as np

from smolray.planner import assumptions as a
from smolray.planner.gpus import GPU
from smolray.planner.inventory import Interconnect
from smolray.planner.memory import Workload
from smolray.planner.schedule import Schedule, StageTimes, least_seconds, simulate
from smolray.planner.time import StepTime, largest_of, layer_table, ring_seconds, slowest, spread


def pipeline_seconds(
    work: Workload,
    crossing: np.ndarray,
    partition: Sequence[int],
    gpus: Sequence[GPU],
    links: Sequence[Interconnect],
    micro_batches: int,
    data: float,
    schedule: Schedule | None,
    replicas: int = 1,
    hop: Interconnect | None = None,
) -> StepTime:
    """Seconds of one step of a pipeline.

    Args:
        work: the mean micro-batch.
        crossing: (layers + 1,) bytes across the boundary before each layer, one way.
        partition: layers in each stage.
        gpus: the slowest GPU of each stage.
        links: from each stage to the next.
        micro_batches: of the step, in each replica.
        data: seconds to decode and collate them.
        schedule: engine.schedule; None: what no schedule falls below, without a simulation.
        replicas: pipelines that share the data.
        hop: the slowest hop between the replicas of a stage.
    """
    ends = np.cumsum(partition).tolist()
    spans = [(end - size, end) for size, end in zip(partition, ends, strict=True)]
    stages = _stage_times(work, crossing, spans, gpus, links)
    trained = [sum(work.trained[start:end]) for start, end in spans]

    compute = max(micro_batches * (s.forward + s.backward) for s in stages)
    seconds = _schedule_seconds(stages, micro_batches, schedule) if schedule else least_seconds(stages, micro_batches)
    # stages wait for the one that has the larger micro-batch
    seconds += compute * largest_of(len(partition)) * max(spread(work, gpu) for gpu in gpus)

    talk = seconds - compute + a.PIPELINE_STEP_SECONDS  # waiting for other stages and for links
    if replicas > 1 and hop is not None:
        talk += max(ring_seconds(n * a.PIPELINE_GRADIENT, replicas, hop) for n in trained)
    shape = work.shape
    embeddings_apart = partition[-1] < len(shape.layers) - shape.merge
    if shape.tied and "text" in work.training.full and embeddings_apart:
        table = shape.text.vocab * shape.text.hidden * a.PIPELINE_GRADIENT
        talk += ring_seconds(table, 2, slowest(links))

    update = max(
        n * a.OPTIMIZER_TRAFFIC / (gpu.bandwidth * a.BANDWIDTH_SHARE) for n, gpu in zip(trained, gpus, strict=True)
    )
    return StepTime(compute, talk, update, data)


def _stage_times(
    work: Workload,
    crossing: np.ndarray,
    spans: Sequence[tuple[int, int]],
    gpus: Sequence[GPU],
    links: Sequence[Interconnect],
) -> list[StageTimes]:
    """Seconds of a micro-batch on each stage; `spans`: the (first, end) of its layers."""
    tables, stages = {gpu: layer_table(work, gpu) for gpu in set(gpus)}, []
    for number, (start, end) in enumerate(spans):
        each = tables[gpus[number]][start:end]
        forward, backward = sum(f for f, _ in each), sum(b for _, b in each)
        send = _send_seconds(links[number], crossing[end]) if number + 1 < len(spans) else 0.0
        returns = number > 0 and work.gradients[start].input
        back = _send_seconds(links[number - 1], crossing[start]) if returns else 0.0
        stages.append(StageTimes(forward, backward, send, back))
    return stages


def _schedule_seconds(stages: Sequence[StageTimes], micro_batches: int, schedule: Schedule) -> float:
    """Seconds of a step by simulation.

    After the pipeline is full, every further micro-batch adds the same time: a long step is extrapolated from a short
    one.
    """
    few = min(micro_batches, max(4 * len(stages), 8))
    seconds = simulate(stages, few, schedule)
    if micro_batches > few:
        seconds += (micro_batches - few) * (seconds - simulate(stages, few - len(stages), schedule)) / len(stages)
    return seconds


def _send_seconds(link: Interconnect, size: float) -> float:
    return float(size) / (link.bandwidth * a.LINK_SHARE) + link.latency
