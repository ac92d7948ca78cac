"""The kernels that Inductor generates, for `torch.compile` and AOTInductor: what each computes, and for which modules.

With provenance tracking on, Inductor numbers the kernels of a graph and keeps, for each, the nodes of the captured
graph in it and their Python stack traces: these say which stages a kernel computes, those for which modules.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import fx

from ultramem.runtime.profile.arithmetic import EXCHANGE, MEMORY_STAGES
from ultramem.runtime.profile.inductor_work import (
    DESCRIPTION,
    DESCRIPTIONS,
    described_kernels,
    descriptions_tag,
)
from ultramem.runtime.profile.modules import COLLECTIVES, module_of_stack, stage_of_module
from ultramem.runtime.profile.replaced import replaced
from ultramem.runtime.profile.stack_traces import sources_tag, stages_of_traces

COMPILE_OPTIONS = {"trace.provenance_tracking_level": 2, "cpp.enable_kernel_profile": True}
"""Inductor options under which a model must be compiled for its stages to be told apart."""

_KERNEL_INFORMATION = "kernel_information.json"
_GENERATED = ("cpp_fused", "triton_")
"""Begin the names of the kernels that Inductor generates itself."""
_KERNELS = "ultramem_kernels"
"""Attribute of Inductor's object of a graph."""


class Kernel(NamedTuple):
    """One kernel of a graph, in the order of its launch."""

    name: str
    stages: tuple[str, ...]
    modules: tuple[str, ...] = ()
    """Empty where the graph that was compiled is not at hand."""
    fx_nodes: tuple[str, ...] = ()
    """Nodes of the captured graph."""
    description: Mapping[str, Any] | None = None
    """For `kernel_work`; None where the kernel was compiled without one."""


@contextlib.contextmanager
def profiled_compilation() -> Iterator[None]:
    """What is compiled inside the block can be told apart by stages."""
    from torch._inductor import config
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    from torch.compiler import config as compiler_config

    # A graph from the compiler's cache has the stack traces of the sources that it was compiled from, which may stand
    # elsewhere, or have other lines, by now.
    with (
        config.patch(COMPILE_OPTIONS),
        compiler_config.patch(cache_key_tag=_cache_tag()),  # type: ignore[attr-defined]  # installed at import
        described_kernels(),
        _without_stack_traces(CppWrapperCpu),
    ):
        yield


def _cache_tag() -> str:
    """Graphs of the compiler's cache that have another are not taken: of other sources, or described in another way."""
    return f"{sources_tag()} {descriptions_tag()}"


@contextlib.contextmanager
def _without_stack_traces(wrapper: type) -> Iterator[None]:
    """Leave the kernels' stack traces out of the code that AOTInductor generates.

    With kernel profiling on, the code would read a kernel's traces line by line before each launch of it, which took a
    decode step as long again as the kernels. They are for messages about a kernel that failed.
    """
    guard, call = (
        getattr(wrapper, name, None) for name in ("write_kernel_context_guard", "generate_c_shim_extern_kernel_call")
    )
    if guard is None or call is None:  # a version of torch that writes none
        yield
        return

    def call_without(self: Any, *args: Any, **kwargs: Any) -> None:
        call(self, *args, **{**kwargs, "stack_traces": None})

    with replaced(wrapper, **{guard.__name__: lambda *args, **kwargs: None, call.__name__: call_without}):
        yield


@contextlib.contextmanager
def recorded_compilation() -> Iterator[list[list[Kernel]]]:
    """`profiled_compilation`; yields a list that fills with the kernels of each graph."""
    from torch._inductor import compile_fx as compiler
    from torch._inductor.output_code import CompiledFxGraph

    graphs: list[list[Kernel]] = []
    modules: dict[str, str] = {}
    original, original_compile = CompiledFxGraph.post_compile, compiler.compile_fx

    def compile_fx(model: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model, fx.GraphModule):
            modules.clear()  # of the graph before
            modules.update(modules_of_graph(model.graph))
        return original_compile(model, *args, **kwargs)

    def post_compile(self: Any, *args: Any, **kwargs: Any) -> None:
        # Runs for a graph from the cache as for a fresh one.
        traces = json.loads(getattr(self, "inductor_provenance_stack_traces_str", None) or "{}")
        mapping = json.loads(getattr(self, "inductor_provenance_mapping_str", None) or "{}")
        graphs.append(_kernels(traces, _fx_nodes(mapping), modules, mapping.get(DESCRIPTIONS, {})))
        setattr(self, _KERNELS, graphs[-1])
        original(self, *args, **kwargs)

    with (
        replaced(CompiledFxGraph, post_compile=post_compile),
        replaced(compiler, compile_fx=compile_fx),
        profiled_compilation(),
    ):
        yield graphs


