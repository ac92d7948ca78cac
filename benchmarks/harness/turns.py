"""Turns on a device: processes that prepare share it, one that times has it alone.

Two files are locked by flock, which the kernel lets go of when a process ends, however it ends. `device` is held shared
or alone. Whoever wants it passes through `gate`, and waits for the device inside of it; so nobody overtakes one that
waits to be alone, and preparations that follow each other cannot keep it waiting.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO


class Turns:
    """The turns of one process. Without a folder it is the only one, and never waits."""

    def __init__(
        self, folder: Path | None = None, *, waits: Path | None = None, synchronize: Callable[[], Any] = lambda: None
    ) -> None:
        """
        Args:
            folder: of the files that are locked, the same for all processes of a run.
            waits: file that gets the beginning and the end of every wait, for `waited_seconds`.
            synchronize: waits for what was launched on the device; called before each turn ends.
        """
        self._folder, self._waits, self._synchronize = folder, waits, synchronize
        self._device: TextIO | None = None  # while it is locked
        self._shares = self._let_go = False
        self.waited_s = 0.0

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Beside others that prepare."""
        self._lock(fcntl.LOCK_SH)
        self._shares = True
        try:
            yield
        finally:
            self._shares = self._let_go = False
            self._unlock()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Nothing else runs on the device meanwhile."""
        self._lock(fcntl.LOCK_EX)
        try:
            yield
        finally:
            self._unlock()

    def let_others_while_compiling(self) -> None:
        """From now on what torch.compile does is no part of a shared turn: it keeps the host busy, not the device."""
        import torch
        from torch._dynamo.callback import CallbackArgs, CallbackTrigger, on_compile_end, on_compile_start

        def starts(args: CallbackArgs) -> None:
            compiles = args.callback_trigger in (CallbackTrigger.DYNAMO, CallbackTrigger.LAZY_BACKWARD)
            captures = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # cannot wait then
            if self._shares and compiles and not captures:
                self._unlock()
                self._let_go = True

        def ends(args: CallbackArgs) -> None:
            if self._let_go:
                self._lock(fcntl.LOCK_SH)
                self._let_go = False

        on_compile_start(starts)
        on_compile_end(ends)

    def _lock(self, kind: int) -> None:
        if self._folder is None:
            return
        began = time.monotonic()
        self._note(began)
        with (self._folder / "gate").open("w") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)
            self._device = (self._folder / "device").open("w")
            fcntl.flock(self._device, kind)
            fcntl.flock(gate, fcntl.LOCK_UN)
        ended = time.monotonic()
        self._note(ended)
        self.waited_s += ended - began

    def _unlock(self) -> None:
        try:
            self._synchronize()
        finally:
            if self._device is not None:
                fcntl.flock(self._device, fcntl.LOCK_UN)  # closing does not, where a child has inherited the file
                self._device.close()
                self._device = None

    def _note(self, now: float) -> None:
        if self._waits is not None:
            with self._waits.open("a") as waits:
                waits.write(f"{now}\n")


def waited_seconds(waits: Path, now: float) -> float:
    """How long a process has waited by `now`, from the file that it writes: beginnings and ends in turn."""
    times = [float(line) for line in waits.read_text().splitlines()] if waits.exists() else []
    times += [now] if len(times) % 2 else []
    return sum(end - begin for begin, end in zip(times[::2], times[1::2], strict=True))
