"""Stages and nodes of ONNX Runtime: the graph that it runs, with a stamp behind every node."""

from __future__ import annotations

import ast
import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ultramem.export.onnx_session import OnnxModel
from ultramem.runtime.profile.measure import Cell
from ultramem.runtime.profile.modules import BETWEEN, module_of_path, module_of_stack, stage_of_module
from ultramem.runtime.profile.onnx_stamps import DOMAIN, StampedRun, add_stamps, stamped_runs, stamps_of
from ultramem.runtime.profile.schema import StageTimes
from ultramem.runtime.profile.stage_turns import stages_in_turns
from ultramem.runtime.profile.stages import NodeTime, Run

METHOD = (
    "stamps behind the nodes of ONNX Runtime's graph, their cost taken off; a node is timed with the runtime's dispatch "
    "of it, and a norm that the runtime fused counts with the attention or MLP behind it"
)
_SCOPES = "pkg.torch.onnx.name_scopes"
_EXTERNAL_BYTES = "1024"
_WARM_UP = 3


class StampedSession:
    """A second session of an engine's export: the same nodes, and stamps behind them."""

    def __init__(self, model_path: Path, engine_session: Any, library: Path, *, own_kernels: bool) -> None:
        """`own_kernels`: of this package, as the session of the engine has them."""
        import onnx
        import onnxruntime

        from ultramem.export.onnx_stages import stages_of_optimized_model

        threads = engine_session.get_session_options().intra_op_num_threads
        with tempfile.TemporaryDirectory() as folder:
            optimized, stamped = Path(folder) / "optimized.onnx", Path(folder) / "stamped.onnx"
            options = _options(threads, own_kernels=own_kernels)
            # Fused nodes have names of their own: the graph that really runs says what they were made of.
            options.optimized_model_filepath = str(optimized)
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{optimized.name}.data"
            )
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_min_size_in_bytes", _EXTERNAL_BYTES
            )
            onnxruntime.InferenceSession(str(model_path), options, providers=["CPUExecutionProvider"])
            model = onnx.load(str(optimized), load_external_data=False)
            nodes = add_stamps(model.graph)
            if all(each.domain != DOMAIN for each in model.opset_import):
                model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
            onnx.save(model, str(stamped))
            options = _options(threads, own_kernels=True)
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            self.session = onnxruntime.InferenceSession(str(stamped), options, providers=["CPUExecutionProvider"])
            modules = {
                name: module_of_path(part) or BETWEEN for name, part in stages_of_optimized_model(optimized).items()
            }
        exact = modules_of_file(model_path)
        self.nodes = [
            None if node is None else (node.name, node.op_type, exact.get(node.name, modules[node.name]))
            for node in nodes
        ]
        """Name, operator and module of each place."""
        self.library = library

    @contextlib.contextmanager
    def in_place_of(self, model: OnnxModel) -> Iterator[None]:
        """The engine's model runs the stamped graph inside the block."""
        plain, model.session = model.session, self.session
        try:
            yield
        finally:
            model.session = plain

    def runs(self, model: OnnxModel, cell: Cell, repeats: int) -> list[Run]:
        walls_ns, stamps = [], []
        with self.in_place_of(model), stamps_of(self.library, 4 * len(self.nodes)) as take:
            for _ in range(_WARM_UP):
                cell.call()
            for _ in range(repeats):
                take()
                start_ns = time.perf_counter_ns()
                cell.call()
                walls_ns.append((start_ns, time.perf_counter_ns()))
                stamps.append(take())
        return [
            node_run(start_ns, end_ns, run, self.nodes)
            for (start_ns, end_ns), run in zip(walls_ns, stamped_runs(stamps), strict=True)
        ]


def onnx_stages(
    stamped: StampedSession, model: OnnxModel, cell: Cell, *, repeats: int, device: torch.device
) -> StageTimes:
    """Stages of the cell, whose engine runs `model`."""
    return stages_in_turns(
        cell, METHOD, lambda count: stamped.runs(model, cell, count), repeats=repeats, device=device
    )


def open_stamped(model_path: Path, model: OnnxModel) -> StampedSession | str:
    """The stamped graph of an export; or why there is none."""
    from ultramem.export.onnx_plugin import find_plugin

    plugin = find_plugin()
    if plugin.file is None:
        return f"stamps are a kernel of this package: {plugin.problem}"
    own_kernels = not model.kernels.startswith("standard operators")
    return StampedSession(model_path, model.session, plugin.file, own_kernels=own_kernels)


def _options(threads: int, *, own_kernels: bool) -> Any:
    import onnxruntime

    from ultramem.export.onnx_plugin import register

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that an optimized file is for this machine alone
    if threads > 0:
        options.intra_op_num_threads = threads
    if own_kernels:
        register(options)
    return options


def modules_of_file(model_path: Path) -> dict[str, str]:
    """The module of each node by its name, from the scopes that torch.onnx wrote into the node's metadata."""
    import onnx

    found = {}
    for node in onnx.load(str(model_path), load_external_data=False).graph.node:
        scopes = {each.key: each.value for each in node.metadata_props}.get(_SCOPES)
        if scopes is not None:
            *paths, _ = ast.literal_eval(scopes)  # the last is the node's own name
            found[node.name] = module_of_stack(paths)
    return found


def node_run(
    start_ns: int, end_ns: int, run: StampedRun, nodes: Sequence[tuple[str, str, str] | None]
) -> Run:
    """The forward from `start_ns` to `end_ns`; places that are no node, but an input, are left out."""
    found = []
    for interval in run.intervals:
        named = nodes[interval.place]
        if named is None:
            continue
        name, operator, module = named
        found.append(
            NodeTime(
                node=name,
                kind=operator,
                modules=(module,),
                stages=(stage_of_module(module),),
                start_us=(interval.start_ns - start_ns - interval.stamps_before_ns) / 1e3,
                time_us=interval.time_ns / 1e3,
                span_us=interval.time_ns / 1e3,
            )
        )
    return Run((end_ns - start_ns) / 1e3, tuple(found), run.stamps_ns / 1e3)
