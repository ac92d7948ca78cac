"""Exports that choose candidates by coarse keys compute what eager does, and read fewer keys."""

import pytest
import torch
from exported import CONFIG, DENSE, build
from torch._inductor import config as inductor

from ultramem.export import ExportOptions, export_model
from ultramem.export.aot_inductor import lowered_programs
from ultramem.export.coarse_keys import with_coarse_keys
from ultramem.export.onnx_session import load_onnx
from ultramem.export.program import empty_state, flat_inputs, weights
from ultramem.graph import coarse_keys
from ultramem.runtime.engine import EagerEngine, open_engine
from ultramem.runtime.generate import Generator, Request

REQUESTS = [Request(prompt=prompt, max_new_tokens=16) for prompt in ((3,), (1, 2, 3, 4, 5), (9,) * 17, (60, 2, 31))]


def has_coarse_keys(model):
    return any(isinstance(module, coarse_keys.CoarseScore) for module in model.modules())


def tokens_of(engine):
    return [each.tokens for each in Generator(engine, max_batch=3).complete(REQUESTS)]


def test_an_onnx_file_with_coarse_keys(tmp_path):
    import onnx

    model = build(CONFIG)
    manifest = export_model(model, "onnx", tmp_path / "out", options=ExportOptions(coarse_keys=True))
    assert manifest.parity.greedy_equal == manifest.parity.greedy_tokens == 128
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    selecting = {node.op_type for node in graph.node if node.name.startswith("memories.0.select/")}
    assert {"ProductTopK", "LookupDot", "TuckerTopK"} <= selecting
    assert not any(node.op_type == "Einsum" for node in graph.node)
    inputs = flat_inputs(torch.randint(64, (3, 7)), torch.ones(3, 7, dtype=torch.int64), empty_state(CONFIG, 3))
    with torch.no_grad():
        expected = model(inputs[0]).logits
    for plugin in (True, False):
        logits, *_ = load_onnx(tmp_path / "out", plugin=plugin)(inputs)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert tokens_of(open_engine("onnx", None, tmp_path / "out")) == tokens_of(EagerEngine(model))


@pytest.mark.slow
def test_a_package_with_coarse_keys(tmp_path):
    model = build(CONFIG)
    with inductor.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        manifest = export_model(model, "aoti", tmp_path / "out", options=ExportOptions(coarse_keys=True))
    assert manifest.parity.greedy_equal == manifest.parity.greedy_tokens == 128
    assert tokens_of(open_engine("aoti", None, tmp_path / "out")) == tokens_of(EagerEngine(model))


def test_of_rounded_weights_and_rows(tmp_path):
    """Parity is within the bound of any export, or there would be none."""
    options = ExportOptions(dtype="fp16", table="int8", coarse_keys=True, decode=True)
    manifest = export_model(build(CONFIG), "onnx", tmp_path / "out", options=options)
    assert manifest.options == options
    assert 0 < manifest.parity.mean_error <= manifest.parity.allowed_mean


def test_by_itself_only_graphs_of_one_token_with_large_keys_have_them(monkeypatch):
    model = build(CONFIG)
    assert with_coarse_keys(model, ExportOptions(), seq=1) is model
    monkeypatch.setattr(coarse_keys, "LARGE_KEYS_BYTES", model.memories[0].score.keys_H2RNK.nbytes)
    assert has_coarse_keys(with_coarse_keys(model, ExportOptions(), seq=1))
    for seq in (None, 2):
        assert with_coarse_keys(model, ExportOptions(), seq=seq) is model
        assert has_coarse_keys(with_coarse_keys(model, ExportOptions(coarse_keys=True), seq=seq))
    assert with_coarse_keys(model, ExportOptions(coarse_keys=False), seq=1) is model
    assert with_coarse_keys(model, ExportOptions(device="cuda"), seq=1) is model
    assert with_coarse_keys(dense := build(DENSE), ExportOptions(coarse_keys=True), seq=1) is dense
    programs = lowered_programs(model, ExportOptions(decode=True))
    coarse = {name: any("coarse" in each for each in weights(program.exported)) for name, program in programs.items()}
    assert coarse == {"model": False, "decode": True}


def test_a_step_reads_coarse_keys_and_those_of_candidates(monkeypatch):
    """The keys of all ranks are read by number alone."""
    model = build(CONFIG)
    programs = lowered_programs(model, ExportOptions(coarse_keys=True))
    graph = programs["model"].exported.graph
    (keys,) = [node for node in graph.nodes if node.op == "placeholder" and "keys_bk" in node.name]
    targets = {str(user.target) for user in keys.users}
    assert targets == {"aten._embedding_bag_per_sample_weights_backward.default"}
