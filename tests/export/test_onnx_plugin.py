"""The plugin library's kernels against the ops' references, in every dtype that a node may have."""

import onnxruntime
import pytest
import torch
from one_node import assert_rounded, integers, lookup_case, model_of, run_session, tucker_case, widened

from ultramem import ops
from ultramem.export import onnx_functions, onnx_plugin
from ultramem.ops import reference
from ultramem.ops.tucker_topk import tail_length

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
TABLES = [*((dtype, dtype) for dtype in FLOATS), (torch.float16, torch.float32), (torch.bfloat16, torch.float32)]


def run(op, inputs, outputs, candidates="one_tailed", threads=1, **attributes):
    """Outputs by the plugin library. There is no body that could run in its place."""
    model = model_of(op, inputs, outputs, candidates, **attributes)
    del model.functions[:]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what a kernel refuses is raised, and need not be logged
    onnx_plugin.register(options)
    return run_session(model, inputs, options)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("dtype", "score_dtype"), TABLES)
@pytest.mark.parametrize(("blocks", "cores", "d", "k"), [(1, 1, 12, 6), (4, 2, 12, 6), (9, 3, 45, 1), (4, 2, 256, 40)])
def test_lookup_reduce(blocks, cores, d, k, dtype, score_dtype, threads):
    for tokens in (0, 1, 37):
        inputs = lookup_case(dtype, score_dtype, tokens, blocks, cores, d=d, k=k)
        wide = widened(inputs["values"]), inputs["indices"], widened(inputs["scores"])
        expected = reference.lookup_reduce(*wide, num_blocks=blocks)
        (pooled,) = run("LookupReduce", inputs, {"pooled": (dtype, 3)}, num_blocks=blocks, threads=threads)
        assert_rounded(pooled, expected, dtype)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("blocks", "cores", "d", "k"), [(1, 1, 12, 6), (9, 3, 42, 1), (4, 2, 256, 40)])
