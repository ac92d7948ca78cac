"""The C++ lookups where they differ from the others: threads, long rows of slots, sorting by digits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from op_parity import as_float64, assert_as_exact_as_eager, value_and_gradients
from torch import Tensor

from ultramem.ops import (
    Implementation,
    lookup_dot,
    lookup_reduce,
    lookup_reduce_quantized,
    quantize_rows,
    reference,
    use_implementation,
)

# Enough slots to be sorted by digits, 30 % of them of one row.
TOKENS, SLOTS, ROWS, COLUMNS, CORES, BLOCKS = 150, 60, 5000, 40, 2, 4


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    threads = torch.get_num_threads()
    with use_implementation(Implementation.NATIVE):
        yield
    torch.set_num_threads(threads)


def make_inputs(tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    indices = torch.randint(ROWS * BLOCKS, (tokens, SLOTS))
    hot = torch.rand(tokens, SLOTS) < 0.3
    indices[hot] = 17 + indices[hot] % BLOCKS * ROWS
    grad = torch.randn(tokens, BLOCKS, COLUMNS)
    return torch.randn(ROWS, COLUMNS), indices, torch.randn(tokens, SLOTS, CORES), grad


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_a_hot_row_among_many(sparse_grad: bool) -> None:
    values, indices, scores, grad = make_inputs()

    def oracle(v: Tensor, s: Tensor) -> Tensor:
        return reference.lookup_reduce(v, indices, s, num_blocks=BLOCKS)

    exact = value_and_gradients(oracle, as_float64([values, scores]), grad)
    eager = value_and_gradients(oracle, [values, scores], grad)
    actual = value_and_gradients(
        lambda v, s: lookup_reduce(v, indices, s, num_blocks=BLOCKS, sparse_grad=sparse_grad), [values, scores], grad
    )
    assert_as_exact_as_eager(("pooled", "grad of values", "grad of scores"), actual, eager, exact)


def reduce(sparse_grad: bool) -> Callable[[int], tuple[Tensor, ...]]:
    def run(tokens: int) -> tuple[Tensor, ...]:
        values, indices, scores, grad = make_inputs(tokens)
        return value_and_gradients(
            lambda v, s: lookup_reduce(v, indices, s, num_blocks=BLOCKS, sparse_grad=sparse_grad),
            [values, scores],
            grad,
        )

    return run


def frozen(tokens: int) -> tuple[Tensor, ...]:
    values, indices, scores, grad = make_inputs(tokens)
    return value_and_gradients(lambda s: lookup_reduce(values, indices, s, num_blocks=BLOCKS), [scores], grad)


def dots(tokens: int) -> tuple[Tensor, ...]:
    values, indices, _, grad = make_inputs(tokens)
    return value_and_gradients(
        lambda v, q: lookup_dot(v, indices, q, sparse_grad=True), [values, grad[:, 0]], torch.randn(tokens, SLOTS)
    )


def quantized(tokens: int) -> tuple[Tensor, ...]:
    values, indices, scores, _ = make_inputs(tokens)
    return tuple(
        lookup_reduce_quantized(*quantize_rows(values, bits), indices, scores, num_blocks=BLOCKS) for bits in (8, 4)
    )


@pytest.mark.parametrize("tokens", [1, 2, 3, TOKENS])
@pytest.mark.parametrize("run", [reduce(False), reduce(True), frozen, dots, quantized])
def test_any_number_of_threads_gives_the_same_bits(run: Callable[[int], tuple[Tensor, ...]], tokens: int) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        results.append(run(tokens))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    ops = torch.ops.ultramem_native
    values, indices, scores, grad = (x.to(dtype) if x.is_floating_point() else x for x in make_inputs(2))
    for args in ((values, indices, scores, BLOCKS, ()), (values, indices, scores.float(), BLOCKS, ())):
        torch.library.opcheck(ops.lookup_reduce.default, args)
    torch.library.opcheck(ops.lookup_dot.default, (values, indices, grad[:, 0].contiguous()))


@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan"), 65504.0, 1e-7, 6e-8, 3e38, 1e-40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_dtypes_are_widened_and_rounded_as_pytorch_does(dtype: torch.dtype, special: float) -> None:
    values = torch.full((1, 21), special).to(dtype)  # a whole vector and a part of one
    for weight in (1.0, 1.001, -0.75):
        pooled = lookup_reduce(values, torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1, 1), weight))
        torch.testing.assert_close(pooled[0], (values.float() * weight).to(dtype), rtol=0, atol=0, equal_nan=True)
