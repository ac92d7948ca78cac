"""What is compared: a contender can draw the inputs of a call, run it, and say whether its result is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["ours", "peer", "yardstick"]


class WrongResultError(ValueError):
    """A contender's result is not the oracle's: its time would be that of another computation."""


class UnavailableError(RuntimeError):
    """A contender cannot run here; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """One way to compute what a row is about."""

    role: Role
    """A yardstick computes something else (less, mostly) and is no peer in goals."""
    settings: str
    """What a reader needs to know of how it was run."""
    draw: Callable[[], Any]
    """Fresh inputs of one call, outside of the timed part."""
    run: Callable[[Any], Any]
    """The timed part."""
    check: Callable[[], None]
    """Raises WrongResultError unless `run` gives what the float64 oracle gives."""
    graphable: bool = True
    """False where a CUDA graph cannot hold it, as it waits for the device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Floor:
    """What any implementation must move and compute in one call."""

    read_bytes: int
    """Each distinct byte once."""
    write_bytes: int
    flops: int = 0
    request_bytes: int = 0
    """Bytes asked for, rows that repeat counted every time; 0: as many as are read."""

    @property
    def bytes(self) -> int:
        return self.read_bytes + self.write_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A row ready to be measured. Contenders are made one by one, so that one that cannot be made loses only itself."""

    contenders: Mapping[str, Callable[[], Contender]]
    floor: Floor | None = None
    shape: Mapping[str, int | str] = field(default_factory=dict)
    resident_bytes: int = 0
    """Of a row that measures memory: what must be held, whatever the implementation."""
    measures: Literal["time", "memory"] = "time"
