"""Stages and nodes on a GPU: the time that a node's kernels take on the device, by the profiler's events of them.

The host launches kernels one after the other and is ahead of the device, or behind it. Times of the host, or of the
device where the host waits for it after each module, would be those of another forward. A kernel takes as long on the
device whoever watches; what of the forward no kernel covers is the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import nn

from ultramem.ops._registration import bodies_only
from ultramem.runtime.profile.device_calls import GRAPH_LAUNCH, DeviceCall, profiled_device_calls
from ultramem.runtime.profile.device_cost import host_cost
from ultramem.runtime.profile.device_owners import Launches, Owners, eager_owners, kernel_launches, kernel_owners
from ultramem.runtime.profile.device_runs import device_run
from ultramem.runtime.profile.eager_stages import eager_runs, module_spans
from ultramem.runtime.profile.eager_work import eager_work
from ultramem.runtime.profile.inductor_kernels import Kernel
from ultramem.runtime.profile.inductor_stages import NO_KERNELS, graph_work
from ultramem.runtime.profile.measure import Cell, Engine
from ultramem.runtime.profile.operator_work import Work
from ultramem.runtime.profile.schema import StageTimes
from ultramem.runtime.profile.stage_turns import NotSeparableError, stages_in_turns
from ultramem.runtime.profile.stages import Run, not_separable
from ultramem.runtime.profile.triton_events import named_triton_kernels

METHOD = (
    "device time of the kernels that each launched; the rest is the host's, the measured cost of the profiler taken off"
)


def eager_device_stages(model: nn.Module, cell: Cell, *, repeats: int, device: torch.device) -> StageTimes:
    """Of the operators in the modules of `model`, which `cell` runs on a GPU."""

    def instrumented(count: int) -> list[Run]:
        with module_spans(model), bodies_only(named=True):
            calls = profiled_device_calls([cell.call], count, device)
        return _runs(calls, eager_owners, device)

    def work() -> dict[str, Work]:
        with module_spans(model):  # ops of this package are seen as such: their bodies launch kernels
            return eager_work(cell.call, lambda spans: eager_runs(spans)[0].nodes, unseen=False)

    return stages_in_turns(cell, METHOD, instrumented, work, repeats=repeats, device=device)


def kernel_device_stages(
    cell: Cell, engine: Engine, graphs: Sequence[Sequence[Kernel]], *, repeats: int, device: torch.device
) -> StageTimes:
    """Of the kernels of `graphs`, of which `cell` runs one on a GPU, replayed as a CUDA graph or not."""
    if not any(graphs):
        return not_separable(cell, NO_KERNELS)
    plain_steps: Callable[[], AbstractContextManager[Any]] | None = getattr(engine, "plain_steps", None)

    def plain_call() -> DeviceCall:
        if plain_steps is None:
            raise NotSeparableError("the engine replays a CUDA graph, and has no way of running it kernel by kernel")
        with plain_steps(), named_triton_kernels():
            return profiled_device_calls([cell.call], 1, device)[0]

    @cache
    def launches() -> Launches:
        return kernel_launches(plain_call(), graphs)

    def instrumented(count: int) -> list[Run]:
        with named_triton_kernels():
            calls = profiled_device_calls([cell.call], count, device)
        return _runs(calls, lambda call: kernel_owners(call, graphs, launches), device)

    def work() -> dict[str, Work]:
        with plain_steps() if plain_steps is not None else nullcontext():
            return graph_work(cell.call, lambda: launches().kernels)

    return stages_in_turns(cell, METHOD, instrumented, work, repeats=repeats, device=device)


def _runs(calls: Sequence[DeviceCall], owners: Callable[[DeviceCall], Owners], device: torch.device) -> list[Run]:
    owned = [owners(call) for call in calls]  # before the costs are measured: it may not be possible
    replays = any(span.name == GRAPH_LAUNCH for call in calls for span in call.spans)
    cost = host_cost(device, replays=replays)
    return [device_run(call, each, cost) for call, each in zip(calls, owned, strict=True)]
