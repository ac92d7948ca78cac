"""Stages and nodes of ONNX Runtime: its own profile of the nodes, whose names say which part of the model they are."""

from __future__ import annotations

import ast
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ultramem.runtime.profile.measure import Cell, Inputs
from ultramem.runtime.profile.modules import BETWEEN, module_of_path, module_of_stack, stage_of_module
from ultramem.runtime.profile.schema import DECODE, StageTimes
from ultramem.runtime.profile.stages import NodeTime, Run, summarize

METHOD = "ONNX Runtime's profile of its nodes; a norm that it fused counts with the attention or MLP behind it"
_KERNEL_SUFFIX = "_kernel_time"
_SCOPES = "pkg.torch.onnx.name_scopes"


def onnx_stages(model_path: Path, cell: Cell, inputs: Inputs, *, repeats: int) -> StageTimes:
    """Run the cell's forward on a session of its own with ONNX Runtime's profiling on."""
    import onnxruntime

    from ultramem.export.onnx_plugin import find_plugin, register
    from ultramem.export.onnx_stages import stages_of_optimized_model

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        # Fused nodes have names of their own: the graph that really runs says what they were made of.
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.log_severity_level = 3  # it warns that such a file is for this machine alone
        if not find_plugin().problem:  # the engine that is timed has it too
            register(options)
        session = onnxruntime.InferenceSession(str(model_path), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        feeds = _feeds(session, inputs.prompt_BS, {})
        if cell.phase == DECODE:
            outputs = dict(zip(names, session.run(None, feeds), strict=True))
            feeds = _feeds(session, inputs.next_B1, outputs)
        for _ in range(repeats + 1):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
        parts = stages_of_optimized_model(options.optimized_model_filepath)
    modules = {name: module_of_path(part) or BETWEEN for name, part in parts.items()}
    exact = modules_of_file(model_path)
    modules = {name: exact.get(name, module) for name, module in modules.items()}
    return summarize(cell, METHOD, node_runs(events, modules)[-repeats:])


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


def _feeds(session: Any, input_ids_BS: Tensor, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs by name after the forward that gave `outputs`; after none, an empty cache."""
    ids = input_ids_BS.cpu().numpy()
    batch, new_tokens = ids.shape
    feeds = {}
    past = 0
    for each in session.get_inputs():
        kind, dot, rest = each.name.partition(".")
        if not dot:
            continue
        present = f"present{'_conv' if kind == 'past_conv' else ''}.{rest}"
        # The free size of a cache is its number of tokens; a convolution's sizes are all fixed but the batch.
        shape = [batch, *(size if isinstance(size, int) else 0 for size in each.shape[1:])]
        feeds[each.name] = outputs.get(present, np.zeros(shape, dtype=np.float32))
        if kind == "past_key_values":
            past = feeds[each.name].shape[2]
    feeds["input_ids"] = ids
    feeds["attention_mask"] = np.ones((batch, past + new_tokens), dtype=np.int64)
    feeds["position_ids"] = np.tile(np.arange(past, past + new_tokens), (batch, 1))
    return feeds


def node_runs(events: Iterable[dict[str, Any]], modules: Mapping[str, str]) -> list[Run]:
    """Each run of the session in ONNX Runtime's profile: its wall time and its nodes.

    Nodes that `modules` lacks are those inside of a loop or branch: the node that holds them has their time.
    """
    spans: list[tuple[float, float]] = []
    found: list[tuple[float, float, str, str]] = []
    for event in events:
        if event.get("name") == "model_run":
            spans.append((event["ts"], event["dur"]))
        elif event.get("cat") == "Node" and event["name"].endswith(_KERNEL_SUFFIX):
            name = event["name"].removesuffix(_KERNEL_SUFFIX)
            if name in modules:
                found.append((event["ts"], event["dur"], name, event.get("args", {}).get("op_name", "")))
    found.sort()
    runs = []
    for start, duration in sorted(spans):
        nodes = tuple(
            NodeTime(
                node=name,
                kind=operator,
                modules=(modules[name],),
                stages=(stage_of_module(modules[name]),),
                start_us=node_start - start,
                time_us=node_us,
                span_us=node_us,
            )
            for node_start, node_us, name, operator in found
            if start <= node_start < start + duration
        )
        runs.append(Run(duration, nodes))
    return runs
