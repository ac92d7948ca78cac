"""Calls under PyTorch's profiler, as plain spans of time."""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from ultramem.machine import synchronize
from ultramem.ops._registration import bodies_only
from ultramem.runtime.profile.stages import faster_half

CALL = "ultramem::call"
CPU = torch.device("cpu")
_KERNELS, _KERNEL_EVENTS = 50, 4
"""Of a forward that measures what an event costs: about as many as a small model has, and a kernel's events."""
KERNEL_NAME = "graph_0_cpp_fused__scaled_dot_product_flash_attention_for_cpu_add_arange_cat_clone_transpose_0"
"""As long as such names are."""
_BETWEEN_NUMBERS = 2**16
"""float32 that a kernel passes over, so that the profiler's records have left the nearest cache as in a model."""
_WARM_UP = 5
_EVENT_TURNS, _EVENT_REPEATS = 5, 6
"""A machine changes its speed: forwards with the profiler and without take turns."""


class Span(NamedTuple):
    """One event of the profiler on the CPU."""

    name: str
    start_us: float
    time_us: float


def profiled_spans(call: Callable[[], object], repeats: int, *, unseen: bool = False) -> list[Span]:
    """Every event of `repeats` calls, each inside an event named `CALL`.

    Ops of this package go through the dispatcher where a profiler is on, which takes longer than the way that they take
    unprofiled; with `unseen` they do not notice it, and the operators in their bodies are the events.
    """
    with bodies_only() if unseen else nullcontext():
        events = kineto_events([call], repeats)
    first_ns = min(event.start_ns() for event in events if event.name() == CALL)
    return [
        Span(event.name(), (event.start_ns() - first_ns) / 1e3, event.duration_ns() / 1e3)
        for event in events
        if event.start_ns() >= first_ns
    ]


def kineto_events(calls: Sequence[Callable[[], object]], repeats: int, device: torch.device = CPU) -> list[Any]:
    """The profiler's own events: of the calls one after the other, `repeats` times, each inside an event named `CALL`.

    On a GPU a call begins when the device has nothing to do, and ends when it has done all that was asked of it.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at the profiler's first start; it logs to stderr otherwise
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with warnings.catch_warnings():
        # Of torch 2.11, about cycles to come, of which there are none. To accumulate events would parse them all.
        warnings.filterwarnings("ignore", "Warning: Profiler clears events")
        with profile(activities=activities) as profiler:
            for call in calls:
                for _ in range(_WARM_UP):  # caches hold what came before, and the profiler has no room for records yet
                    call()
            for _ in range(repeats):
                for call in calls:
                    synchronize(device)
                    # torch.profiler.record_function adds 50 us of its own to the span.
                    with torch._C._profiler._RecordFunctionFast(CALL):
                        call()
                        synchronize(device)
    found = profiler.profiler
    assert found is not None
    assert found.kineto_results is not None
    # profiler.events() would make a tree of all of them first, which takes a dozen times as long.
    return [each for each in found.kineto_results.events() if not each.is_hidden_event()]


@torch.no_grad()
def event_cost_us() -> float:
    """What an event of the profiler costs, by forwards like those of a compiled graph, with it and without.

    In a loop over one small operator an event costs two thirds of what it costs in a model.
    """
    weights, numbers = torch.zeros(8, 8), torch.zeros(_BETWEEN_NUMBERS)

    def call() -> None:
        for _ in range(_KERNELS):
            with torch._C._profiler._RecordFunctionFast(KERNEL_NAME):
                weights.transpose(0, 1)  # two events
                numbers.neg_()

    costs_us = []
    for _ in range(_EVENT_TURNS):
        plain_us = []
        for _ in range(_EVENT_REPEATS):
            start_ns = time.perf_counter_ns()
            call()
            plain_us.append((time.perf_counter_ns() - start_ns) / 1e3)
        spans = profiled_spans(call, _EVENT_REPEATS)
        profiled_us = [span.time_us for span in spans if span.name == CALL]
        costs_us.append(faster_half(profiled_us) - faster_half(plain_us))
    return max(0.0, statistics.median(costs_us)) / (_KERNELS * _KERNEL_EVENTS)
