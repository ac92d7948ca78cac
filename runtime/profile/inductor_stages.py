"""Stages and nodes of `torch.compile` and AOTInductor: times of the generated kernels, which say what they compute.

With kernel profiling on, every C++ kernel reports to `torch.profiler`. One forward under the profiler gives a sequence
of kernels; where it is, name by name, the sequence that Inductor recorded, each kernel's time goes to its stages and
modules. A kernel with operators of several stages keeps them all: it is not divided.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ultramem.runtime.profile.inductor_kernels import Kernel, kernels_of
from ultramem.runtime.profile.inductor_work import graph_calls, kernel_work
from ultramem.runtime.profile.measure import Cell
from ultramem.runtime.profile.operator_work import Work
from ultramem.runtime.profile.profiled_calls import CALL, event_cost_us, profiled_spans
from ultramem.runtime.profile.schema import StageTimes
from ultramem.runtime.profile.stage_turns import NotSeparableError, stages_in_turns
from ultramem.runtime.profile.stages import NodeTime, Run, not_separable

METHOD = "profiler events of the generated kernels, the measured cost of an event taken off"

_COMPILED_GRAPH = "## Call CompiledFxGraph"


def kernel_stages(cell: Cell, graphs: Sequence[Sequence[Kernel]], *, repeats: int, device: torch.device) -> StageTimes:
    """Time of each kernel and set of stages, from the profiler's events of the generated kernels."""
    if not any(graphs):
        return not_separable(
            cell, "compiled without COMPILE_OPTIONS: profile exports it so where there is no export yet"
        )
    return stages_in_turns(
        cell,
        METHOD,
        lambda count: _kernel_runs(cell, graphs, count),
        lambda: _kernel_work(cell, graphs),
        repeats=repeats,
        device=device,
    )


def _kernel_runs(cell: Cell, graphs: Sequence[Sequence[Kernel]], repeats: int) -> list[Run]:
    event_us = event_cost_us()
    runs = []
    for call in _profiled_calls(cell, repeats):
        kernels = _graph_of(call, graphs)
        nodes = tuple(
            NodeTime(
                _node_name(index, kernel),
                kernel.name,
                kernel.modules,
                kernel.stages,
                event.start_us - event_us * event.events_before,
                max(0.0, event.time_us - event_us * event.events_inside),
                max(0.0, event.time_us - event_us * event.events_inside),
                kernel.fx_nodes,
            )
            for index, (kernel, event) in enumerate(zip(kernels, call.kernels, strict=True))
        )
        runs.append(Run(call.wall_us, nodes, event_us * call.events))
    return runs


def _kernel_work(cell: Cell, graphs: Sequence[Sequence[Kernel]]) -> dict[str, Work]:
    """Of the kernels that were described when they were compiled."""
    calls = graph_calls(cell.call)
    if len(calls) != 1:
        return {}
    (called,) = calls
    # Graphs for one sequence and for several may have kernels of the same names.
    kernels = kernels_of(called.graph) or _graph_of(_profiled_calls(cell, 1)[0], graphs)
    works = {
        _node_name(index, kernel): kernel_work(kernel.description, called.sizes)
        for index, kernel in enumerate(kernels)
        if kernel.description is not None
    }
    return {name: work for name, work in works.items() if work is not None}


def _node_name(index: int, kernel: Kernel) -> str:
    return f"{index} {kernel.name}"


@dataclass(slots=True)
class _Event:
    name: str
    start_us: float
    """From the start of the call."""
    time_us: float
    events_before: int
    """Of the profiler, in the same call; what an event costs lies outside of its own span, and inside of others'."""
    events_inside: int = 0


@dataclass(slots=True)
class _Call:
    wall_us: float
    kernels: list[_Event] = field(default_factory=list)
    """The outermost kernel events, in order."""
    events: int = 0
    """All of them."""


def _profiled_calls(cell: Cell, repeats: int) -> list[_Call]:
    calls: list[_Call] = []
    call_start = kernel_end = graph_end = float("-inf")
    for span in sorted(profiled_spans(cell.call, repeats), key=lambda span: (span.start_us, -span.time_us)):
        end_us = span.start_us + span.time_us
        if span.name == CALL:
            call_start = span.start_us
            calls.append(_Call(span.time_us))
            continue
        call = calls[-1]
        if span.name.startswith(_COMPILED_GRAPH):
            graph_end = end_us
        elif span.start_us < kernel_end:
            call.kernels[-1].events_inside += 1
        elif _is_kernel(span.name, in_graph=span.start_us < graph_end):
            kernel_end = end_us
            call.kernels.append(_Event(span.name, span.start_us - call_start, span.time_us, call.events))
        call.events += 1
    return calls


def _is_kernel(name: str, *, in_graph: bool) -> bool:
    # Operators outside a compiled graph are the engine's own; AOTInductor has a name of its own for those in its graph.
    return name.startswith(("graph_", "cpp_fused", "aoti_torch_")) or (in_graph and "::" in name)


def _graph_of(call: _Call, graphs: Sequence[Sequence[Kernel]]) -> Sequence[Kernel]:
    kernels = next((graph for graph in graphs if _follows(call.kernels, graph)), None)
    if kernels is None:
        raise NotSeparableError("the kernels that ran are not, one for one, those of a compiled graph")
    return kernels


def _follows(events: Sequence[_Event], kernels: Sequence[Kernel]) -> bool:
    return len(events) == len(kernels) and all(
        _same_name(event.name, kernel.name) for event, kernel in zip(events, kernels, strict=True)
    )


def _same_name(event: str, kernel: str) -> bool:
    """Whether a profiler event is this kernel: "graph_0_cpp_x" is "cpp_x", "aten::mm" is "extern_kernels.mm"."""
    if re.sub(r"^graph_\d+_", "", event) == kernel:
        return True
    namespace, _, operator = event.partition("::")
    plain = kernel.removeprefix("torch.ops.").removeprefix("extern_kernels.").removeprefix(f"{namespace}.")
    return bool(operator) and plain.split(".")[0] == operator.split(".")[0]
