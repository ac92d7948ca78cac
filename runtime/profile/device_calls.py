"""Forwards on a GPU in the profiler's events: what the host did, and what the device ran for it.

The device's kernels, copies and memsets ("activities", as CUPTI has it) have the correlation number of the call of the
CUDA API that launched them. That call lies inside the span of the operator, or of the generated kernel, that made it.
"""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch._C._autograd import DeviceType

from ultramem.runtime.profile.profiled_calls import CALL, Span, kineto_events
from ultramem.runtime.profile.stage_turns import NotSeparableError

GRAPH_LAUNCH = "cudaGraphLaunch"
_API = re.compile(r"cu(da)?[A-Z]")


class Event(NamedTuple):
    """One event of the profiler."""

    name: str
    on_device: bool
    start_ns: int
    time_ns: int
    correlation: int
    """The same of a call of the CUDA API and of what it launched; of other events it is a number of another kind."""


class Activity(NamedTuple):
    """A kernel, copy or memset on the device."""

    name: str
    start_us: float
    """From the start of the forward."""
    time_us: float
    launch: int
    """Place of the call of the CUDA API among the forward's spans; a graph's activities have one together."""

    @property
    def end_us(self) -> float:
        return self.start_us + self.time_us


class DeviceCall(NamedTuple):
    """One forward, to the end of its work on the device."""

    wall_us: float
    spans: tuple[Span, ...]
    """The host's, from the start of the forward, in the order of their starts; of two that start at once, the outer."""
    activities: tuple[Activity, ...]
    """In the order of their starts."""


def is_api(name: str) -> bool:
    """Whether an event of the host is a call of the CUDA API."""
    return _API.match(name) is not None


def profiled_device_calls(
    calls: Sequence[Callable[[], object]], repeats: int, device: torch.device
) -> list[DeviceCall]:
    """`calls` on a GPU, one after the other, `repeats` times.

    Raises:
        NotSeparableError: the profiler says nothing of the device, or has lost what it launched.
    """
    events = [
        Event(
            each.name(),
            each.device_type() == DeviceType.CUDA,
            each.start_ns(),
            each.duration_ns(),
            each.correlation_id(),
        )
        for each in kineto_events(calls, repeats, device)
        if not (each.is_user_annotation() and each.device_type() == DeviceType.CUDA)
    ]
    if not any(event.on_device for event in events):
        raise NotSeparableError("the profiler has no events of the device: CUPTI is missing, or another tool has it")
    return device_calls(events)


def device_calls(events: Iterable[Event]) -> list[DeviceCall]:
    """The forwards in the profiler's events, each of which lies in a span named `CALL`.

    Raises:
        NotSeparableError: the device ran something in a forward that the profiler has no launch of.
    """
    on_host: list[Event] = []
    on_device: dict[int, list[Event]] = defaultdict(list)
    for event in sorted(events, key=lambda event: (event.start_ns, -event.time_ns)):
        if event.on_device:
            on_device[event.correlation].append(event)
        else:
            on_host.append(event)
    launched = {event.correlation for event in on_host if is_api(event.name)}
    lost = sorted(
        (event for correlation, each in on_device.items() if correlation not in launched for event in each),
        key=lambda event: event.start_ns,
    )
    return [
        _device_call(call, _inside(on_host, call), on_device, _inside(lost, call))
        for call in (event for event in on_host if event.name == CALL)
    ]


def _device_call(
    call: Event, host: Sequence[Event], on_device: Mapping[int, list[Event]], lost: Sequence[Event]
) -> DeviceCall:
    if lost:
        raise NotSeparableError(f"the profiler has no launch of {len(lost)} of the activities on the device")
    activities = [
        Activity(each.name, _us(each, call), each.time_ns / 1e3, place)
        for place, launch in enumerate(host)
        if is_api(launch.name)
        for each in on_device.get(launch.correlation, ())
    ]
    spans = (Span(each.name, _us(each, call), each.time_ns / 1e3) for each in host)
    return DeviceCall(call.time_ns / 1e3, tuple(spans), tuple(sorted(activities, key=lambda each: each.start_us)))


def _inside(events: Sequence[Event], call: Event) -> Sequence[Event]:
    """Those of `events`, which are in order, that begin in the call; not the call itself."""
    first = bisect.bisect_left(events, call.start_ns, key=lambda event: event.start_ns)
    end = bisect.bisect_left(events, call.start_ns + call.time_ns, key=lambda event: event.start_ns)
    return [event for event in events[first:end] if event is not call]


def _us(event: Event, call: Event) -> float:
    return (event.start_ns - call.start_ns) / 1e3
