"""Function bodies of the ONNX nodes against the ops' references, by ONNX Runtime and by onnx's own evaluator."""

import onnx
import pytest
import torch
from one_node import (
    assert_rounded,
    feeds_of,
    integers,
    lookup_case,
    model_of,
    run_session,
    tucker_case,
    widened,
)
from onnx.reference import ReferenceEvaluator

from ultramem import ops
from ultramem.export import onnx_functions
from ultramem.export.extras import quiet_exporters
from ultramem.export.onnx_stages import _INLINED, _STAGE_OF_OP
from ultramem.ops import reference

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def evaluate(op, inputs, outputs, candidates="one_tailed", **attributes):
    """Outputs of a model of one node, by each evaluator."""
    model = model_of(op, inputs, outputs, candidates, **attributes)
    onnx.checker.check_model(model, full_check=True)
    yield run_session(model, inputs)
    yield tuple(torch.from_numpy(each) for each in ReferenceEvaluator(model).run(None, feeds_of(inputs)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_lookup_dot(tokens, dtype):
    rows, query = torch.randn(25, 12, dtype=dtype), torch.randn(tokens, 12, dtype=dtype)
    indices = torch.randint(25 * 4, (tokens, 6))  # of a virtual table of four blocks
    expected = reference.lookup_dot(widened(rows), indices, widened(query))
    inputs = {"rows": rows, "indices": indices, "query": query}
    for (dots,) in evaluate("LookupDot", inputs, {"dots": (dtype, 2)}):
        assert_rounded(dots, expected, dtype)


# Rows of a lazy optimiser and their updates belong to training, as routes between ranks do, whose exports need none;
# models with experts are refused by the exporters.
NOT_EXPORTED = {
    "lookup_reduce_lazy",
    "lookup_dot_lazy",
    "round_stochastically",
    "adamw_rows_",
    "adagrad_rows_",
    "adamw_segments_",
    "adagrad_segments_",
    "sort_slots",
    "route_rows",
    "route_own",
}


def test_every_exported_op_has_a_translation_and_a_body():
    with onnx_functions.schemas():
        translated = set(onnx_functions.translations())
    forwards = {each for each in ops.__all__ if hasattr(torch.ops.ultramem, each)} - NOT_EXPORTED
    assert translated == {getattr(torch.ops.ultramem, name).default for name in forwards} | {torch.ops.aten.sort.stable}
    assert {name.replace("_", "") for name in forwards} == {name.lower() for name in onnx_functions.function_protos()}
    # Experts stand in the place of an MLP: their stage is their neighbours'.
    assert set(_STAGE_OF_OP) == set(onnx_functions.function_protos()) - {"GroupedMM"}
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


class Quantized(torch.nn.Module):
    def forward(self, rows, scales, indices, scores):
        return ops.lookup_reduce_quantized(rows, scales, indices, scores, num_blocks=2, permutation_seed=3)


@pytest.mark.parametrize("bits", [8, 4])
def test_torch_onnx_translates_quantized_rows(bits):
    table = ops.quantize_rows(torch.randn(9, 8), bits)
    inputs = *table, torch.randint(18, (4, 3)), torch.randn(4, 3, 2)
    with quiet_exporters(), onnx_functions.schemas():
        translations = onnx_functions.translations()
        exported = torch.onnx.export(
            Quantized().eval(), inputs, dynamo=True, verbose=False, custom_translation_table=translations
        )
    permute, lookup = exported.model.graph
    assert (permute.op_type, permute.attributes["size"].value) == ("PermuteAddresses", 18)
    assert (lookup.domain, lookup.op_type) == ("ultramem", "LookupReduceQuantized")
    assert {name: lookup.attributes[name].value for name in ("num_blocks", "bits")} == {"num_blocks": 2, "bits": bits}


def test_float8_rows_have_no_node():
    table = ops.quantize_rows(torch.randn(9, 8), floating=True)
    inputs = *table, torch.randint(18, (4, 3)), torch.randn(4, 3, 2)
    with quiet_exporters(), onnx_functions.schemas():
        translations = onnx_functions.translations()
        with pytest.raises(torch.onnx.OnnxExporterError) as error:
            torch.onnx.export(
                Quantized().eval(), inputs, dynamo=True, verbose=False, custom_translation_table=translations
            )
    first = error.value
    while first.__cause__ is not None:
        first = first.__cause__
    assert str(first).startswith("rows of FLOAT8E4M3FN have no ONNX node")


# The dtypes of a table and of its scores: a narrow table does not narrow float32 scores.
TABLES = [*((dtype, dtype) for dtype in FLOATS), (torch.float16, torch.float32), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize(("dtype", "score_dtype"), TABLES)
@pytest.mark.parametrize("cores", [1, 2, 3, 4])
@pytest.mark.parametrize("blocks", [1, 4, 9])
def test_lookup_reduce(blocks, cores, dtype, score_dtype):
    for tokens in (1, 5):
        inputs = lookup_case(dtype, score_dtype, tokens, blocks, cores)
        wide = widened(inputs["values"]), inputs["indices"], widened(inputs["scores"])
        expected = reference.lookup_reduce(*wide, num_blocks=blocks)
        for (pooled,) in evaluate("LookupReduce", inputs, {"pooled": (dtype, 3)}, num_blocks=blocks):
            assert_rounded(pooled, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("blocks", "cores"), [(1, 1), (4, 2), (9, 3)])
def test_lookup_reduce_quantized(blocks, cores, bits, dtype):
    for tokens in (1, 5):
        case = lookup_case(torch.float32, dtype, tokens, blocks, cores)
        rows, scales = ops.quantize_rows(case["values"], bits)
        expected = reference.lookup_reduce_quantized(
            rows, scales, case["indices"], widened(case["scores"]), num_blocks=blocks
        )
        inputs = {"rows": rows, "scales": scales, "indices": case["indices"], "scores": case["scores"]}
        outputs = {"pooled": (dtype, 3)}
        for (pooled,) in evaluate("LookupReduceQuantized", inputs, outputs, num_blocks=blocks, bits=bits):
            assert_rounded(pooled, expected, dtype)


def test_every_int4_number_is_itself():
    rows = torch.arange(256, dtype=torch.uint8).view(1, 256)
    inputs = {"rows": rows, "scales": torch.ones(1), "indices": torch.zeros(1, 1).long(), "scores": torch.ones(1, 1, 1)}
    expected = reference.lookup_reduce_quantized(*inputs.values())
    for (pooled,) in evaluate("LookupReduceQuantized", inputs, {"pooled": (torch.float32, 3)}, num_blocks=1, bits=4):
        assert pooled.equal(expected)


@pytest.mark.parametrize(("size", "seed"), [(1, 0), (2, 3), (7, 1), (36864, 0), (1_000_003, 2**62), (2**62, 5)])
def test_permute_addresses(size, seed):
    addresses = (torch.arange(500) * (size // 500) if size > 500 else torch.arange(size)).view(1, -1)
    addresses[0, -1] = size - 1
    attributes = onnx_functions.permutation_attributes(size, seed)
    expected = reference.permute_addresses(addresses, size, seed)
    outputs = {"permuted": (torch.int64, 2)}
    for (permuted,) in evaluate("PermuteAddresses", {"addresses": addresses}, outputs, seed=seed, **attributes):
        assert permuted.equal(expected)


SIZES = [(1, 1, 1, 1), (1, 2, 5, 5), (3, 2, 16, 4), (2, 1, 6, 4)]
TOPK_DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", TOPK_DTYPES)
@pytest.mark.parametrize("draw", [integers, torch.randn])
@pytest.mark.parametrize(("tokens", "heads", "n", "k"), SIZES)
def test_product_topk(tokens, heads, n, k, draw, dtype):
    row, col = draw(tokens, heads, n).to(dtype), draw(tokens, heads, n).to(dtype)
    expected = reference.product_topk(row.float(), col.float(), k)
    outputs = {"scores": (dtype, 3), "addresses": (torch.int64, 3)}
    for scores, addresses in evaluate("ProductTopK", {"row_scores": row, "col_scores": col}, outputs, k=k):
        assert addresses.equal(expected.addresses)
        assert scores.float().equal(expected.scores.to(dtype).float())


@pytest.mark.parametrize("dtype", TOPK_DTYPES)
@pytest.mark.parametrize("draw", [integers, torch.randn])
@pytest.mark.parametrize("candidates", ["one_tailed", "two_tailed"])
@pytest.mark.parametrize(("rank", "cores"), [(2, 1), (3, 2), (2, 4)])
@pytest.mark.parametrize(("tokens", "heads", "n", "k"), SIZES)
def test_tucker_topk(tokens, heads, n, k, rank, cores, candidates, draw, dtype):
    inputs = tucker_case(dtype, tokens, heads, n, rank, cores, draw)
    expected = reference.tucker_topk(*(widened(x) for x in inputs.values()), k, candidates=candidates)
    outputs = {"scores": (dtype, 4), "addresses": (torch.int64, 3)}
    for scores, addresses in evaluate("TuckerTopK", inputs, outputs, candidates, k=k):
        assert addresses.equal(expected.addresses)
        assert_rounded(scores, expected.scores, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_onnx_keeps_weights_of_a_half_precision_selection_wide(dtype):
    class Select(torch.nn.Module):
        def forward(self, row, col, cores, u, t):
            return ops.tucker_topk(row, col, cores, u, t, 3)

    inputs = tucker_case(dtype, 2, 1, 6, 2, 2, torch.randn)
    inputs["cores"] = inputs["cores"].to(dtype)
    with quiet_exporters(), onnx_functions.schemas():
        translations = onnx_functions.translations()
        exported = torch.onnx.export(
            Select().eval(), tuple(inputs.values()), dynamo=True, verbose=False, custom_translation_table=translations
        )
    cast, node = exported.model.graph
    assert [each.op_type for each in (cast, node)] == ["Cast", "TuckerTopK"]
    assert [each.dtype.name for each in node.inputs[2:]] == ["FLOAT"] * 3
