"""How many kernels one call launches on a GPU."""

from __future__ import annotations

import torch

from benchmarks.harness.contender import Contender
from benchmarks.harness.turns import Turns


def count_launches(contender: Contender, turns: Turns) -> int:
    """Kernels, copies and fills of one call, as the profiler sees them on the device. The call before is not counted.

    The profiler's own set-up, some seconds, is no part of a turn.
    """
    from torch.profiler import ProfilerActivity, profile

    with turns.shared():
        contender.run(contender.draw())
        inputs = contender.draw()  # what has run backward once cannot run backward again
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler, turns.shared():
        contender.run(inputs)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())
