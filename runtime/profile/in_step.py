"""Ranks that measure one model together decide together whatever depends on a clock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ultramem.runtime.distributed.ranks import ALONE, Ranks

_ranks: ContextVar[Ranks] = ContextVar("ranks", default=ALONE)


@contextmanager
def in_step(ranks: Ranks) -> Iterator[None]:
    """In here the main rank's clock counts, on all ranks that do the same."""
    token = _ranks.set(ranks)
    try:
        yield
    finally:
        _ranks.reset(token)


def agreed(number: int) -> int:
    """The main rank's number, of at least 0; this one's, where it is alone."""
    return _ranks.get().as_main_has([number])[0]
