"""The peak of memory over a few calls."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.harness.contender import Contender, UnavailableError

CALLS = 2


def peak_bytes(contender: Contender, device: torch.device) -> int:
    """Bytes held at the worst moment of `CALLS` calls, after one that is not counted.

    On a CPU the resident memory of the process less that of one which has only imported; so what the compiler keeps
    counts too.
    """
    contender.run(contender.draw())
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        _call(contender)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    _reset_peak_resident()
    _call(contender)
    return _resident("VmHWM") - IMPORTED_BYTES


def _call(contender: Contender) -> None:
    for _ in range(CALLS):
        contender.run(contender.draw())


def _reset_peak_resident() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise UnavailableError(f"the peak of resident memory cannot be reset on this system: {error}") from error


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status; 0 where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


IMPORTED_BYTES = _resident("VmRSS")  # of a process with torch and nothing built
