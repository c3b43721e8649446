"""Who computes what when: micro-batches dealt to unequal cards, and a pipeline's schedule played through as events.

In: seconds of a forward, a backward and a transfer. Out: shares, or the seconds of a step.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Schedule = Literal["interleaved_1f1b", "gpipe"]
Operation = tuple[str, int]  # ("F" or "B", micro-batch)


def balance(speeds: Sequence[float], micro_batches: int) -> tuple[int, ...]:
    """Micro-batches of a step for each worker so that the last one is done soonest.

    `speeds`: micro-batches a second, above 0. Handing each to whoever would be done with it first is optimal, for all
    are alike.
    """
    shares = [0] * len(speeds)
    waiting = [(1 / speed, i) for i, speed in enumerate(speeds)]  # when a worker would be done with one more
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
    """What one stage does, in order.

    Interleaved 1F1B with one stage a rank runs twice as many forwards ahead as plain 1F1B.
    """
    ahead = in_flight(stage, stages, micro_batches, schedule) - (schedule == "interleaved_1f1b")
    ahead = min(ahead, micro_batches)
    order: list[Operation] = [("F", i) for i in range(ahead)]
    for i in range(ahead, micro_batches):
        order += [("F", i), ("B", i - ahead)]
    return order + [("B", i) for i in range(micro_batches - ahead, micro_batches)]


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one micro-batch on one stage.

    `send`, `back`: its activations to the next stage, its input's gradient to the one before.
    """

    forward: float
    backward: float
    send: float = 0.0
    back: float = 0.0


def simulate(stages: Sequence[StageTimes], micro_batches: int, schedule: Schedule = "interleaved_1f1b") -> float:
    """Seconds from the first forward to the last backward.

    A stage does its operations in order, each when its input has arrived. Transfers run beside the computing; each
    direction of a link carries one message at a time.
    """
    number = len(stages)
    orders = [operations(s, number, micro_batches, schedule) for s in range(number)]
    done = [0] * number  # operations finished by each stage
    free = [0.0] * number
    arrived: dict[tuple[int, str, int], float] = {(0, "F", i): 0.0 for i in range(micro_batches)}
    arrived |= {(number - 1, "B", i): 0.0 for i in range(micro_batches)}
    busy: dict[tuple[int, str], float] = {}
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
                f"the schedule {schedule} of {number} stages and {micro_batches} micro-batches does not come to an end"
            )
    return max(free)


def _warmup(stage: int, stages: int) -> int:
    return 2 * (stages - 1 - stage)
