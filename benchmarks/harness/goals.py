"""What a measured row reaches of its goals, and how far it is from its floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness.contender import Floor
from benchmarks.harness.row import Goal

AT_LEAST = ("speedup", "bandwidth_share")

Record = Mapping[str, Any]
"""Of a contender or a row, as in the results file."""


def floor_record(floor: Floor, *, bytes_per_second: float, flops_per_second: float) -> dict[str, Any]:
    """The time that no implementation on this machine can beat, and which of its roofs it hangs on."""
    by_bytes_us = 1e6 * floor.bytes / bytes_per_second
    by_flops_us = 1e6 * floor.flops / flops_per_second
    return {
        "bytes": floor.bytes,
        "request_bytes": (floor.request_bytes or floor.read_bytes) + floor.write_bytes,
        "flops": floor.flops,
        "us": round(max(by_bytes_us, by_flops_us), 3),
        "bound": "bandwidth" if by_bytes_us >= by_flops_us else "compute",
    }


def evaluate(goal: Goal, contenders: Sequence[Record], floor: Record | None, probe: Record) -> dict[str, Any]:
    """The goal with its value, and whether that reaches it; None where what it needs was not measured."""
    value = _value(goal, contenders, floor, probe)
    reached = None
    if value is not None:
        reached = value >= goal.bound if goal.quantity in AT_LEAST else value <= goal.bound
        value = round(value, 3)
    return {
        "goal": goal.text,
        "quantity": goal.quantity,
        "bound": goal.bound,
        "against": goal.against,
        "of": goal.of,
        "value": value,
        "reached": reached,
    }


def _value(goal: Goal, contenders: Sequence[Record], floor: Record | None, probe: Record) -> float | None:
    ours = next((c for c in contenders if c["role"] == "ours" and c["name"].startswith(goal.of)), None)
    if ours is None or ours["status"] != "measured":
        return None
    if goal.quantity in ("peak_ratio", "launches"):
        return ours.get(goal.quantity)
    if goal.quantity in ("speedup", "slowdown"):
        return _against_others(goal, ours, contenders)
    if floor is None:
        return None
    if goal.quantity == "bandwidth_share":
        return floor["request_bytes"] / (1e-6 * ours["median_us"]) / probe["bytes_per_second"]
    if goal.quantity == "floor_ratio":
        return ours["median_us"] / floor["us"]
    return ours["median_us"] - goal.factor * floor["us"]


def _against_others(goal: Goal, ours: Record, contenders: Sequence[Record]) -> float | None:
    """By the quickest of those named, or of all peers. One that failed or was refused is no rival."""
    named = [c for c in contenders if c["name"].startswith(goal.against)] if goal.against else []
    rivals = named if goal.against else [c for c in contenders if c["role"] == "peer"]
    times = [c["median_us"] for c in rivals if c["status"] == "measured" and c is not ours]
    if not times:
        return None
    ratio = ours["median_us"] / min(times)
    return ratio if goal.quantity == "slowdown" else 1 / ratio
