"""How many kernels one call launches on a GPU."""

from __future__ import annotations

import torch

from benchmarks.harness.contender import Contender


def count_launches(contender: Contender) -> int:
    """Kernels, copies and fills of one call, as the profiler sees them on the device."""
    from torch.profiler import ProfilerActivity, profile

    inputs = contender.draw()
    contender.run(inputs)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        contender.run(inputs)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())
