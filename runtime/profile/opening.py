"""Engines made ready to measure: exported, opened, compiled and warm, and what each of that took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ultramem.graph import Transformer
from ultramem.runtime.profile.compile_counts import CompileCounts, compile_counts
from ultramem.runtime.profile.inductor_kernels import (
    Kernel,
    modules_of_graph,
    packaged_kernels,
    recorded_compilation,
)
from ultramem.runtime.profile.measure import Agreement, Engine, Inputs
from ultramem.runtime.profile.memory_watch import MemoryWatch
from ultramem.runtime.profile.schema import EngineRecord

EXPORTED = ("onnx", "aoti", "tensorrt")
"""Engines that are loaded from a folder of their own."""


class Opened(NamedTuple):
    """An engine that is ready, the kernels of its graphs, the folder it was loaded from, and what that took."""

    engine: Engine
    graphs: list[list[Kernel]]
    folder: Path | None
    export_seconds: float
    open_seconds: float
    warm_up_seconds: float
    compiled: CompileCounts
    watch: MemoryWatch

    def record(self, agreement: Agreement) -> EngineRecord:
        return EngineRecord(
            name=self.engine.name,
            prepare_seconds=self.export_seconds + self.open_seconds + self.warm_up_seconds,
            export_seconds=self.export_seconds,
            open_seconds=self.open_seconds,
            warm_up_seconds=self.warm_up_seconds,
            graphs=self.compiled.graphs,
            graph_breaks=self.compiled.graph_breaks,
            cached_graphs=self.compiled.cached_graphs,
            memory_bytes=self.watch.memory_bytes,
            memory_method=self.watch.method,
            max_abs_difference=agreement.max_abs_difference,
            tolerance=agreement.tolerance,
        )


def open_ready(
    engine: str | Engine,
    model: Transformer,
    artifact_folder: Path | None,
    inputs: Sequence[Inputs],
    progress: Callable[[str], None],
) -> Opened:
    """Open an engine and run every shape once, so that all of its compiling is done and recorded."""
    name = engine if isinstance(engine, str) else engine.name
    progress(f"preparing {name}")
    before = compile_counts()
    with recorded_compilation() as graphs, MemoryWatch(model.embedding.weight.device) as watch:
        start = time.perf_counter()
        folder = _exported(name, model, artifact_folder) if isinstance(engine, str) else None
        exported = time.perf_counter()
        opened = _open(engine, model, folder) if isinstance(engine, str) else engine
        ready = time.perf_counter()
        for each in inputs:
            _, cache = opened.prefill(each.prompt_BS)
            opened.decode(each.next_B1, cache)
        warm = time.perf_counter()
    folder = getattr(opened, "folder", None)
    return Opened(
        engine=opened,
        graphs=[*graphs, *_packaged(model, folder)],
        folder=folder,
        export_seconds=exported - start,
        open_seconds=ready - exported,
        warm_up_seconds=warm - ready,
        compiled=compile_counts().since(before),
        watch=watch,
    )


def _exported(name: str, model: Transformer, artifact_folder: Path | None) -> Path | None:
    """The folder of an exported engine, which is written if it is not there; None for the others."""
    if name not in EXPORTED:
        return None
    if artifact_folder is None:
        raise ValueError(f"artifact_folder must be given for engine {name!r}, got None")
    folder = artifact_folder / name
    if not folder.exists():
        from ultramem.export import export_model

        artifact_folder.mkdir(parents=True, exist_ok=True)
        export_model(model, name, folder)
    return folder


def _open(name: str, model: Transformer, folder: Path | None) -> Engine:
    from ultramem.runtime.engine import open_engine

    return open_engine(name, model if folder is None else None, folder)


def _packaged(model: Transformer, folder: Path | None) -> list[list[Kernel]]:
    """The kernels of an AOTInductor package, if the folder has one that was compiled to tell them."""
    packages = sorted(folder.glob("*.pt2")) if folder is not None else []
    if folder is None or not any(any(packaged_kernels(package)) for package in packages):
        return []
    modules = _modules_of_export(model, folder)
    return [graph for package in packages for graph in packaged_kernels(package, modules)]


def _modules_of_export(model: Transformer, folder: Path) -> dict[str, dict[str, str]]:
    """By the name of each graph of an AOTInductor export, the module of each of its nodes.

    The package has the names of the nodes alone. Capture is a function of the configuration and the options, so that
    capturing the model again gives the same names.
    """
    from ultramem.export.aot_inductor import lowered_programs
    from ultramem.export.manifest import read_manifest
    from ultramem.export.rounding import rounded

    options = read_manifest(folder).options
    return {
        name: modules_of_graph(program.exported.graph)
        for name, program in lowered_programs(rounded(model, options), options).items()
    }
