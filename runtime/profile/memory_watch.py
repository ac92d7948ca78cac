"""Highest memory in use, and page faults of this process, over a piece of work."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path
from types import TracebackType

import torch

HIGH_WATER = "VmHWM, reset by /proc/self/clear_refs"
SAMPLED = "resident memory, sampled every millisecond"
ON_DEVICE = "memory of the GPU in PyTorch's allocator"
UNKNOWN = "not measured: this system has no /proc"

_PROC = Path("/proc/self")
_RESET_HIGH_WATER = "5"  # proc(5): sets VmHWM to the present VmRSS
_SAMPLE_SECONDS = 0.001


class MemoryWatch:
    """Context manager; what it found stands in its fields after the block.

    Linux keeps the highest resident memory of a process, and sets it back on request. Where it refuses (some
    containers do), a thread samples instead, and may miss a peak between two samples. Of a GPU it is what PyTorch
    allocates there. Page faults are those of all threads of the process.
    """

    def __init__(self, device: torch.device | None = None, *, use_high_water: bool = True) -> None:
        self.memory_bytes: int | None = None
        """Highest memory in use during the block, less that before it."""
        self.minor_faults = 0
        self.major_faults = 0
        self._device = device
        if device is not None and device.type != "cpu":
            self.method = ON_DEVICE
        elif not (_PROC / "statm").exists():
            self.method = UNKNOWN
        else:
            self.method = HIGH_WATER if use_high_water and _reset_high_water() else SAMPLED

    def __enter__(self) -> MemoryWatch:
        if self.method == ON_DEVICE:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before_bytes = torch.cuda.memory_allocated(self._device)
        if self.method == HIGH_WATER:
            _reset_high_water()
        if self.method in (HIGH_WATER, SAMPLED):
            self._before_bytes = self._highest_bytes = resident_bytes()
        if self.method == SAMPLED:
            self._done = threading.Event()
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        self._faults = resource.getrusage(resource.RUSAGE_SELF)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        faults = resource.getrusage(resource.RUSAGE_SELF)
        self.minor_faults = faults.ru_minflt - self._faults.ru_minflt
        self.major_faults = faults.ru_majflt - self._faults.ru_majflt
        if self.method == ON_DEVICE:
            self._highest_bytes = torch.cuda.max_memory_allocated(self._device)
        elif self.method == HIGH_WATER:
            self._highest_bytes = _high_water_bytes()
        elif self.method == SAMPLED:
            self._done.set()
            self._sampler.join()
            self._highest_bytes = max(self._highest_bytes, resident_bytes())
        if self.method != UNKNOWN:
            self.memory_bytes = max(0, self._highest_bytes - self._before_bytes)

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self._highest_bytes = max(self._highest_bytes, resident_bytes())


def resident_bytes() -> int:
    """Resident memory of this process now, by /proc."""
    pages = int((_PROC / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _reset_high_water() -> bool:
    """Whether the system did."""
    try:
        (_PROC / "clear_refs").write_text(_RESET_HIGH_WATER)
    except OSError:
        return False
    # One that takes the write and keeps its peak would report memory of long ago.
    return _high_water_bytes() <= resident_bytes() + 2**20


def _high_water_bytes() -> int:
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
