"""Function bodies of the ONNX nodes against the ops' references, by ONNX Runtime and by onnx's own evaluator."""

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from ultramem import ops
from ultramem.export import onnx_functions
from ultramem.export.extras import quiet_exporters
from ultramem.export.onnx_stages import _INLINED, _STAGE_OF_OP
from ultramem.ops import reference

DTYPES = {torch.float32: TensorProto.FLOAT, torch.float64: TensorProto.DOUBLE, torch.int64: TensorProto.INT64}


def evaluate(op, inputs, outputs, candidates="one_tailed", **attributes):
    """Outputs of a model of one node, by each evaluator."""
    if op == "TuckerTopK":
        attributes["candidates"] = candidates
    node = helper.make_node(
        op,
        list(inputs),
        list(outputs),
        domain="ultramem",
        plugin_namespace="ultramem",
        plugin_version="1",
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info(name, DTYPES[x.dtype], [None] * x.ndim) for name, x in inputs.items()],
        [helper.make_tensor_value_info(name, DTYPES[dtype], [None] * rank) for name, (dtype, rank) in outputs.items()],
    )
    model = helper.make_model(
        graph,
        functions=[onnx_functions.function_protos(candidates)[op]],
        opset_imports=[helper.make_opsetid("", onnx_functions.OPSET), helper.make_opsetid("ultramem", 1)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    feeds = {name: x.numpy() for name, x in inputs.items()}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    results = session.run(None, feeds), ReferenceEvaluator(model).run(None, feeds)
    return [tuple(torch.from_numpy(each) for each in result) for result in results]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lookup_dot(dtype):
    for tokens in (1, 5):
        rows, query = torch.randn(25, 12, dtype=dtype), torch.randn(tokens, 12, dtype=dtype)
        indices = torch.randint(25 * 4, (tokens, 6))  # of a virtual table of four blocks
        expected = reference.lookup_dot(rows, indices, query)
        inputs = {"rows": rows, "indices": indices, "query": query}
        for (dots,) in evaluate("LookupDot", inputs, {"dots": (dtype, 2)}):
            torch.testing.assert_close(dots, expected)


# Rows of a lazy optimiser and their updates belong to training; models with experts are refused by the exporters, and
# no exporter quantises a table yet.
NOT_EXPORTED = {
    "lookup_reduce_lazy",
    "lookup_dot_lazy",
    "round_stochastically",
    "grouped_mm",
    "adamw_rows_",
    "adagrad_rows_",
    "adamw_segments_",
    "adagrad_segments_",
    "sort_slots",
    "lookup_reduce_quantized",
}


def test_every_exported_op_has_a_translation_and_a_body():
    with onnx_functions.schemas():
        translated = set(onnx_functions.translations())
    forwards = {each for each in ops.__all__ if hasattr(torch.ops.ultramem, each)} - NOT_EXPORTED
    assert translated == {getattr(torch.ops.ultramem, name).default for name in forwards}
    assert {name.replace("_", "") for name in forwards} == {name.lower() for name in onnx_functions.function_protos()}
    assert set(_STAGE_OF_OP) == set(onnx_functions.function_protos())
    assert all(_INLINED.match(f"_inlfunc_{name}_Mod") for name in _STAGE_OF_OP)


def test_torch_onnx_translates_lookup_dot():
    class Dots(torch.nn.Module):
        def forward(self, rows, indices, query):
            return ops.lookup_dot(rows, indices, query)

    inputs = torch.randn(9, 8), torch.randint(9, (4, 3)), torch.randn(4, 8)
    with quiet_exporters(), onnx_functions.schemas():
        table = onnx_functions.translations()
        exported = torch.onnx.export(Dots().eval(), inputs, dynamo=True, verbose=False, custom_translation_table=table)
    (node,) = exported.model.graph
    assert (node.domain, node.op_type, len(node.inputs)) == ("ultramem", "LookupDot", 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cores", [1, 2, 3, 4])
@pytest.mark.parametrize("blocks", [1, 4, 9])
def test_lookup_reduce(blocks, cores, dtype):
    for tokens in (1, 5):
        values = torch.randn(25, 12, dtype=dtype)
        indices = torch.randint(25 * blocks, (tokens, 6))
        indices[:, 1] = indices[:, 0]  # a row that is met twice
        scores = torch.randn(tokens, 6, cores, dtype=dtype)
        expected = reference.lookup_reduce(values, indices, scores, num_blocks=blocks)
        inputs = {"values": values, "indices": indices, "scores": scores}
        for (pooled,) in evaluate("LookupReduce", inputs, {"pooled": (dtype, 3)}, num_blocks=blocks):
            torch.testing.assert_close(pooled, expected)


@pytest.mark.parametrize(("size", "seed"), [(1, 0), (2, 3), (7, 1), (36864, 0), (1_000_003, 2**62), (2**62, 5)])
def test_permute_addresses(size, seed):
    addresses = (torch.arange(500) * (size // 500) if size > 500 else torch.arange(size)).view(1, -1)
    addresses[0, -1] = size - 1
    attributes = onnx_functions.permutation_attributes(size, seed)
    expected = reference.permute_addresses(addresses, size, seed)
    outputs = {"permuted": (torch.int64, 2)}
    for (permuted,) in evaluate("PermuteAddresses", {"addresses": addresses}, outputs, seed=seed, **attributes):
        assert permuted.equal(expected)


def integers(*shape):
    """Few different values, so that there are many ties; sums of their products are exact."""
    return torch.randint(-2, 3, shape).float()


SIZES = [(1, 1, 1, 1), (1, 2, 5, 5), (3, 2, 16, 4), (2, 1, 6, 4)]
TOPK = {"scores": (torch.float32, 3), "addresses": (torch.int64, 3)}


@pytest.mark.parametrize("draw", [integers, torch.randn])
@pytest.mark.parametrize(("tokens", "heads", "n", "k"), SIZES)
def test_product_topk(tokens, heads, n, k, draw):
    row, col = draw(tokens, heads, n), draw(tokens, heads, n)
    expected = reference.product_topk(row, col, k)
    for scores, addresses in evaluate("ProductTopK", {"row_scores": row, "col_scores": col}, TOPK, k=k):
        assert addresses.equal(expected.addresses)
        assert scores.equal(expected.scores)


@pytest.mark.parametrize("draw", [integers, torch.randn])
@pytest.mark.parametrize("candidates", ["one_tailed", "two_tailed"])
@pytest.mark.parametrize(("rank", "cores"), [(2, 1), (3, 2), (2, 4)])
@pytest.mark.parametrize(("tokens", "heads", "n", "k"), SIZES)
def test_tucker_topk(tokens, heads, n, k, rank, cores, candidates, draw):
    inputs = {
        "row_scores": draw(tokens, heads, rank, n),
        "col_scores": draw(tokens, heads, rank, n),
        "cores": draw(heads, cores, rank, rank),
        "u": draw(heads, rank),
        "t": draw(heads, rank),
    }
    expected = reference.tucker_topk(*inputs.values(), k, candidates=candidates)
    outputs = {**TOPK, "scores": (torch.float32, 4)}
    for scores, addresses in evaluate("TuckerTopK", inputs, outputs, candidates, k=k):
        assert addresses.equal(expected.addresses)
        torch.testing.assert_close(scores, expected.scores)
