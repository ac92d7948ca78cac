"""What the profiler costs the host of a GPU, and how much of that a forward is longer for it.

The profiler's records take the host's time. Where the device waits for the host, the forward is longer by it; where the
host is ahead of the device, or waits for it, it is not. So the forward is run through again, from launch to launch,
with each record's cost taken off: how much earlier would an activity have begun, and how much earlier would the host
have had it?
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ultramem.runtime.profile.device_calls import GRAPH_LAUNCH, DeviceCall, is_api, profiled_device_calls
from ultramem.runtime.profile.measure import time_us
from ultramem.runtime.profile.profiled_calls import KERNEL_NAME
from ultramem.runtime.profile.stages import faster_half

_KERNELS = 50
"""Of a forward that measures a cost: about as many as a small model has."""
_EVENTS = 3
"""Of the profiler for each of them, but for its launch: a generated kernel's, and two of a view."""
_REPEATS = 10
"""Of each kind: whoever asks for the costs asks anew every few forwards, as a machine changes its speed."""


class HostCost(NamedTuple):
    """What the profiler takes of the host's time."""

    event_us: float
    """For an operator, or anything else that is a span."""
    launch_us: float
    """For a call that launches, the activity's record included."""
    graph_node_us: float = 0.0
    """For each activity of a graph that is replayed."""


class Earlier(NamedTuple):
    """How much earlier, without the profiler's cost,"""

    starts_us: tuple[float, ...]
    """each activity of the forward would have begun, and"""
    end_us: float
    """the forward would have ended: at most the time that the device had nothing to do."""


def earlier_without(cost: HostCost, call: DeviceCall) -> Earlier:
    """Run through a forward without what the profiler cost its host.

    An activity that was launched while the device was busy began when the device was ready, and does so still. One that
    the device waited for begins earlier by what the host has saved until then, but not before the device is ready. What
    a call of the CUDA API waited for ends the wait as much earlier as it ends itself.
    """
    launched: dict[int, list[int]] = defaultdict(list)
    for index, activity in enumerate(call.activities):
        launched[activity.launch].append(index)
    # From a launch to where its activity begins, on a device that has nothing else to do.
    latency_us = min(
        (call.activities[each[0]].start_us - call.spans[place].start_us for place, each in launched.items()),
        default=0.0,
    )
    starts_us = [0.0] * len(call.activities)
    host_us = device_us = 0.0  # what either has saved
    device_end_us = 0.0
    for place, span in enumerate(call.spans):
        own = launched.get(place, [])
        host_us += _cost_us(cost, span.name, len(own))
        if own and span.start_us + latency_us >= device_end_us:
            device_us = min(host_us, call.activities[own[0]].start_us - device_end_us + device_us)
        for index in own:
            starts_us[index] = device_us
            device_end_us = max(device_end_us, call.activities[index].end_us)
        if _waits(span.name) and device_end_us <= span.start_us + span.time_us:
            now_us = max(span.start_us, device_end_us)
            host_us = now_us - max(span.start_us - host_us, device_end_us - device_us)
    return Earlier(tuple(starts_us), min(host_us, call.wall_us))


def _cost_us(cost: HostCost, name: str, activities: int) -> float:
    if not activities:
        return cost.event_us
    return cost.launch_us + (cost.graph_node_us * activities if name == GRAPH_LAUNCH else 0.0)


def _waits(name: str) -> bool:
    """Whether a call of the CUDA API may return only when the device is done: copies from and to pageable memory do."""
    return is_api(name) and ("Synchronize" in name or "Memcpy" in name)


@torch.no_grad()
def host_cost(device: torch.device, *, replays: bool) -> HostCost:
    """Measured on this device, by forwards of trivial kernels with the profiler and without.

    Args:
        device: a GPU.
        replays: whether to measure what a replayed graph costs, too.
    """
    number = torch.zeros(1, device=device)
    forwards: list[Callable[[], object]] = [_forward(None), _forward(number), *([_graph(device)] if replays else [])]
    plain_us = [faster_half([time_us(each, device) for _ in range(_REPEATS)]) for each in forwards]
    calls = profiled_device_calls(forwards, _REPEATS, device)
    profiled_us = [
        faster_half([call.wall_us for call in calls[place :: len(forwards)]]) for place in range(len(forwards))
    ]
    events_us, launches_us, *graph_us = (
        profiled - plain for profiled, plain in zip(profiled_us, plain_us, strict=True)
    )
    event_us = max(0.0, events_us / (_KERNELS * _EVENTS))
    launch_us = max(0.0, (launches_us - events_us) / _KERNELS - event_us)  # the kernel's operator is an event too
    node_us = [max(0.0, (each - launch_us) / _KERNELS) for each in graph_us]
    return HostCost(event_us, launch_us, *node_us)


def _forward(number: Tensor | None) -> Callable[[], None]:
    """Events as of a compiled graph; with a `number` on the device, launches too."""
    weights = torch.zeros(8, 8)

    def call() -> None:
        for _ in range(_KERNELS):
            with torch._C._profiler._RecordFunctionFast(KERNEL_NAME):
                weights.transpose(0, 1)
                if number is not None:
                    number.neg_()

    return call


@cache
def _graph(device: torch.device) -> Callable[[], None]:
    """Recorded once: recording gives all free memory back to the device."""
    number = torch.zeros(1, device=device)
    number.neg_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_KERNELS):
            number.neg_()
    recorded = graph, number  # which the graph does not keep

    def call() -> None:
        recorded[0].replay()

    return call
