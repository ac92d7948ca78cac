"""SIGINT and SIGTERM end a run between two steps, with its work saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):  # noqa: N818  # not an error: the user asked for it
    """Training ended early on a signal; the work up to `step` is in a checkpoint."""

    def __init__(self, step: int, signum: int) -> None:
        super().__init__(f"stopped at step {step}; continue with --resume")
        self.step = step
        self.signum = signum


class StopFlag:
    """Set by a signal. Before the first step there is nothing to save, so the signal raises at once."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.may_raise = True

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.may_raise or self.signum is not None:  # a second signal does not wait for the step to end
            raise KeyboardInterrupt
        self.signum = signum


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """A flag that SIGINT and SIGTERM set in here."""
    flag = StopFlag()
    try:
        before = {each: signal.signal(each, flag) for each in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's business
        before = {}
    try:
        yield flag
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
