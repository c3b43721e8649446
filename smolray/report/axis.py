"""The axes of a chart: the place of a value as a fraction from 0 to 1, and the round numbers that label the axis.

In: the values that are drawn. Out: an Axis.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

FEWEST_LOG_TICKS, MOST_LOG_TICKS = 3, 9
DIGITS = ((1,), (1, 2, 5), tuple(range(1, 10)))  # leading digits of the ticks of a log axis, the coarsest first


@dataclass(frozen=True)
class Axis:
    """The range and the ticks of an axis. On a `log` axis equal distances are equal factors."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def share(self, value: float) -> float:
        """The place of `value`: 0 at `low`, 1 at `high`."""
        if self.high <= self.low:
            return 0.5
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def linear_axis(values: Sequence[float], limits: tuple[float | None, float | None] = (None, None)) -> Axis:
    """An axis that begins and ends with a tick. `limits` replace the lowest and the highest value."""
    low = min(values) if limits[0] is None else limits[0]
    high = max(values) if limits[1] is None else limits[1]
    ticks = nice_ticks(low, high)
    return Axis(min(low, ticks[0]), max(high, ticks[-1]), tuple(ticks))


def log_axis(values: Sequence[float]) -> Axis:
    """A logarithmic axis. It is linear where a value is not above 0, or where there are fewer than three ticks."""
    if min(values) <= 0:
        return linear_axis(values)

    # a margin, so that the lowest value does not lie on the edge
    margin = (max(values) / min(values)) ** 0.04
    low, high = min(values) / margin, max(values) * margin
    ticks = log_ticks(low, high)
    return Axis(low, high, tuple(ticks), log=True) if len(ticks) >= FEWEST_LOG_TICKS else linear_axis(values)


def tight_axis(values: Sequence[float]) -> Axis:
    """An axis from the lowest to the highest value, with the ticks between them."""
    low, high = min(values), max(values)
    return Axis(low, high, tuple(tick for tick in nice_ticks(low, high) if low <= tick <= high))


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) from at or below `low` to at or above `high`."""
    if high - low <= abs(high) * 1e-9:
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad

    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high`, both above 0; if those are few, also times 2 and 5, or times 2 to 9."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for digits in DIGITS:
        ticks = [tick for power in powers for digit in digits if low <= (tick := float(f"{digit}e{power}")) <= high]
        if len(ticks) >= FEWEST_LOG_TICKS:
            break
    return ticks[:: math.ceil(len(ticks) / MOST_LOG_TICKS) or 1]
