"""Stages of `torch.compile` and AOTInductor: each generated kernel is traced back to the source lines it computes.

With provenance tracking on, Inductor numbers the kernels of a graph and keeps, for each, the Python stack traces of the
operators in it; with kernel profiling on, every C++ kernel reports to `torch.profiler`. One forward under the profiler
gives a sequence of kernels; where it is, name by name, the sequence that Inductor recorded, each kernel's time goes to
the stages in its traces. A kernel with operators of several stages keeps them all: it is not divided.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ultramem.graph import memory_layer, memory_output, moe, transformer, value_table
from ultramem.runtime.profile.arithmetic import MEMORY_STAGES
from ultramem.runtime.profile.measure import Cell
from ultramem.runtime.profile.schema import StageTimes
from ultramem.runtime.profile.stages import Run, in_order, not_separable, summarize

COMPILE_OPTIONS = {"trace.provenance_tracking_level": 2, "cpp.enable_kernel_profile": True}
"""Inductor options under which a model must be compiled for its stages to be told apart."""

_CALL = "ultramem::call"
_COMPILED_GRAPH = "## Call CompiledFxGraph"
_KERNEL_INFORMATION = "kernel_information.json"
_LINEAR_STAGES = ("head",)
"""Stages that are a plain linear layer: the class does not tell them apart, the line that calls them does."""
_FRAME = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+), in \S+$')


class Kernel(NamedTuple):
    """One kernel of a graph, in the order of its launch."""

    name: str
    stages: tuple[str, ...]


@contextlib.contextmanager
def recorded_compilation() -> Iterator[list[list[Kernel]]]:
    """Compile with `COMPILE_OPTIONS` inside the block; yields a list that fills with the kernels of each graph."""
    from torch._inductor import config
    from torch._inductor.output_code import CompiledFxGraph

    graphs: list[list[Kernel]] = []
    original = CompiledFxGraph.post_compile

    def post_compile(self: Any, *args: Any, **kwargs: Any) -> None:
        # Runs for a graph from the cache as for a fresh one.
        traces = json.loads(getattr(self, "inductor_provenance_stack_traces_str", None) or "{}")
        graphs.append(_kernels(traces))
        original(self, *args, **kwargs)

    # Assigned by name, so that mypy accepts a method's replacement.
    setattr(CompiledFxGraph, "post_compile", post_compile)  # noqa: B010
    try:
        with config.patch(COMPILE_OPTIONS):
            yield graphs
    finally:
        setattr(CompiledFxGraph, "post_compile", original)  # noqa: B010


def packaged_kernels(package: Path) -> list[list[Kernel]]:
    """The kernels of each model in an AOTInductor package (.pt2); none if it was compiled without the options."""
    graphs = []
    with zipfile.ZipFile(package) as archive:
        for name in archive.namelist():
            if name.endswith(_KERNEL_INFORMATION):
                information = json.loads(archive.read(name))
                graphs.append(_kernels({key: entry["stack_traces"] for key, entry in information.items()}))
    return graphs


def kernel_stages(cell: Cell, graphs: Sequence[Sequence[Kernel]], *, repeats: int) -> StageTimes:
    """Time of each set of stages, from the profiler's events of the generated kernels."""
    if not any(graphs):
        return not_separable(
            cell, "compiled without COMPILE_OPTIONS: profile exports it so where there is no export yet"
        )
    runs = []
    for wall_us, events in _profiled_calls(cell, repeats):
        kernels = next((graph for graph in graphs if _follows(events, graph)), None)
        if kernels is None:
            return not_separable(cell, "the kernels that ran are not, one for one, those of a compiled graph")
        stage_us: dict[tuple[str, ...], float] = defaultdict(float)
        for kernel, (_, kernel_us) in zip(kernels, events, strict=True):
            stage_us[kernel.stages] += kernel_us
        runs.append(Run(wall_us, dict(stage_us)))
    return summarize(cell, "profiler events of the generated kernels", runs)


def stages_of_traces(traces: Sequence[str]) -> tuple[str, ...]:
    """The stages of an operator's stack traces; "other" for lines of the model outside the stages."""
    return in_order(_stage_of_trace(trace) for trace in traces) or ("other",)


