"""Means over seeds, and how much of a difference may be chance."""

from __future__ import annotations

import math
import statistics
from typing import Any, Literal, NamedTuple

Verdict = Literal["one seed", "within the noise", "a hint", "a difference"]

NOISE = 2.0
"""Standard errors below which a difference is called noise."""
CHANCE = 0.05
"""Of a larger difference where there is none, by Student's t: above it, what passes two standard errors is a hint."""


class Spread(NamedTuple):
    """A figure over seeds."""

    by_seed: dict[str, float]
    mean: float
    std: float | None
    """Of the sample (n - 1); None for one seed."""


class Difference(NamedTuple):
    """Of two models on the same text in the same order, seed by seed."""

    by_seed: dict[str, float]
    mean: float
    std: float | None
    """Of the paired differences."""
    standard_error: float | None
    """std / sqrt(seeds)."""
    p: float | None
    """Chance of a mean at least this far from zero where there is no difference: Student's t, two-sided."""
    verdict: Verdict


def spread(by_seed: dict[str, float]) -> Spread:
    values = list(by_seed.values())
    return Spread(by_seed, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def difference(ours: dict[str, float], other: dict[str, float]) -> Difference | None:
    """`ours - other` over the seeds that both have; None if there is no such seed."""
    by_seed = {seed: value - other[seed] for seed, value in ours.items() if seed in other}
    if not by_seed:
        return None
    _, mean, std = spread(by_seed)
    if std is None:
        return Difference(by_seed, mean, None, None, None, "one seed")
    error = std / math.sqrt(len(by_seed))
    t = abs(mean) / error if error else math.inf if mean else 0.0
    p = round(chance_beyond(t, len(by_seed) - 1), 6)
    verdict: Verdict = "within the noise" if t < NOISE else "a hint" if p > CHANCE else "a difference"
    return Difference(by_seed, mean, std, error, p, verdict)


def chance_beyond(t: float, degrees_of_freedom: int) -> float:
    """`P(|T| > t)` of Student's t: the share of `cos(angle)^(df-1)` beyond `atan(t / sqrt(df))`, by Simpson's rule."""

    def area(to: float) -> float:
        intervals = 2000
        width = to / intervals
        heights = [math.cos(index * width) ** (degrees_of_freedom - 1) for index in range(intervals + 1)]
        return width / 3 * (heights[0] + 4 * sum(heights[1::2]) + 2 * sum(heights[2:-1:2]) + heights[-1])

    return max(0.0, 1 - area(math.atan(t / math.sqrt(degrees_of_freedom))) / area(math.pi / 2))


def as_json(figure: Spread | Difference | None) -> dict[str, Any] | None:
    return None if figure is None else figure._asdict()
