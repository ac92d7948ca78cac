from __future__ import annotations

import re

import pytest
import torch
import torch._dynamo.testing
from op_parity import as_float64, assert_as_exact_as_eager
from torch import Tensor

from ultramem.ops import Implementation, lookup_reduce_quantized, quantize_rows, reference

# (T, K, N, D, C, E): odd sizes, one of everything that may be one, more columns than registers hold.
SIZES = [(3, 9, 11, 24, 3, 4), (1, 1, 1, 2, 1, 1), (2, 17, 5, 36, 2, 9), (4, 8, 64, 256, 2, 4), (2, 5, 3, 604, 1, 2)]


def make_inputs(
    size: tuple[int, ...], dtype: torch.dtype, bits: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t, k, n, d, c, e = size
    rows, scales = quantize_rows(torch.randn(n, d, device=device), bits)
    indices = torch.randint(n * e, (t, k), device=device)
    if t and k > 1:
        indices[:, 1] = indices[:, 0]
    return rows, scales, indices, torch.randn(t, k, c, device=device).to(dtype)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_value_equals_the_oracle(
    implementation: Implementation, device: torch.device, dtype: torch.dtype, size: tuple[int, ...], bits: int
) -> None:
    rows, scales, indices, scores = make_inputs(size, dtype, bits, device)
    exact = reference.lookup_reduce_quantized(rows, scales, indices, scores.double(), num_blocks=size[-1])
    eager = reference.lookup_reduce_quantized(rows, scales, indices, scores, num_blocks=size[-1])
    actual = lookup_reduce_quantized(rows, scales, indices, scores, num_blocks=size[-1])
    # The Triton kernel adds 1.5 to every integer and takes it off the sum.
    lost_bits = 3 if implementation is Implementation.TRITON else 0
    assert_as_exact_as_eager(["pooled"], [actual], [eager], as_float64([exact]), lost_bits=lost_bits)


@pytest.mark.parametrize(("t", "k"), [(0, 5), (2, 0)])
@pytest.mark.parametrize("bits", [8, 4])
def test_nothing_to_pool(implementation: Implementation, device: torch.device, t: int, k: int, bits: int) -> None:
    pooled = lookup_reduce_quantized(*make_inputs((t, k, 7, 12, 2, 4), torch.float32, bits, device), num_blocks=4)
    assert torch.equal(pooled, torch.zeros(t, 4, 12, device=device))


@pytest.mark.parametrize("bits", [8, 4])
def test_every_integer_is_read_back(implementation: Implementation, device: torch.device, bits: int) -> None:
    largest = 2 ** (bits - 1) - 1
    values = torch.arange(-largest, largest + 2, device=device).clamp_max(largest).float()  # an even number of columns
    rows, scales = quantize_rows(values.unsqueeze(0), bits)
    first = torch.zeros(1, 1, dtype=torch.int64, device=device)
    pooled = lookup_reduce_quantized(rows, scales, first, torch.ones(1, 1, 1, device=device))
    assert torch.equal(pooled[0, 0], values)


def test_int4_lies_two_a_byte_the_even_column_low() -> None:
    rows, scales = quantize_rows(torch.tensor([[7.0, -7.0, -1.0, 2.0]]), 4)
    assert rows.tolist() == [[0x97, 0x2F]]
    assert scales.tolist() == [1.0]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rounding_is_to_the_nearest(dtype: torch.dtype, bits: int) -> None:
    values = torch.randn(9, 10).to(dtype)
    values[4] = 0  # has no largest magnitude to divide by
    rows, scales = quantize_rows(values, bits)
    ones = torch.ones(9, 1, 1)
    restored = lookup_reduce_quantized(rows, scales, torch.arange(9).unsqueeze(1), ones).squeeze(1)
    error = (restored - values.float()).abs()
    assert (error <= 0.5 * scales.unsqueeze(1) * (1 + 1e-5)).all()
    assert error.max() > 0
    assert not restored[4].any()
    assert torch.equal(restored.abs().amax(1).argsort(), values.float().abs().amax(1).argsort())


def test_float8_rows_keep_four_significant_bits(device: torch.device) -> None:
    values = torch.randn(9, 10, device=device)
    values[4] = 0
    rows, scales = quantize_rows(values, floating=True)
    assert rows.dtype == torch.float8_e4m3fn
    each = torch.arange(9, device=device).unsqueeze(1)
    restored = lookup_reduce_quantized(rows, scales, each, torch.ones(9, 1, 1, device=device)).squeeze(1)
    assert ((restored - values).abs() <= values.abs() / 16 + scales.unsqueeze(1) * 2**-10).all()
    torch.testing.assert_close(restored.abs().amax(1), values.abs().amax(1), rtol=1e-6, atol=0)  # scaled and back
    assert not restored[4].any()


def test_rows_past_two_to_the_31_elements(implementation: Implementation, device: torch.device) -> None:
    d, n = 1024, 2_300_000_000 // 1024
    rows = torch.empty(n, d, dtype=torch.int8, device=device)  # on a CPU virtual memory, unread but for 3 rows
    scales = torch.empty(n, device=device)
    far = torch.tensor([[2**31 // d, n - 1, 5]], device=device)
    small, small_scales = quantize_rows(torch.randn(3, d, device=device))
    rows[far[0]], scales[far[0]] = small, small_scales
    scores = torch.randn(1, 3, 2, device=device)
    second = torch.tensor([[0, 1, 0]], device=device)  # in the second block
    pooled = lookup_reduce_quantized(rows, scales, far + n * second, scores, num_blocks=2)
    near = torch.arange(3, device=device).unsqueeze(0) + 3 * second
    assert torch.equal(pooled, lookup_reduce_quantized(small, small_scales, near, scores, num_blocks=2))


def test_a_backward_through_it_is_refused() -> None:
    rows, scales, indices, scores = make_inputs(SIZES[0], torch.float32, 8)
    pooled = lookup_reduce_quantized(rows, scales, indices, scores.requires_grad_(), num_blocks=4)
    with pytest.raises(RuntimeError, match="lookup_reduce_quantized has no gradient"):
        pooled.sum().backward()


def test_opcheck() -> None:
    for bits in (8, 4):
        inputs = make_inputs(SIZES[0], torch.float32, bits)
        torch.library.opcheck(torch.ops.ultramem.lookup_reduce_quantized.default, (*inputs, 4))


@pytest.mark.parametrize("implementation", [Implementation.ATEN, Implementation.NATIVE], indirect=True)
def test_compiles_to_one_graph_for_any_number_of_tokens(implementation: Implementation) -> None:
    torch._dynamo.reset()

    def pool(rows: Tensor, scales: Tensor, indices: Tensor, scores: Tensor) -> Tensor:
        return lookup_reduce_quantized(rows, scales, indices, scores.sigmoid(), num_blocks=4) * 2

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pool, fullgraph=True, dynamic=True, backend=counter)
    for t in (7, 3, 9):
        inputs = make_inputs((t, 5, 6, 8, 2, 4), torch.float32, 4)
        torch.testing.assert_close(compiled(*inputs), pool(*inputs))
    assert counter.frame_count == 1


ROWS, SCALES = torch.zeros(6, 8, dtype=torch.int8), torch.ones(6)
INDICES, SCORES = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 2)
BAD = [
    ((ROWS[0], SCALES, INDICES, SCORES), ValueError, "rows_NB must have rank 2 [N,B], got shape (8,)"),
    (
        (ROWS.float(), SCALES, INDICES, SCORES),
        TypeError,
        "rows_NB must have dtype torch.int8, torch.float8_e4m3fn, or torch.uint8 (packed int4), got torch.float32",
    ),
    ((ROWS, SCALES.half(), INDICES, SCORES), TypeError, "scales_N must have dtype torch.float32, got torch.float16"),
    ((ROWS, SCALES[:5], INDICES, SCORES), ValueError, "scales_N must have shape (6,) (the rows of rows_NB), got (5,)"),
    ((ROWS, SCALES, INDICES, SCORES.double()), TypeError, "scores_TKC must have a dtype of float32, bfloat16, float16"),
    ((ROWS, SCALES, INDICES, SCORES[:1]), ValueError, "scores_TKC must have shape (2, 3, 2)"),
    ((ROWS, SCALES, INDICES, torch.zeros(2, 3, 3)), ValueError, "cores that divides the value dim 8, got 3"),
    (
        (ROWS[:, :3].view(torch.uint8), SCALES, INDICES, SCORES),
        ValueError,
        "cores that divides the value dim 6, into even parts for int4, got 2",
    ),
]


@pytest.mark.parametrize(("args", "error", "message"), BAD, ids=[case[2][:40] for case in BAD])
def test_bad_arguments(args: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        lookup_reduce_quantized(*args)


def test_bad_tables_to_quantize() -> None:
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 3"):
        quantize_rows(torch.zeros(2, 4), 3)
    with pytest.raises(ValueError, match="bits must be 8 for floating rows, got 4"):
        quantize_rows(torch.zeros(2, 4), 4, floating=True)
    with pytest.raises(ValueError, match="even number of columns for 4 bits, got 5"):
        quantize_rows(torch.zeros(2, 5), 4)
    with pytest.raises(TypeError, match="values_ND must have a dtype of float32"):
        quantize_rows(torch.zeros(2, 4, dtype=torch.int8))
