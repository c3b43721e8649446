"""When each worker computes what: micro-batches assigned to unequal GPUs, and a pipeline's schedule simulated.

In: seconds of a forward pass, a backward pass and a transfer. Out: the micro-batches of each worker, or the seconds of
a step.
"""

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

Schedule = Literal["interleaved_1f1b", "gpipe"]
Operation = tuple[str, int]  # ("F" or "B", micro-batch)


def balance(speeds: Sequence[float], micro_batches: int) -> tuple[int, ...]:
    """The number of micro-batches of a step for each worker such that the last one finishes as early as possible.

    Each micro-batch goes to the worker that would finish it first, and of equal ones to the first. That is optimal
    because all are alike. Workers of one speed are served together, and all of them at once up to the time at which
    they have nearly all, so that many workers of a few kinds, or many micro-batches, take no longer.

    `speeds`: micro-batches a second, above 0.
    """
    workers = Counter(speeds)
    early = max(micro_batches - len(speeds), 0) / sum(speeds)  # by then no more than micro_batches are finished
    served = {speed: max(int(early * speed) - 1, 0) for speed in workers}  # micro-batches of each worker of a speed
    left = micro_batches - sum(served[speed] * number for speed, number in workers.items())
    waiting = [((served[speed] + 1) / speed, speed) for speed in workers]  # when each would finish one more
    heapq.heapify(waiting)

    first = _pop_first(waiting)
    while (wanted := sum(workers[speed] for speed in first)) <= left:
        left -= wanted
        for speed in first:
            served[speed] += 1
            heapq.heappush(waiting, ((served[speed] + 1) / speed, speed))
        first = _pop_first(waiting)

    shares = [served[speed] for speed in speeds]
    for worker in islice((worker for worker, speed in enumerate(speeds) if speed in first), left):
        shares[worker] += 1
    return tuple(shares)


def _pop_first(waiting: list[tuple[float, float]]) -> list[float]:
    """Take the speeds with the earliest time off a heap of (time, speed)."""
    time, speed = heapq.heappop(waiting)
    speeds = [speed]
    while waiting and waiting[0][0] == time:
        speeds.append(heapq.heappop(waiting)[1])
    return speeds


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
    number, missing = len(stages), [math.inf] * micro_batches
    orders = [operations(s, number, micro_batches, schedule) for s in range(number)]
    done = [0] * number  # operations finished by each stage
    free = [0.0] * number  # when each stage can start its next operation
    # when the input of an operation arrives at a stage; one list more on each side takes what leaves the pipeline
    inputs = {kind: [missing.copy() for _ in range(number + 2)] for kind in ("F", "B")}
    inputs["F"][1] = [0.0] * micro_batches
    inputs["B"][number] = [0.0] * micro_batches
    sent = {kind: [0.0] * number for kind in ("F", "B")}  # until when a stage's link is occupied

    moving = True
    while moving:
        moving = False
        for s, times in enumerate(stages):
            order, k, now = orders[s], done[s], free[s]
            while k < len(order):
                kind, i = order[k]
                arrival = inputs[kind][s + 1][i]
                if arrival == math.inf:
                    break

                spent, cost, target = (
                    (times.forward, times.send, s + 2) if kind == "F" else (times.backward, times.back, s)
                )
                now = (arrival if arrival > now else now) + spent
                link = sent[kind]
                link[s] = inputs[kind][target][i] = (link[s] if link[s] > now else now) + cost
                k += 1
            moving = moving or k > done[s]
            done[s], free[s] = k, now

    if any(k < len(order) for k, order in zip(done, orders, strict=True)):
        raise RuntimeError(f"the schedule {schedule} of {number} stages and {micro_batches} micro-batches does not end")
    return max(free)


def least_seconds(stages: Sequence[StageTimes], micro_batches: int) -> float:
    """Seconds that no schedule falls below.

    A stage waits for the first micro-batch, computes all, and the last one travels back. A link carries all of them.
    """
    least, way = 0.0, 0.0  # way: from the first stage to this one and back, for one micro-batch
    for number, stage in enumerate(stages):
        least = max(least, way + micro_batches * (stage.forward + stage.backward))
        if number + 1 < len(stages):
            back = stages[number + 1].back
            way += stage.forward + stage.send + back + stage.backward
            least = max(least, way + (micro_batches - 1) * max(stage.send, back))
    return least


def _warmup(stage: int, stages: int) -> int:
    return 2 * (stages - 1 - stage)
