"""Whether the stages of a profile add up to the forward without instruments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SUM_TOLERANCE = 0.1
"""Accepted between the sum of the stages, and what is outside of them, and the plain wall time."""


def adds_up(times: Mapping[str, Any], tolerance: float = SUM_TOLERANCE) -> bool:
    """Whether the sum of one of a document's "stages" is within `tolerance` of the plain time.

    It is not where the sum over all forwards is off by more, and that of every turn of plain and instrumented forwards
    too: one disturbed turn proves nothing.
    """
    return any(abs(ratio - 1) <= tolerance for ratio in (times["sum_ratio"], *times["turn_sum_ratios"]))


def check_sums(document: Mapping[str, Any], tolerance: float = SUM_TOLERANCE) -> list[str]:
    """A line for each engine, batch and phase of a profile (a document of `to_json`) that does not add up."""
    return [
        f"{times['engine']}, {times['phase']}, batch {times['batch']}: stages add up to {times['sum_ratio']:.2f} of "
        f"the forward without instruments ({min(times['turn_sum_ratios']):.2f} to "
        f"{max(times['turn_sum_ratios']):.2f} in the turns), accepted {1 - tolerance:.2f} to {1 + tolerance:.2f}"
        for times in document["stages"]
        if times["rows"] and not adds_up(times, tolerance)
    ]
