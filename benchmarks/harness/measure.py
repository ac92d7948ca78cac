"""Interleaved timing: bursts of each contender in turn (A B A B), medians with quartiles."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.harness.contender import Contender

BURST_US = 10_000.0  # calls of a burst together take about this long
MAX_BURST = 8
SLOW_CALL_US = 1e5  # what such a call finds in the caches makes no difference to it
VERY_SLOW_CALL_US = 1e6  # a few of them are enough: they average over what disturbs shorter ones
VERY_SLOW_ROUNDS = 3


class Clock(Protocol):
    """Times calls on one device."""

    def how(self, contender: Contender) -> str:
        """How a contender is timed, in words."""

    def burst(self, contender: Contender, calls: int) -> list[float]:
        """Microseconds of each of `calls` calls one after the other, with inputs of their own drawn before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How long to measure one contender."""

    seconds: float = 0.6
    min_rounds: int = 5
    """0: the warm-up is all there is."""
    max_samples: int = 400
    warm_up: int = 2

    def is_spent(self, samples_us: Sequence[float], rounds: int) -> bool:
        few = samples_us and min(samples_us) > VERY_SLOW_CALL_US
        if rounds < (min(self.min_rounds, VERY_SLOW_ROUNDS) if few else self.min_rounds):
            return False
        return sum(samples_us) >= 1e6 * self.seconds or len(samples_us) >= self.max_samples


FULL = Budget()
QUICK = Budget(seconds=0.1, min_rounds=3, max_samples=40)
REHEARSAL = Budget(seconds=0.0, min_rounds=0, max_samples=1, warm_up=1)


def measure(contenders: Mapping[str, Contender], clock: Clock, budget: Budget) -> dict[str, list[float]]:
    """Microseconds per call of every contender; all of them take part until each has spent its budget.

    The first call of a burst, which finds code and threads as another contender left them, is not counted, unless it
    takes so long that this is nothing.
    """
    warm_us = {name: _warm_up(contender, clock, budget) for name, contender in contenders.items()}
    if budget.min_rounds == 0:
        return warm_us
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    rounds = 0
    while not all(budget.is_spent(each, rounds) for each in samples.values()):
        for name, contender in contenders.items():
            # One that is quick goes on beside one that is slow, but not beyond all measure.
            if not (budget.is_spent(samples[name], rounds) and _has_enough(samples[name], budget)):
                call_us = min(warm_us[name])
                lead = 1 if call_us < SLOW_CALL_US else 0
                calls = max(1, min(MAX_BURST, math.floor(BURST_US / max(call_us, 1.0))))
                samples[name] += clock.burst(contender, calls + lead)[lead:]
        rounds += 1
    return samples


def _warm_up(contender: Contender, clock: Clock, budget: Budget) -> list[float]:
    times = clock.burst(contender, 1)
    while len(times) < budget.warm_up and times[0] < VERY_SLOW_CALL_US:
        times += clock.burst(contender, 1)
    return times


def _has_enough(samples_us: Sequence[float], budget: Budget) -> bool:
    return len(samples_us) >= budget.max_samples or min(samples_us) > VERY_SLOW_CALL_US


def summary(samples_us: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles in microseconds."""
    low, median, high = (
        statistics.quantiles(samples_us, n=4, method="inclusive") if len(samples_us) > 1 else samples_us * 3
    )
    return {
        "median_us": round(median, 3),
        "quartiles_us": [round(low, 3), round(high, 3)],
        "samples": len(samples_us),
    }
