"""Stages and nodes of `torch.compile` and AOTInductor: times of the generated kernels, which say what they compute.

With kernel profiling on, every C++ kernel reports to `torch.profiler`. One forward under the profiler gives a sequence
of kernels; where it is, name by name, the sequence that Inductor recorded, each kernel's time goes to its stages and
modules. A kernel with operators of several stages keeps them all: it is not divided.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
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

NO_KERNELS = "compiled without COMPILE_OPTIONS: profile exports it so where there is no export yet"
COMPILED_GRAPH = "## Call CompiledFxGraph"
"""Begins the name of the event around a graph of torch.compile."""


def kernel_stages(cell: Cell, graphs: Sequence[Sequence[Kernel]], *, repeats: int, device: torch.device) -> StageTimes:
    """Time of each kernel and set of stages, from the profiler's events of the generated kernels."""
    if not any(graphs):
        return not_separable(cell, NO_KERNELS)
    return stages_in_turns(
        cell,
        METHOD,
        lambda count: _kernel_runs(cell, graphs, count),
        lambda: graph_work(cell.call, lambda: _graph_of(_profiled_calls(cell, 1)[0], graphs)),
        repeats=repeats,
        device=device,
    )


def _kernel_runs(cell: Cell, graphs: Sequence[Sequence[Kernel]], repeats: int) -> list[Run]:
    event_us = event_cost_us()
    runs = []
    for call in _profiled_calls(cell, repeats):
        kernels = _graph_of(call, graphs)
        nodes = []
        for index, (kernel, event) in enumerate(zip(kernels, call.kernels, strict=True)):
            time_us = max(0.0, event.time_us - event_us * event.events_inside)
            start_us = event.start_us - event_us * event.events_before
            nodes.append(kernel_node(index, kernel)._replace(start_us=start_us, time_us=time_us, span_us=time_us))
        runs.append(Run(call.wall_us, tuple(nodes), event_us * call.events))
    return runs


def graph_work(call: Callable[[], object], kernels: Callable[[], Sequence[Kernel]]) -> dict[str, Work]:
    """By node, of the kernels that were described when they were compiled.

    Args:
        call: the forward.
        kernels: those of the graph that it runs; asked for if the graph does not have them itself.
    """
    calls = graph_calls(call)
    if len(calls) != 1:
        return {}
    (called,) = calls
    # Graphs for one sequence and for several may have kernels of the same names.
    works = {
        kernel_node(index, kernel).node: kernel_work(kernel.description, called.sizes)
        for index, kernel in enumerate(kernels_of(called.graph) or kernels())
        if kernel.description is not None
    }
    return {name: work for name, work in works.items() if work is not None}


def kernel_node(index: int, kernel: Kernel) -> NodeTime:
    """The node of a graph's kernel, without its times."""
    return NodeTime(
        f"{index} {kernel.name}", kernel.name, kernel.modules, kernel.stages, 0.0, 0.0, 0.0, kernel.fx_nodes
    )


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
        if span.name.startswith(COMPILED_GRAPH):
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
    return graph_of([event.name for event in call.kernels], graphs)


def graph_of(events: Sequence[str], graphs: Sequence[Sequence[Kernel]]) -> Sequence[Kernel]:
    """The graph whose kernels have these events, by name.

    Raises:
        NotSeparableError: there is none.
    """
    kernels = next((graph for graph in graphs if _follows(events, graph)), None)
    if kernels is None:
        raise NotSeparableError("the kernels that ran are not, one for one, those of a compiled graph")
    return kernels


def _follows(events: Sequence[str], kernels: Sequence[Kernel]) -> bool:
    return len(events) == len(kernels) and all(
        _same_name(event, kernel.name) for event, kernel in zip(events, kernels, strict=True)
    )


def _same_name(event: str, kernel: str) -> bool:
    """Whether a profiler event is this kernel: "graph_0_cpp_x" is "cpp_x", "aten::mm" is "extern_kernels.mm"."""
    if re.sub(r"^(graph_\d+_|kernels_\.)", "", event) == kernel:
        return True
    namespace, _, operator = event.partition("::")
    plain = kernel.removeprefix("torch.ops.").removeprefix("extern_kernels.").removeprefix(f"{namespace}.")
    return bool(operator) and plain.split(".")[0] == operator.split(".")[0]