def kernels_of(graph: Any) -> list[Kernel] | None:
    """The kernels of a graph of torch.compile that was compiled in `recorded_compilation`; None of any other."""
    return getattr(graph, _KERNELS, None)


def packaged_kernels(package: Path, modules: Mapping[str, Mapping[str, str]] | None = None) -> list[list[Kernel]]:
    """The kernels of each model in an AOTInductor package (.pt2); none if it was compiled without the options.

    Args:
        package: the file.
        modules: by the name of each model in it, the module of each node of its captured graph (`modules_of_graph`).
    """
    graphs = []
    with zipfile.ZipFile(package) as archive:
        for name in archive.namelist():
            if name.endswith(_KERNEL_INFORMATION):
                information = json.loads(archive.read(name))
                graphs.append(
                    _kernels(
                        {key: entry["stack_traces"] for key, entry in information.items()},
                        {key: entry.get("pre_grad_nodes", ()) for key, entry in information.items()},
                        (modules or {}).get(name.split("/")[-2], {}),
                        {key: entry.get(DESCRIPTION) for key, entry in information.items()},
                    )
                )
    return graphs


def modules_of_graph(graph: fx.Graph) -> dict[str, str]:
    """The module of each node, by its name."""
    return {
        node.name: module_of_stack([str(path) for path, _ in node.meta["nn_module_stack"].values()])
        for node in graph.nodes
        if node.meta.get("nn_module_stack")
    }


def _fx_nodes(mapping: Mapping[str, Any]) -> dict[str, list[str]]:
    """Nodes of the captured graph by kernel, from Inductor's mapping over the graph that it compiled."""
    captured = mapping.get("postToPre", {})
    return {
        kernel: [name for compiled in nodes for name in captured.get(compiled, ())]
        for kernel, nodes in mapping.get("cppCodeToPost", {}).items()
    }


def _kernels(
    traces: Mapping[str, Sequence[str]],
    fx_nodes: Mapping[str, Iterable[str]],
    modules: Mapping[str, str],
    descriptions: Mapping[str, Mapping[str, Any] | None],
) -> list[Kernel]:
    """Kernels in launch order; keys are "name:number"."""
    kernels = []
    for key in sorted(traces, key=lambda key: int(key.rpartition(":")[2])):
        name = key.rpartition(":")[0]
        nodes = tuple(dict.fromkeys(fx_nodes.get(key, ())))
        stages = _kernel_stages_of(name, stages_of_traces(traces[key]))
        if stages == ("other",) and not name.startswith(_GENERATED):
            stages = _stages_of_modules(modules[node] for node in nodes if node in modules) or stages
        own = [node for node in nodes if node in modules and stage_of_module(modules[node]) in stages]
        places = tuple(dict.fromkeys(modules[node] for node in own))
        kernels.append(Kernel(name, stages, places, nodes, descriptions.get(key)))
    return kernels


def _stages_of_modules(modules: Iterable[str]) -> tuple[str, ...]:
    """Of a library's kernel whose traces name no stage, as those of torch 2.11 say `head(norm(x))` of either: the one
    that its modules are; none if they are several.
    """
    stages = {stage_of_module(module) for module in modules}
    return tuple(stages) if len(stages) == 1 else ()


def _kernel_stages_of(name: str, stages: tuple[str, ...]) -> tuple[str, ...]:
    if COLLECTIVES in name:
        return (EXCHANGE,)
    # What writes to where a collective will read has traces of that one, too.
    stages = tuple(stage for stage in stages if stage != EXCHANGE) or ("other",)
    # A kernel of a library is one operator; the other traces are those of views in its inputs, from stages before it.
    if not name.startswith(_GENERATED) and set(stages) <= set(MEMORY_STAGES):
        return stages[-1:]
    return stages
