"""The node of a mixture of experts: its body against the oracle, and a model with it in stock ONNX Runtime."""

from dataclasses import replace

import onnx
import pytest
import torch
from exported import DENSE, build
from one_node import assert_rounded, feeds_of, model_of, run_session
from onnx.reference import ReferenceEvaluator

from ultramem import MoEConfig
from ultramem.export import ExportOptions, export_model, stage_of_node
from ultramem.ops import reference

EXPERTS = replace(DENSE, moe=MoEConfig(num_experts=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("ends", [(0, 0, 1), (1, 1, 1), (4, 9, 9), (0, 5, 6)])
def test_the_body_multiplies_each_experts_rows(ends, dtype):
    inputs = {
        "inputs": torch.randn(ends[-1], 6).to(dtype),
        "weights": torch.randn(3, 6, 5).to(dtype),
        "ends": torch.tensor(ends, dtype=torch.int32),
    }
    wide = reference.grouped_mm(inputs["inputs"].double(), inputs["weights"].double(), inputs["ends"])
    model = model_of("GroupedMM", inputs, {"products": (dtype, 2)})
    onnx.checker.check_model(model, full_check=True)
    (found,) = run_session(model, inputs)
    (evaluated,) = ReferenceEvaluator(model).run(None, feeds_of(inputs))
    expected = wide if dtype == torch.float64 else wide.float()
    for each in (found, torch.from_numpy(evaluated)):
        assert each.dtype == dtype
        # Half precision adds up six products before it rounds, or rounds each sum.
        if dtype == torch.float16:
            torch.testing.assert_close(each.float(), expected, rtol=6e-3, atol=6e-3)
        else:
            assert_rounded(each, expected, dtype)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_mixture_of_experts_runs_in_stock_onnx_runtime(tmp_path, dtype):
    manifest = export_model(build(EXPERTS), "onnx", tmp_path / "out", options=ExportOptions(dtype=dtype))
    assert manifest.parity.max_error <= manifest.parity.allowed
    if dtype == "fp32":
        assert manifest.parity.greedy_equal == manifest.parity.greedy_tokens == 128
    model = onnx.load(tmp_path / "out" / "model.onnx")
    nodes = [node for node in model.graph.node if node.op_type == "GroupedMM"]
    assert [stage_of_node(node.name) for node in nodes] == ["blocks.0.mlp"] * 2
    assert [function.name for function in model.functions] == ["GroupedMM"]
