"""When each worker computes what: micro-batches assigned to unequal GPUs, and a pipeline's schedule simulated.

In: seconds of a forward pass, a backward pass and a transfer. Out: the micro-batches of each worker, or the seconds of
a step.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Schedule = Literal["interleaved_1f1b", "gpipe"]
Operation = tuple[str, int]  # ("F" or "B", micro-batch)


def balance(speeds: Sequence[float], micro_batches: int) -> tuple[int, ...]:
    """The number of micro-batches of a step for each worker such that the last one finishes as early as possible.

    Each micro-batch goes to the worker that would finish it first. That is optimal because all are alike.

    `speeds`: micro-batches a second, above 0.
    """
    shares = [0] * len(speeds)
    waiting = [(1 / speed, i) for i, speed in enumerate(speeds)]  # when a worker would finish one more
    heapq.heapify(waiting)
    for _ in range(micro_batches):
        i = waiting[0][1]
        shares[i] += 1
        heapq.heapreplace(waiting, ((shares[i] + 1) / speeds[i], i))
    return tuple(shares)


def in_flight(stage: int, stages: int, micro_batches: int, schedule: Schedule = "interleaved_1f1b") -> int:
    """Micro-batches whose activations a stage keeps at once."""
    return min(micro_batches, _warmup(stage, stages) + 1) if schedule == "interleaved_1f1b" else micro_batches


def accepted_micro_batches(micro_batches: int, stages: int, schedule: Schedule) -> int:
    """The smallest number of micro-batches, at least `micro_batches`, that a schedule of `stages` stages accepts.

    GPipe accepts any. Interleaved 1F1B needs a multiple of its rounds (torch 2.13, ScheduleInterleaved1F1B).
    """
    if schedule == "gpipe":
        return micro_batches

    number = max(micro_batches, 1)
    while number % max(1, number // stages):
        number += 1
    return number


def operations(stage: int, stages: int, micro_batches: int, schedule: Schedule) -> list[Operation]:
    """The forward and backward passes of a stage, in order: warm-up, steady state, cool-down.

    Interleaved 1F1B with one stage on each rank runs twice as many forward passes ahead as plain 1F1B.
    """
    ahead = in_flight(stage, stages, micro_batches, schedule) - (schedule == "interleaved_1f1b")
    ahead = min(ahead, micro_batches)

    warm_up: list[Operation] = [("F", i) for i in range(ahead)]
    steady: list[Operation] = []
    for i in range(ahead, micro_batches):
        steady += [("F", i), ("B", i - ahead)]
    cool_down: list[Operation] = [("B", i) for i in range(micro_batches - ahead, micro_batches)]
    return warm_up + steady + cool_down


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one micro-batch on one stage.

    `send`: its activations to the next stage; `back`: the gradient of its input to the stage before.
    """

    forward: float
    backward: float
    send: float = 0.0
    back: float = 0.0


def simulate(stages: Sequence[StageTimes], micro_batches: int, schedule: Schedule = "interleaved_1f1b") -> float:
    """Seconds from the first forward pass to the last backward pass.

    A stage runs its operations in order, each as soon as its input has arrived. Transfers run at the same time as the
    computing; each direction of a link carries one message at a time.

    Raises:
        RuntimeError: the stages wait for each other.
    """
    number = len(stages)
    orders = [operations(s, number, micro_batches, schedule) for s in range(number)]
    done = [0] * number  # operations finished by each stage
    free = [0.0] * number  # when each stage can start its next operation
    arrived: dict[tuple[int, str, int], float] = {(0, "F", i): 0.0 for i in range(micro_batches)}
    arrived |= {(number - 1, "B", i): 0.0 for i in range(micro_batches)}
    busy: dict[tuple[int, str], float] = {}  # until when a direction of a link is occupied

    remaining = sum(map(len, orders))
    while remaining:
        before = remaining
        for s, times in enumerate(stages):
            while done[s] < len(orders[s]) and (s, *orders[s][done[s]]) in arrived:
                kind, i = orders[s][done[s]]
                start = max(free[s], arrived[s, kind, i])
                free[s] = end = start + (times.forward if kind == "F" else times.backward)
                target, cost = (s + 1, times.send) if kind == "F" else (s - 1, times.back)
                if 0 <= target < number:
                    sent = max(end, busy.get((s, kind), 0.0)) + cost
                    busy[s, kind] = arrived[target, kind, i] = sent
                done[s], remaining = done[s] + 1, remaining - 1

        if remaining == before:
            raise RuntimeError(
                f"the schedule {schedule} of {number} stages and {micro_batches} micro-batches does not end"
            )
    return max(free)


def _warmup(stage: int, stages: int) -> int:
    return 2 * (stages - 1 - stage)