def _stage_of_trace(trace: str) -> str:
    lines = trace.splitlines()
    below = ""
    for number in range(len(lines) - 1, -1, -1):
        frame = _FRAME.match(lines[number])
        if frame is None:
            continue
        for file, first, last, stage in _stage_sources():
            if frame["file"] == file and first <= int(frame["line"]) <= last:
                return stage
        for stage in _LINEAR_STAGES:
            if _calls(f"self.{stage}(", lines[number + 1 : number + 3], below):
                return stage
        below = frame["file"]
    return "other"


def _calls(call: str, code: Sequence[str], below: str) -> bool:
    """Whether a frame is in the call of a linear layer, given its line of code and the file of the frame below it.

    Traces of `torch.compile` underline the call and end there; those of `torch.export` go on into the layer.
    """
    line, underline = (*code, "", "")[:2]
    if underline.strip(" ") and not underline.strip(" ^~"):
        return line[len(underline) - len(underline.lstrip(" ")) :].startswith(call)
    return call in line and below == inspect.getfile(nn.Linear)


@cache
def _stage_sources() -> list[tuple[str, int, int, str]]:
    """(file, first line, last line, stage) of the classes that are stages."""
    classes = (
        (memory_layer.Query, "query"),
        (memory_layer.Score, "score"),
        (memory_layer.Select, "select"),
        (memory_layer.Lookup, "lookup"),
        (value_table.ValueTable, "lookup"),
        (memory_output.Project, "expand"),
        (memory_output.GatedOutput, "expand"),
        (memory_output.NoOutput, "expand"),
        (transformer.Attention, "attention"),
        (transformer.MLP, "mlp"),
        (moe.MoE, "mlp"),
    )
    sources = []
    for cls, stage in classes:
        lines, first = inspect.getsourcelines(cls)
        sources.append((inspect.getfile(cls), first, first + len(lines) - 1, stage))
    return sources


def _kernels(traces: dict[str, list[str]]) -> list[Kernel]:
    """Kernels in launch order; keys are "name:number"."""
    kernels = []
    for key in sorted(traces, key=lambda key: int(key.rpartition(":")[2])):
        name = key.rpartition(":")[0]
        kernels.append(Kernel(name, _kernel_stages_of(name, stages_of_traces(traces[key]))))
    return kernels


def _kernel_stages_of(name: str, stages: tuple[str, ...]) -> tuple[str, ...]:
    # A kernel of a library is one operator; the other traces are those of views in its inputs, from stages before it.
    if not name.startswith("cpp_fused") and set(stages) <= set(MEMORY_STAGES):
        return stages[-1:]
    return stages


def _profiled_calls(cell: Cell, repeats: int) -> list[tuple[float, list[tuple[str, float]]]]:
    """Of each call: its wall time, and its outermost kernel events (name, microseconds) in order."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at the profiler's first start; it logs to stderr otherwise
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            with record_function(_CALL):
                cell.call()
    calls: list[tuple[float, list[tuple[str, float]]]] = []
    kernel_end = graph_end = float("-inf")
    for event in sorted(profiler.events() or [], key=lambda event: (event.time_range.start, -event.time_range.end)):
        start, end = event.time_range.start, event.time_range.end
        if event.name == _CALL:
            calls.append((event.time_range.elapsed_us(), []))
        elif event.name.startswith(_COMPILED_GRAPH):
            graph_end = end
        elif start >= kernel_end and _is_kernel(event.name, in_graph=start < graph_end):
            kernel_end = end
            calls[-1][1].append((event.name, event.time_range.elapsed_us()))
    return calls


def _is_kernel(name: str, *, in_graph: bool) -> bool:
    # Operators outside a compiled graph are the engine's own; AOTInductor has a name of its own for those in its graph.
    return name.startswith(("graph_", "cpp_fused", "aoti_torch_")) or (in_graph and "::" in name)


def _follows(events: Sequence[tuple[str, float]], kernels: Sequence[Kernel]) -> bool:
    return len(events) == len(kernels) and all(
        _same_name(event, kernel.name) for (event, _), kernel in zip(events, kernels, strict=True)
    )


def _same_name(event: str, kernel: str) -> bool:
    """Whether a profiler event is this kernel: "graph_0_cpp_x" is "cpp_x", "aten::mm" is "extern_kernels.mm"."""
    if re.sub(r"^graph_\d+_", "", event) == kernel:
        return True
    operator = event.partition("::")[2]
    plain = kernel.removeprefix("torch.ops.").removeprefix("extern_kernels.").removeprefix("aten.")
    return bool(operator) and plain.split(".")[0] == operator.split(".")[0]