def test_lookup_reduce_quantized(blocks, cores, d, k, bits, dtype, threads):
    for tokens in (0, 1, 37):
        case = lookup_case(torch.float32, dtype, tokens, blocks, cores, d=d, k=k)
        rows, scales = ops.quantize_rows(case["values"], bits)
        inputs = {"rows": rows, "scales": scales, "indices": case["indices"], "scores": case["scores"]}
        expected = reference.lookup_reduce_quantized(
            rows, scales, case["indices"], widened(case["scores"]), num_blocks=blocks
        )
        attributes = {"num_blocks": blocks, "bits": bits}
        (pooled,) = run("LookupReduceQuantized", inputs, {"pooled": (dtype, 3)}, threads=threads, **attributes)
        assert_rounded(pooled, expected, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_lookup_dot(dtype):
    for tokens in (0, 1, 37):
        rows, query = torch.randn(25, 12, dtype=dtype), torch.randn(tokens, 12, dtype=dtype)
        indices = torch.randint(25 * 4, (tokens, 6))
        expected = reference.lookup_dot(widened(rows), indices, widened(query))
        inputs = {"rows": rows, "indices": indices, "query": query}
        (dots,) = run("LookupDot", inputs, {"dots": (dtype, 2)}, threads=3)
        assert_rounded(dots, expected, dtype)


@pytest.mark.parametrize("shape", [(-1,), (2, -1), (1, 4, -1)])
@pytest.mark.parametrize(("size", "seed"), [(8, 3), (24, 1), (36864, 0), (1_000_004, 2**62), (2**62, 5)])
def test_permute_addresses(size, seed, shape):
    addresses = torch.arange(min(size, 2000)) * max(size // 2000, 1)
    addresses[-1] = size - 1
    inputs = {"addresses": addresses.view(shape)}
    attributes = onnx_functions.permutation_attributes(size, seed)
    outputs = {"permuted": (torch.int64, len(shape))}
    (permuted,) = run("PermuteAddresses", inputs, outputs, seed=seed, threads=3, **attributes)
    assert permuted.equal(reference.permute_addresses(inputs["addresses"], size, seed))


SIZES = [(0, 1, 8, 4), (1, 1, 1, 1), (1, 2, 5, 5), (3, 2, 16, 4), (40, 2, 50, 9)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("draw", [integers, torch.randn])
@pytest.mark.parametrize(("tokens", "heads", "n", "k"), SIZES)
def test_product_topk(tokens, heads, n, k, draw, dtype):
    """Few different values: what is equal is decided as in the op, the lower address first."""
    row, col = draw(tokens, heads, n).to(dtype), draw(tokens, heads, n).to(dtype)
    expected = reference.product_topk(widened(row), widened(col), k)
    outputs = {"scores": (dtype, 3), "addresses": (torch.int64, 3)}
    scores, addresses = run("ProductTopK", {"row_scores": row, "col_scores": col}, outputs, k=k, threads=3)
    assert addresses.equal(expected.addresses)
    assert scores.to(dtype).equal(expected.scores.to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("draw", [integers, torch.randn])
@pytest.mark.parametrize("candidates", ["one_tailed", "two_tailed"])
@pytest.mark.parametrize(("rank", "cores"), [(2, 1), (3, 2)])
@pytest.mark.parametrize(("tokens", "heads", "n", "k"), SIZES)
def test_tucker_topk(tokens, heads, n, k, rank, cores, candidates, draw, dtype):
    inputs = tucker_case(dtype, tokens, heads, n, rank, cores, draw)
    expected = reference.tucker_topk(*(widened(x) for x in inputs.values()), k, candidates=candidates)
    outputs = {"scores": (dtype, 4), "addresses": (torch.int64, 3)}
    scores, addresses = run("TuckerTopK", inputs, outputs, candidates, k=k, threads=3)
    assert addresses.equal(expected.addresses)
    assert_rounded(scores, expected.scores, dtype)


def test_tails_are_as_long_as_the_ops():
    """Rows are ordered by u and the only good cells lie at the end of the tail: one row less would miss them."""
    for k in range(1, 60):
        n, s = 2 * k + 2, tail_length(k)
        row = torch.zeros(1, 1, 2, n)
        row[..., 0, :] = torch.arange(n, 0, -1.0)  # a: descending
        row[..., 1, s - 1] = 1000.0
        inputs = {
            "row_scores": row,
            "col_scores": row.clone(),
            "cores": torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]]),
            "u": torch.tensor([[1.0, 0.0]]),
            "t": torch.tensor([[1.0, 0.0]]),
        }
        outputs = {"scores": (torch.float32, 4), "addresses": (torch.int64, 3)}
        scores, addresses = run("TuckerTopK", inputs, outputs, "two_tailed", k=k)
        assert scores.max() == 1e6
        assert addresses[0, 0, 0] == (s - 1) * (n + 1)


CASE = {"values": torch.randn(9, 8), "indices": torch.randint(18, (2, 3)), "scores": torch.randn(2, 3, 2)}


def refused(op, inputs, outputs, **attributes):
    with pytest.raises(Exception, match=f"ultramem.{op}") as error:  # each of onnxruntime's classes
        run(op, inputs, {name: (torch.float32, rank) for name, rank in outputs.items()}, **attributes)
    assert "\n" not in str(error.value).strip()
    return str(error.value)


def test_what_would_read_elsewhere_is_refused():
    def lookup(num_blocks=2, **changed):
        return refused("LookupReduce", {**CASE, **changed}, {"pooled": 3}, num_blocks=num_blocks)

    assert "indices must be in [0, 18), got 18" in lookup(indices=torch.tensor([[0, 1, 2], [3, 18, 4]]))
    assert "indices must be in [0, 18), got -1" in lookup(indices=torch.tensor([[0, 1, 2], [3, -1, 4]]))
    assert "indices must be in [0, 9), got" in lookup(num_blocks=1, indices=torch.full((2, 3), 10))
    assert "indices must be in [0, 0), got 0" in lookup(values=torch.randn(0, 8), indices=torch.zeros(2, 3).long())
    assert "scores must have shape (2, 3, 2) ([T,K] of indices, then C), got (2, 4, 2)" in lookup(
        scores=torch.randn(2, 4, 2)
    )
    assert "divides the value dim 8, got 3" in lookup(scores=torch.randn(2, 3, 3))
    assert "divides the value dim 8, got 0" in lookup(scores=torch.randn(2, 3, 0))
    assert "values must have rank 2, got shape (1, 9, 8)" in lookup(values=torch.randn(1, 9, 8))
    assert "num_blocks must be at least 1, got 0" in lookup(num_blocks=0)
    assert "num_blocks times the rows must be at most 2^62" in lookup(num_blocks=2**60)


def test_quantised_rows_that_do_not_fit_are_refused():
    rows, scales = ops.quantize_rows(CASE["values"], 4)
    inputs = {"rows": rows, "scales": scales, "indices": CASE["indices"], "scores": CASE["scores"]}

    def lookup(bits=4, **changed):
        return refused("LookupReduceQuantized", {**inputs, **changed}, {"pooled": 3}, num_blocks=2, bits=bits)

    assert "bits must be 4 for rows of uint8, got 8" in lookup(bits=8)
    assert "bits must be 8 for rows of int8, got 4" in lookup(rows=rows.view(torch.int8))
    assert "scales must have shape (9) (the rows of rows), got (8)" in lookup(scales=scales[:8])
    assert "divides the value dim 8, into even parts for int4, got 8" in lookup(scores=torch.randn(2, 3, 8))
    assert "indices must be in [0, 18), got 99" in lookup(indices=torch.full((2, 3), 99))


TUCKER_OUTPUTS = {"scores": (torch.float32, 4), "addresses": (torch.int64, 3)}


def test_selections_that_do_not_fit_are_refused():
    tucker = tucker_case(torch.float32, 2, 1, 6, 2, 3, torch.randn)

    def select(k=3, **changed):
        with pytest.raises(Exception, match=r"ultramem\.TuckerTopK") as error:
            run("TuckerTopK", {**tucker, **changed}, TUCKER_OUTPUTS, k=k)
        return str(error.value)

    assert "k must be at most the 6 scores of a side, got 7" in select(k=7)
    assert "k must be at least 1, got 0" in select(k=0)
    assert "col_scores must have shape (2, 1, 2, 6)" in select(col_scores=torch.randn(2, 1, 2, 5))
    assert "cores must have shape (1, 3, 2, 2)" in select(cores=torch.randn(1, 3, 2, 3))
    assert "u must have shape (1, 2)" in select(u=torch.randn(2, 2))
    assert "t must have shape (1, 2)" in select(t=torch.randn(1, 3))


def test_an_unknown_rule_of_candidates_is_refused():
    tucker = tucker_case(torch.float32, 2, 1, 6, 2, 3, torch.randn)
    model = model_of("TuckerTopK", tucker, TUCKER_OUTPUTS, k=3)
    del model.functions[:]
    (attribute,) = [each for each in model.graph.node[0].attribute if each.name == "candidates"]
    attribute.s = b"both"
    options = onnxruntime.SessionOptions()
    onnx_plugin.register(options)
    with pytest.raises(Exception, match="candidates must be one of one_tailed, two_tailed, got 'both'"):
        run_session(model, tucker, options)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": 0}, "size must be in [1, 2^62], got 0"),
        ({"size": 17}, "sides must be 4, 4 for size 17"),
        ({"sides": [2, 12]}, "sides must be 4, 6 for size 24"),
        ({"keys": [1, 2]}, "keys must be 32 numbers, got 2"),
        ({"keys": [2**31] * 32}, "keys must be in [0, 2^31), got 2147483648"),
    ],
)
def test_an_altered_permutation_is_refused(changed, message):
    attributes = {**onnx_functions.permutation_attributes(24, 1), **changed}
    with pytest.raises(Exception, match=r"ultramem\.PermuteAddresses") as error:
        run("PermuteAddresses", {"addresses": torch.arange(16)}, {"permuted": (torch.int64, 1)}, seed=1, **attributes)
    assert message in str(error.value)


