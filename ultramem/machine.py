"""What this machine can do, measured: memory bandwidth and float32 GEMM rate; and what it is."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

BANDWIDTH_BYTES = 256 * 2**20  # eight times a 32 MiB last-level cache
GEMM_SIZE = 1024  # 2.1 GFLOP, large enough for a CPU to run at the full rate
GPU_BANDWIDTH_BYTES, GPU_GEMM_SIZE = 2**31, 8192  # on a GPU those would take less time than a launch
GEMM_SECONDS = 0.01  # a product that takes so long runs at the full rate, on any device
REPEATS = 7
PACKAGES = ("ultramem", "torch", "onnxruntime", "onnx", "triton", "numpy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The device, its measured rates, and the versions that ran on it."""

    device: str
    cores: int
    """Logical CPUs that this process may use."""
    threads: int
    """Threads of one PyTorch operator."""
    last_level_cache_bytes: int | None
    """None where the system does not say."""
    read_bytes_per_second: float
    """Summing an array well beyond the caches."""
    copy_bytes_per_second: float
    """Copying it, bytes read and written both counted."""
    gemm_flops_per_second: float
    """Square float32 matrix product."""
    system: str
    python: str
    versions: dict[str, str]
    cpu_flags: str
    """Vector instruction set that PyTorch uses."""

    @property
    def bytes_per_second(self) -> float:
        """The roof that reports use: the better of reading and copying."""
        return max(self.read_bytes_per_second, self.copy_bytes_per_second)


def roof_sizes(device: torch.device) -> tuple[int, int]:
    """Bytes of an array, and the side of a matrix product, that show what `device` can do."""
    return (BANDWIDTH_BYTES, GEMM_SIZE) if device.type == "cpu" else (GPU_BANDWIDTH_BYTES, GPU_GEMM_SIZE)


def measure_machine(
    device: torch.device | str = "cpu", *, array_bytes: int | None = None, gemm_size: int | None = None
) -> Machine:
    """Measure `device` (about a second) and describe it; medians of several runs.

    Args:
        device: what is measured.
        array_bytes: of the array that is read and copied; None: as `roof_sizes` has it.
        gemm_size: side of the matrices that are multiplied; None: likewise.
    """
    device = torch.device(device)
    own_bytes, own_size = roof_sizes(device)
    array_bytes, gemm_size = array_bytes or own_bytes, gemm_size or own_size
    source = torch.ones(array_bytes // 4, device=device)
    target = torch.empty_like(source)
    read_s = _median_seconds(source.sum, device)
    copy_s = _median_seconds(lambda: target.copy_(source), device)
    left = torch.rand(gemm_size, gemm_size, device=device)
    right = torch.rand(gemm_size, gemm_size, device=device)
    gemm_s = _median_seconds(lambda: left @ right, device)
    size_bytes = source.numel() * source.element_size()
    return Machine(
        device=device_name(device),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        last_level_cache_bytes=_last_level_cache_bytes() if device.type == "cpu" else None,
        read_bytes_per_second=size_bytes / read_s,
        copy_bytes_per_second=2 * size_bytes / copy_s,
        gemm_flops_per_second=2 * gemm_size**3 / gemm_s,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions=package_versions(),
        cpu_flags=torch.backends.cpu.get_cpu_capability(),
    )


@functools.cache
def gemm_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large square matrix product in `dtype`; measured once a process (0.3 s on two cores)."""
    generator = torch.Generator(device).manual_seed(0)  # the global one belongs to whoever trains here
    size = 256
    while True:
        left, right = (torch.rand(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
        seconds = _median_seconds(functools.partial(torch.mm, left, right), device)
        if seconds > GEMM_SECONDS:
            return 2 * size**3 / seconds
        size *= 2


def device_name(device: torch.device) -> str:
    """The processor's own name for itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def package_versions() -> dict[str, str]:
    """Versions of the packages that an engine may run on; those not installed are left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def synchronize(device: torch.device) -> None:
    """Wait for what was launched; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    call()
    seconds = []
    for _ in range(REPEATS):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _last_level_cache_bytes() -> int | None:
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[text[-1]])
    return max(sizes, default=None)
