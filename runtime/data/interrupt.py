"""Ctrl-C at a moment that suits the work."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def delayed_interrupt() -> Iterator[Callable[[], bool]]:
    """Within it a first Ctrl-C only makes the yielded function return True; a second one raises at once."""
    caught = False

    def catch(signum: int, frame: FrameType | None) -> None:
        nonlocal caught
        if caught:
            raise KeyboardInterrupt
        caught = True

    try:
        before = signal.signal(signal.SIGINT, catch)
    except ValueError:  # not the main thread: signals are somebody else's business
        yield lambda: False
        return
    try:
        yield lambda: caught
    finally:
        signal.signal(signal.SIGINT, before)
