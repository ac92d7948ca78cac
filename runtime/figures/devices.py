"""Devices whose roofs are published, and the one that this process runs on, measured."""

from __future__ import annotations

from dataclasses import dataclass

THIS = "this"


@dataclass(frozen=True, kw_only=True, slots=True)
class Roofs:
    """What a device can move and compute at most, and where that is from."""

    name: str
    label: str
    bytes_per_second: float
    flops_per_second: float
    memory_bytes: float | None
    """Of the device; None where nobody says."""
    element_bytes: int
    """Of weights, activations and caches: 2 on GPUs, 4 where the rate of matrix products is that of float32."""
    source: str


DEVICES = {
    roofs.name: roofs
    for roofs in (
        Roofs(
            name="a100",
            label="A100-SXM-80GB",
            bytes_per_second=2.039e12,
            flops_per_second=312e12,
            memory_bytes=80e9,
            element_bytes=2,
            source="NVIDIA A100 datasheet, SXM 80 GB: 2,039 GB/s, 312 TFLOPS bfloat16, dense; the paper's own device",
        ),
        Roofs(
            name="h100",
            label="H100 SXM",
            bytes_per_second=3.35e12,
            flops_per_second=989.5e12,
            memory_bytes=80e9,
            element_bytes=2,
            source="NVIDIA H100 datasheet, SXM: 3.35 TB/s, bfloat16 1,979 TFLOPS with sparsity, of which half dense",
        ),
        Roofs(
            name="h200",
            label="H200 SXM",
            bytes_per_second=4.8e12,
            flops_per_second=989.5e12,
            memory_bytes=141e9,
            element_bytes=2,
            source="NVIDIA H200 datasheet, SXM: 4.8 TB/s, bfloat16 1,979 TFLOPS with sparsity, of which half dense",
        ),
    )
}
DEVICE_NAMES = (*DEVICES, THIS)