def test_an_address_outside_of_the_permutation_is_refused():
    attributes = onnx_functions.permutation_attributes(24, 1)
    with pytest.raises(Exception, match=r"addresses must be in \[0, 24\), got 24"):
        run("PermuteAddresses", {"addresses": torch.arange(25)}, {"permuted": (torch.int64, 1)}, seed=1, **attributes)


def test_rows_beyond_2_31_elements():
    """Of an int4 table of untouched virtual memory, the last row."""
    n, d = 2**23 + 3, 512
    rows = torch.zeros(0, dtype=torch.uint8).new_empty(n, d // 2)
    rows[-1] = torch.arange(d // 2)
    scales = torch.empty(n)
    scales[-1] = 0.5
    assert n * d > 2**31
    inputs = {"rows": rows, "scales": scales, "indices": torch.tensor([[n - 1]]), "scores": torch.ones(1, 1, 1)}
    expected = reference.lookup_reduce_quantized(
        rows[-1:], scales[-1:], torch.tensor([[0]]), inputs["scores"], num_blocks=1
    )
    (pooled,) = run("LookupReduceQuantized", inputs, {"pooled": (torch.float32, 3)}, num_blocks=1, bits=4)
    assert pooled.equal(expected)


def test_a_missing_library_is_an_error_that_says_how_to_build_it(monkeypatch):
    monkeypatch.setattr(onnx_plugin, "variant", lambda: "elsewhere")
    with pytest.raises(RuntimeError, match=r"build them with python -m ultramem\.ops\.native\.build"):
        onnx_plugin.register(onnxruntime.SessionOptions())
    monkeypatch.setattr(onnx_plugin, "variant", lambda: None)
    with pytest.raises(RuntimeError, match="neither AVX2 nor AVX-512"):
        onnx_plugin.register(onnxruntime.SessionOptions())


def test_a_number_of_threads_that_is_none_is_refused():
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("ultramem.intra_op_num_threads", "many")
    with pytest.raises(RuntimeError, match="must be a number of at least 1, got 'many'"):
        onnx_plugin.register(options)
