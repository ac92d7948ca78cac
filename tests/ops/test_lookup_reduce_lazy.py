"""The lookup that makes up stale rows as it reads them, against an oracle that brings the whole table up to date."""

from __future__ import annotations

import pytest
import torch
from op_parity import as_eager, as_float64, assert_as_exact_as_eager, value_and_gradients
from torch import Tensor

from ultramem.ops import Implementation, LazyRows, lookup_reduce, lookup_reduce_lazy, reference

NAMES = ("pooled", "grad of values", "grad of scores")
SIZES = [(3, 9, 11, 24, 3, 4), (1, 1, 1, 1, 1, 1), (2, 17, 5, 36, 4, 9)]  # T, K, N, D, C, E


def make_inputs(
    t: int, k: int, n: int, d: int, c: int, e: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values = torch.randn(n, d).to(device, dtype)
    indices = torch.randint(n * e, (t, k)).to(device)
    scores = torch.randn(t, k, c).to(device, dtype)
    return values, indices, scores, torch.randn(t, e, d).to(device, dtype)


def make_lazy(
    n: int, d: int, *, device: torch.device, moments: bool = True, dtype: torch.dtype = torch.float32
) -> LazyRows:
    """Six steps done, rows last written at each of them or never; some moments are zero."""
    schedule = torch.zeros(8, 3, dtype=torch.float64)
    schedule[:7, 0] = -torch.arange(7, dtype=torch.float64) * 0.01
    schedule[:6, 1] = torch.linspace(0.3, 0.05, 6)
    schedule[:6, 2] = torch.linspace(0.5, 0.06, 6)
    last_step = torch.arange(n, dtype=torch.int32) % 7
    exp_avg = torch.randn(n, d) * (last_step > 0).unsqueeze(1)
    exp_avg_sq = torch.rand(n, d) * (last_step > 0).unsqueeze(1)
    state = [x.to(device) for x in (schedule, torch.tensor(6), last_step)]
    pair = [x.to(device) if moments else None for x in (exp_avg, exp_avg_sq)]
    return LazyRows(*state, *pair, 1e-8)


def in_float64(lazy: LazyRows) -> LazyRows:
    return lazy._replace(exp_avg_ND=lazy.exp_avg_ND.double(), exp_avg_sq_ND=lazy.exp_avg_sq_ND.double())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_value_and_gradients_equal_the_oracle(
    implementation: Implementation, device: torch.device, dtype: torch.dtype, size: tuple[int, ...]
) -> None:
    if dtype == torch.float64 and implementation is Implementation.TRITON:
        pytest.skip("the kernels refuse float64")
    values, indices, scores, grad = make_inputs(*size, dtype=dtype, device=device)
    lazy = make_lazy(size[2], size[3], device=device)
    state = in_float64(lazy) if dtype == torch.float64 else lazy

    def oracle(moments: LazyRows):  # type: ignore[no-untyped-def]
        return lambda v, s: reference.lookup_reduce_lazy(v, moments, indices, s, num_blocks=size[-1])

    exact = value_and_gradients(oracle(in_float64(lazy)), as_float64([values, scores]), grad)
    eager = value_and_gradients(oracle(lazy), as_eager([values, scores]), grad)
    actual = value_and_gradients(
        lambda v, s: lookup_reduce_lazy(v, state, indices, s, num_blocks=size[-1]), [values, scores], grad
    )
    assert_as_exact_as_eager(NAMES, actual, eager, exact)


def test_rows_that_owe_nothing_are_read_as_they_are(implementation: Implementation, device: torch.device) -> None:
    values, indices, scores, grad = make_inputs(3, 9, 11, 24, 3, 4, dtype=torch.float32, device=device)
    lazy = make_lazy(11, 24, device=device)
    lazy.last_step_N.fill_(6)
    fresh, plain = (
        value_and_gradients(function, [values, scores], grad)
        for function in (
            lambda v, s: lookup_reduce_lazy(v, lazy, indices, s, num_blocks=4),
            lambda v, s: lookup_reduce(v, indices, s, num_blocks=4, sparse_grad=True),
        )
    )
    assert all(torch.equal(a, b) for a, b in zip(fresh, plain, strict=True))


def test_without_momentum_rows_only_decay() -> None:
    on_cpu = torch.device("cpu")  # the kernels of a GPU refuse float64
    values, indices, scores, _ = make_inputs(2, 5, 7, 8, 1, 1, dtype=torch.float64, device=on_cpu)
    lazy = make_lazy(7, 8, device=on_cpu, moments=False)
    decayed = values * torch.exp(-0.01 * (6 - lazy.last_step_N.double())).unsqueeze(1)
    pooled, expected = lookup_reduce_lazy(values, lazy, indices, scores), lookup_reduce(decayed, indices, scores)
    torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("t", "k"), [(0, 5), (2, 0)])
def test_nothing_to_pool(implementation: Implementation, device: torch.device, t: int, k: int) -> None:
    values, indices, scores, grad = make_inputs(t, k, 7, 12, 2, 4, dtype=torch.float32, device=device)
    lazy = make_lazy(7, 12, device=device)
    pooled, grad_values, grad_scores = value_and_gradients(
        lambda v, s: lookup_reduce_lazy(v, lazy, indices, s, num_blocks=4), [values, scores], grad
    )
    assert torch.equal(pooled, torch.zeros_like(pooled))
    assert pooled.shape == (t, 4, 12)
    assert not grad_values.any()
    assert grad_scores.shape == scores.shape


def test_gradient_names_each_touched_row_once_and_repeats_bitwise(device: torch.device) -> None:
    values, indices, scores, grad = make_inputs(6, 9, 20, 8, 1, 4, dtype=torch.float32, device=device)
    lazy = make_lazy(20, 8, device=device)
    values.requires_grad_()
    first, second = (
        torch.autograd.grad(lookup_reduce_lazy(values, lazy, indices, scores, num_blocks=4), values, grad)[0]
        for _ in range(2)
    )
    assert torch.equal(first._indices()[0], torch.unique(indices % 20))
    assert torch.equal(first._values(), second._values())


def test_opcheck(device: torch.device) -> None:
    values, indices, scores, _ = make_inputs(3, 5, 6, 8, 2, 4, dtype=torch.float32, device=device)
    for moments in (False, True):
        lazy = make_lazy(6, 8, device=device, moments=moments)
        torch.library.opcheck(
            torch.ops.ultramem.lookup_reduce_lazy.default,
            (values.requires_grad_(), indices, scores.requires_grad_(), 4, *lazy),
            # Tracing the gradient by hand, as the last utility does, does not know sparse outputs.
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_moments_of_another_table_are_refused() -> None:
    values, indices, scores, _ = make_inputs(3, 5, 6, 8, 2, 4, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"lazy.last_step_N must have shape \(6,\)"):
        lookup_reduce_lazy(values, make_lazy(7, 8, device=values.device), indices, scores, num_blocks=4)
    with pytest.raises(ValueError, match=r"lazy.exp_avg_ND must have shape \(6, 8\)"):
        lookup_reduce_lazy(values, make_lazy(6, 4, device=values.device), indices, scores, num_blocks=4)
