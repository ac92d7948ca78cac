"""Stages and nodes of `torch.compile` and AOTInductor: times of the generated kernels, which say what they compute.

With kernel profiling on, every C++ kernel reports to `torch.profiler`. One forward under the profiler gives a sequence
of kernels; where it is, name by name, the sequence that Inductor recorded, each kernel's time goes to its stages and
modules. A kernel with operators of several stages keeps them all: it is not divided.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from ultramem.runtime.profile.inductor_kernels import Kernel
from ultramem.runtime.profile.measure import Cell
from ultramem.runtime.profile.profiled_calls import CALL, profiled_spans
from ultramem.runtime.profile.schema import StageTimes
from ultramem.runtime.profile.stages import NodeTime, Run, not_separable, summarize

METHOD = "profiler events of the generated kernels"

_COMPILED_GRAPH = "## Call CompiledFxGraph"


def kernel_stages(cell: Cell, graphs: Sequence[Sequence[Kernel]], *, repeats: int) -> StageTimes:
    """Time of each kernel and set of stages, from the profiler's events of the generated kernels."""
    if not any(graphs):
        return not_separable(
            cell, "compiled without COMPILE_OPTIONS: profile exports it so where there is no export yet"
        )
    runs = []
    for wall_us, events in _profiled_calls(cell, repeats):
        kernels = next((graph for graph in graphs if _follows(events, graph)), None)
        if kernels is None:
            return not_separable(cell, "the kernels that ran are not, one for one, those of a compiled graph")
        nodes = tuple(
            NodeTime(
                f"{index} {kernel.name}",
                kernel.name,
                kernel.modules,
                kernel.stages,
                event.start_us,
                event.time_us,
                event.time_us,
                kernel.fx_nodes,
            )
            for index, (kernel, event) in enumerate(zip(kernels, events, strict=True))
        )
        runs.append(Run(wall_us, nodes))
    return summarize(cell, METHOD, runs)


class _Event(NamedTuple):
    name: str
    start_us: float
    """From the start of the call."""
    time_us: float


def _profiled_calls(cell: Cell, repeats: int) -> list[tuple[float, list[_Event]]]:
    """Of each call: its wall time, and its outermost kernel events in order."""
    calls: list[tuple[float, list[_Event]]] = []
    call_start = kernel_end = graph_end = float("-inf")
    for span in sorted(profiled_spans(cell.call, repeats), key=lambda span: (span.start_us, -span.time_us)):
        end_us = span.start_us + span.time_us
        if span.name == CALL:
            call_start = span.start_us
            calls.append((span.time_us, []))
        elif span.name.startswith(_COMPILED_GRAPH):
            graph_end = end_us
        elif span.start_us >= kernel_end and _is_kernel(span.name, in_graph=span.start_us < graph_end):
            kernel_end = end_us
            calls[-1][1].append(_Event(span.name, span.start_us - call_start, span.time_us))
    return calls


def _is_kernel(name: str, *, in_graph: bool) -> bool:
    # Operators outside a compiled graph are the engine's own; AOTInductor has a name of its own for those in its graph.
    return name.startswith(("graph_", "cpp_fused", "aoti_torch_")) or (in_graph and "::" in name)


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
