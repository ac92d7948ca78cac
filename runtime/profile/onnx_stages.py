"""Stages and nodes of ONNX Runtime: the graph that it runs, with stamps between modules and behind every node."""

from __future__ import annotations

import ast
import contextlib
import itertools
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ultramem.export.onnx_session import OnnxModel
from ultramem.runtime.profile.divided_runs import divided
from ultramem.runtime.profile.measure import Cell
from ultramem.runtime.profile.modules import BETWEEN, module_of_path, module_of_stack, stage_of_module
from ultramem.runtime.profile.onnx_stamps import DOMAIN, Interval, StampedRun, add_stamps, stamped_runs, stamps_of
from ultramem.runtime.profile.onnx_work import NO_REPACKING, onnx_work
from ultramem.runtime.profile.operator_work import Work
from ultramem.runtime.profile.schema import StageTimes
from ultramem.runtime.profile.stage_turns import NotSeparableError, stages_in_turns
from ultramem.runtime.profile.stages import NodeTime, Run

METHOD = (
    "stamps in ONNX Runtime's graph where it goes from one module to another, their measured cost taken off; a "
    "module's time is divided among its nodes as in forwards with a stamp behind every node. A node is timed with the "
    "runtime's dispatch of it, and a norm that the runtime fused counts with the attention or MLP behind it"
)
_SCOPES = "pkg.torch.onnx.name_scopes"
_WEIGHTS_OUTSIDE = {"file_name": "optimized.data", "min_size_in_bytes": "1024"}
_STAMPS_A_NODE = 8
"""Room for as many: two behind each of its outputs."""
_WARM_UP = 5


class StampedSessions:
    """Two more sessions of an engine's export: with a stamp behind every node, and with stamps between modules."""

    def __init__(self, model_path: Path, engine: OnnxModel, library: Path, cell: Cell) -> None:
        """`engine` runs `cell`, which says in what order the nodes run."""
        import onnxruntime

        from ultramem.export.onnx_stages import stages_of_optimized_model

        self._library, self._engine = library, engine
        self._threads = engine.session.get_session_options().intra_op_num_threads
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder)
        self._optimized = optimized = Path(folder) / "optimized.onnx"
        # The kernels of this package run its nodes where they do in the engine.
        self._own_kernels = not engine.kernels.startswith("standard operators")
        options = self._options(own_kernels=self._own_kernels)
        # Fused nodes have names of their own: the graph that really runs says what they were made of.
        options.optimized_model_filepath = str(optimized)
        for entry, value in _WEIGHTS_OUTSIDE.items():
            options.add_session_config_entry(f"session.optimized_model_external_initializers_{entry}", value)
        onnxruntime.InferenceSession(str(model_path), options, providers=["CPUExecutionProvider"])
        parts = stages_of_optimized_model(optimized)
        exact = modules_of_file(model_path)
        modules = {name: exact.get(name, module_of_path(part) or BETWEEN) for name, part in parts.items()}
        self._detailed, self._places = self._stamped(None)
        self.nodes = [node and (node.name, node.op_type, modules[node.name]) for node in self._places]
        """Name, operator and module of each place; none of an input."""
        ((_, _, run),) = self._stamps(self._detailed, cell, 1)
        order = [each.place for each in run.intervals if self.nodes[each.place] is not None]
        self.last_of_modules = [
            place for place, after in itertools.pairwise(order) if self._named(place)[2] != self._named(after)[2]
        ] + order[-1:]
        """Places, in the order in which they run."""
        self._coarse, _ = self._stamped(self.last_of_modules)

    def runs(self, cell: Cell, repeats: int) -> list[Run]:
        return divided(self.coarse_runs(cell, repeats), self._runs(self._detailed, cell, repeats))

    def coarse_runs(self, cell: Cell, repeats: int) -> list[Run]:
        """Nodes are the pieces of the graph between two modules."""
        runs = self._runs(self._coarse, cell, repeats)
        for run in runs:
            expected = [self._named(place)[0] for place in self.last_of_modules]
            # The first piece has no stamp before it, where it begins with no input.
            if [node.node for node in run.nodes][-len(expected) + 1 :] != expected[1:]:
                raise NotSeparableError("with stamps between the modules, the nodes run in another order")
        return runs

    def _runs(self, session: Any, cell: Cell, repeats: int) -> list[Run]:
        return [node_run(*each, self.nodes) for each in self._stamps(session, cell, repeats)]

    def _stamps(self, session: Any, cell: Cell, repeats: int) -> list[tuple[int, int, StampedRun]]:
        """Start and end of each forward, and its stamps, with `session` in the place of the engine's own."""
        walls_ns = []
        with (
            self._in_place(session),
            stamps_of(self._library, _STAMPS_A_NODE * len(self.nodes) * (repeats + _WARM_UP)) as take,
        ):
            for _ in range(_WARM_UP):
                cell.call()
            take()
            for _ in range(repeats):  # with nothing in between: threads of the runtime would go to sleep
                start_ns = time.perf_counter_ns()
                cell.call()
                walls_ns.append((start_ns, time.perf_counter_ns()))
            stamps = take()
        of_runs = [[each for each in stamps if start <= each.entered_ns <= end] for start, end in walls_ns]
        return [(*wall, run) for wall, run in zip(walls_ns, stamped_runs(of_runs), strict=True)]

    @contextlib.contextmanager
    def _in_place(self, session: Any) -> Iterator[None]:
        """The engine runs `session` in here."""
        plain, self._engine.session = self._engine.session, session
        try:
            yield
        finally:
            self._engine.session = plain

    def work(self, cell: Cell) -> dict[str, Work]:
        """Bytes and FLOPs of each node, by its name, from a forward under ONNX Runtime's profiler."""
        options = self._options(own_kernels=self._own_kernels)
        options.enable_profiling = True
        options.profile_file_prefix = str(self._optimized.with_name("work"))
        options.add_session_config_entry(*NO_REPACKING)
        session = self._session(self._optimized, options)
        with self._in_place(session):
            cell.call()
        return onnx_work(Path(session.end_profiling()), [node for node in self._places if node is not None])

    def _stamped(self, chosen: Sequence[int] | None) -> tuple[Any, list[Any]]:
        """A session of the optimized graph with stamps, and the node of each place."""
        import onnx

        model = onnx.load(str(self._optimized), load_external_data=False)
        places = add_stamps(model.graph, chosen)
        if all(each.domain != DOMAIN for each in model.opset_import):
            model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
        stamped = self._optimized.with_name("stamped.onnx")  # beside its weights
        onnx.save(model, str(stamped))
        return self._session(stamped, self._options(own_kernels=True)), places

    def _session(self, optimized: Path, options: Any) -> Any:
        import onnxruntime

        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return onnxruntime.InferenceSession(str(optimized), options, providers=["CPUExecutionProvider"])

    def _options(self, *, own_kernels: bool) -> Any:
        import onnxruntime

        from ultramem.export.onnx_plugin import register

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns that an optimized file is for this machine alone
        if self._threads > 0:
            options.intra_op_num_threads = self._threads
        if own_kernels:
            register(options)
        return options

    def _named(self, place: int) -> tuple[str, str, str]:
        named = self.nodes[place]
        assert named is not None, "an input has no time of its own"
        return named


