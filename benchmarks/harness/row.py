"""One line of the results: what is measured, at which shape, for which goals."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Suite = Literal["cpu", "gpu"]
SUITES: tuple[Suite, ...] = ("cpu", "gpu")

Quantity = Literal["speedup", "slowdown", "bandwidth_share", "over_floor_us", "floor_ratio", "peak_ratio", "launches"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """One figure that a row should reach."""

    text: str
    """As stated in the goals, for readers."""
    quantity: Quantity
    """speedup: the best peer's median over ours. slowdown: ours over that of `against`. bandwidth_share: bytes over
    (time x measured bandwidth). floor_ratio: ours over the floor. over_floor_us: ours less `factor` times the floor.
    peak_ratio: peak memory over `Case.resident_bytes`. launches: kernels of one call."""
    bound: float
    """At least this for speedup and bandwidth_share, at most this for the others."""
    against: str = ""
    """The contenders whose name begins so; all peers by default."""
    of: str = ""
    """The contender of ours whose name begins so; the first by default."""
    factor: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A subject at one shape; what its subject needs to build it."""

    subject: str
    size: str
    tokens: int
    dtype: str
    indices: Literal["uniform", "zipf", ""] = ""
    variant: str = ""
    goals: tuple[Goal, ...] = ()
    limit_s: float = 90.0
    """A row that runs longer, waiting for the device apart, is stopped and recorded so."""
    device_gb: float = 20.0
    """On a GPU, what its process holds at most; rows are prepared beside each other as far as memory goes."""
    quick: bool = False
    """Part of `--quick`."""
    graph: bool = False
    """On a GPU, timed inside a CUDA graph: a decode shape."""
    wall: bool = False
    """On a GPU, wall time of calls that end with a result on the host, instead of the device's."""
    priority: int = 5
    """On a GPU, where time is short: lower ones first."""

    @property
    def name(self) -> str:
        parts = (self.subject, self.variant, self.size, f"T={self.tokens}", self.indices, self.dtype)
        return "/".join(part for part in parts if part)


def selected(rows: Iterable[Row], patterns: Sequence[str]) -> list[Row]:
    """Rows whose name begins with a pattern or matches it as a glob; all of them without patterns.

    Raises:
        ValueError: a pattern selects nothing.
    """
    rows = list(rows)
    if not patterns:
        return rows
    found = {pattern: [row for row in rows if _matches(row.name, pattern)] for pattern in patterns}
    for pattern, matching in found.items():
        if not matching:
            raise ValueError(
                f"rows must select a row each, got {pattern!r}; there are {', '.join(r.name for r in rows)}"
            )
    wanted = {row.name for matching in found.values() for row in matching}
    return [row for row in rows if row.name in wanted]


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(pattern.rstrip("/") + "/") or fnmatch.fnmatchcase(name, pattern)
