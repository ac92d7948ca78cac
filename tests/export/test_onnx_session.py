"""One file, with the plugin library and without: the same logits, the same tokens, and the kernels seen to run."""

import json
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest
import torch
from exported import CONFIG, MEMORY, build

from ultramem.export import export_model, load_artifact, onnx_plugin, onnx_session
from ultramem.export.onnx import load_onnx, register
from ultramem.export.options import ExportOptions
from ultramem.export.parity import measure_parity
from ultramem.export.program import example_inputs
from ultramem.runtime.engine import OnnxEngine

NODES = {"LookupReduce", "PermuteAddresses", "TuckerTopK"}


def assert_the_same_by_both(model, folder):
    for plugin in (False, True):
        parity = measure_parity(model, model, ExportOptions(), load_onnx(folder, plugin=plugin))
        assert parity.max_error <= parity.allowed == 4 * parity.eager_error
        assert parity.greedy_equal == parity.greedy_tokens == 128


def test_the_same_file_gives_the_same_logits_and_tokens(onnx_folder):
    assert_the_same_by_both(build(CONFIG), onnx_folder)


@pytest.mark.parametrize(
    "memory",
    [
        replace(MEMORY, candidates="two_tailed", expansion=1),
        replace(MEMORY, rank=1, num_cores=1, expert_dim=32, score_function="softmax"),
        replace(MEMORY, rank=3, rank_layout="split", key_dim=12, shared_query=False, expansion=9, permutation="none"),
    ],
    ids=["two-tailed", "peer", "split"],
)
def test_other_layers(tmp_path, memory):
    config = replace(CONFIG, memory=replace(memory, num_layers=1), num_layers=1, insertions="1:1")
    model = build(config)
    export_model(model, "onnx", tmp_path / "out")
    assert_the_same_by_both(model, tmp_path / "out")


def operators_that_ran(folder, profile, plugin):
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(profile)
    if plugin:
        register(options)
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    inputs = example_inputs(build(CONFIG))
    session.run(None, {each.name: x.numpy() for each, x in zip(session.get_inputs(), inputs, strict=True)})
    events = json.loads(Path(session.end_profiling()).read_text())
    return [
        (event["args"]["op_name"], event["args"]["provider"], event["name"])
        for event in events
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time")
    ]


def test_the_runtimes_profile_shows_the_kernels_in_place_of_the_bodies(onnx_folder, tmp_path):
    ours = operators_that_ran(onnx_folder, tmp_path / "plugin", plugin=True)
    assert {name for name, _, _ in ours} >= NODES
    for name, provider, event in ours:
        if name in NODES:
            assert provider == "CPUExecutionProvider"
            assert event.startswith(f"memories.0.{'select' if name == 'TuckerTopK' else 'lookup'}/")
    assert not [event for _, _, event in ours if "_inlfunc_" in event]

    stock = operators_that_ran(onnx_folder, tmp_path / "stock", plugin=False)
    assert not {name for name, _, _ in stock} & NODES
    assert [event for _, _, event in stock if "_inlfunc_LookupReduce" in event]
    assert len(stock) > len(ours) + 50


def test_every_thread_count_gives_the_same(onnx_folder):
    inputs = example_inputs(build(CONFIG), batch=3, seq=7, past=2)
    one, three = (load_onnx(onnx_folder, threads=threads, plugin=True)(inputs) for threads in (1, 3))
    torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-6)


def test_an_engine_says_what_runs_its_nodes(onnx_folder, monkeypatch):
    file = onnx_plugin.find_plugin().file
    assert OnnxEngine(onnx_folder).kernels == f"the kernels of {file.name}"
    assert load_artifact(onnx_folder).run.kernels == "standard operators"

    problem = "the kernels for ONNX Runtime are not built: build them"
    for module in (onnx_plugin, onnx_session):
        monkeypatch.setattr(module, "find_plugin", lambda: onnx_plugin.Plugin(None, problem))
    assert OnnxEngine(onnx_folder).kernels == f"standard operators ({problem})"
    with pytest.raises(RuntimeError, match="are not built"):
        load_onnx(onnx_folder, plugin=True)