def onnx_stages(stamped: StampedSessions, cell: Cell, *, repeats: int, device: torch.device) -> StageTimes:
    """Stages of the cell, whose engine the sessions were made for."""
    return stages_in_turns(
        cell,
        METHOD,
        lambda count: stamped.runs(cell, count),
        lambda: stamped.work(cell),
        repeats=repeats,
        device=device,
    )


def open_stamped(model_path: Path, engine: OnnxModel, cell: Cell) -> StampedSessions | str:
    """The stamped graphs of an export; or why there are none."""
    from ultramem.export.onnx_plugin import find_plugin

    plugin = find_plugin()
    if plugin.file is None:
        return f"stamps are a kernel of this package: {plugin.problem}"
    return StampedSessions(model_path, engine, plugin.file, cell)


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


def node_run(start_ns: int, end_ns: int, run: StampedRun, nodes: Sequence[tuple[str, str, str] | None]) -> Run:
    """The forward from `start_ns` to `end_ns`; what lies before the stamp of an input belongs to the node after it."""
    found = []
    begun: Interval | None = None
    waited_ns = 0.0
    for interval in run.intervals:
        begun = begun or interval
        named = nodes[interval.place]
        if named is None:
            waited_ns += interval.time_ns
            continue
        name, operator, module = named
        time_us = (interval.time_ns + waited_ns) / 1e3
        found.append(
            NodeTime(
                node=name,
                kind=operator,
                modules=(module,),
                stages=(stage_of_module(module),),
                start_us=(begun.start_ns - start_ns - begun.stamps_before_ns) / 1e3,
                time_us=time_us,
                span_us=time_us,
            )
        )
        begun, waited_ns = None, 0.0
    return Run((end_ns - start_ns) / 1e3, tuple(found), run.stamps_ns / 1e3)
