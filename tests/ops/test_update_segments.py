"""A step straight from the pooled rows' gradient is the step on the row gradients that the lookup's backward gives."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch
from lazy_tables import (
    BETAS,
    BF16,
    DECAY,
    F32,
    F64,
    NAMES,
    SEED,
    STEPS,
    Table,
    in_dtype,
    kept,
    lr,
    make_table,
    oracle,
    skip_refused,
)
from op_parity import assert_as_exact_as_eager
from torch import Tensor

from ultramem.ops import (
    Implementation,
    LazyRows,
    adagrad_segments_,
    adamw_segments_,
    permute_addresses,
    reference,
    round_stochastically,
    sort_slots,
    use_implementation,
)
from ultramem.ops.implementation import triton_is_installed

# Tokens, slots a token, cores, blocks, rows, columns: odd sizes, one slot, no slot, three cores, one block.
SIZES = [(4, 15, 2, 4, 9, 12), (1, 1, 1, 1, 3, 5), (0, 3, 1, 2, 4, 8), (3, 40, 3, 2, 50, 21), (2, 9, 4, 1, 80, 64)]
STEP = {"step": STEPS + 1, "lr": lr(STEPS + 1), "weight_decay": DECAY, "seed": SEED}


class Lookup(NamedTuple):
    """What a step is made from: a lookup and the gradient of what it pooled."""

    grad: Tensor
    indices: Tensor
    scores: Tensor


def make_case(
    size: tuple[int, ...], dtype: torch.dtype, rule: str, device: torch.device, *, coarse: bool = False
) -> tuple[Table, Lookup]:
    """A table and a lookup of which a third of the slots share a row; its touched rows, with their exact gradients."""
    t, k, c, e, n, d = size
    table = make_table(n, d, 0, dtype, rule, device)
    indices = torch.randint(n * e, (t, k))
    indices[torch.rand(t, k) < 0.3] = n * e - 1
    grad, scores = torch.randn(t, e, d), torch.randn(t, k, c)
    if coarse:  # gradients that add up to the same in any order
        grad, scores = grad.round(), (2 * scores).round() / 2
    lookup = Lookup(grad.to(device, dtype), indices.to(device), scores.to(device, dtype))
    values = table.values.double().requires_grad_()
    pooled = reference.lookup_reduce(values, lookup.indices, lookup.scores.double(), num_blocks=e)
    (exact,) = torch.autograd.grad(pooled, values, lookup.grad.double())
    rows = (lookup.indices % n).unique()
    return table._replace(rows=rows, grads=exact[rows]), lookup


def updated(table: Table, rule: str, lookup: Lookup) -> Table:
    """After step STEPS + 1 of the lookup's gradient; the table itself stays as it is."""
    moments = (m if m is None else m.clone() for m in table.lazy[3:5])
    lazy = LazyRows(*table.lazy[:2], table.lazy.last_step_N.clone(), *moments, table.lazy.eps)
    after = table._replace(values=table.values.clone(), lazy=lazy, row_sum=table.row_sum.clone())
    slots = sort_slots(lookup.indices, table.values.shape[0], num_blocks=lookup.grad.shape[1])
    if rule == "adamw":
        adamw_segments_(after.values, lazy, slots, lookup.grad, lookup.scores, betas=BETAS, **STEP)
    else:
        adagrad_segments_(after.values, lazy, after.row_sum, slots, lookup.grad, lookup.scores, **STEP)
    return after


def use_small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of few slots, so that runs cross them, and more parts of a run than are loaded at a time."""
    if triton_is_installed():
        from ultramem.ops.triton import row_gradient

        monkeypatch.setattr(row_gradient, "WINDOWS", ((0, 4),))
        monkeypatch.setattr(row_gradient, "COMBINED_WINDOWS", 2)


@pytest.mark.parametrize("rule", ["adamw", "adagrad"])
@pytest.mark.parametrize("windows", ["small windows", "windows"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_touched_rows_move_by_their_exact_gradient_and_others_stay(
    monkeypatch: pytest.MonkeyPatch,
    implementation: Implementation,
    device: torch.device,
    dtype: torch.dtype,
    size: tuple[int, ...],
    windows: str,
    rule: str,
) -> None:
    skip_refused(implementation, dtype)
    if windows == "small windows":
        use_small_windows(monkeypatch)
    table, lookup = make_case(size, dtype, rule, device)
    first, second = (updated(table, rule, lookup) for _ in range(2))
    with use_implementation(Implementation.ATEN):
        low = Lookup(lookup.grad.float(), lookup.indices, lookup.scores.float())
        eager = updated(in_dtype(table, F32), rule, low)
    assert_as_exact_as_eager(NAMES[rule], kept(first, rule), kept(eager, rule), oracle(table, rule))
    assert all(torch.equal(a, b) for a, b in zip(first.state(), second.state(), strict=True))
    assert (first.lazy.last_step_N[table.rows] == STEPS + 1).all()
    others = torch.ones(size[4], dtype=torch.bool, device=device).index_fill(0, table.rows, False)
    assert all(torch.equal(a[others], b[others]) for a, b in zip(first.state(), table.state(), strict=True))


@pytest.mark.parametrize("rule", ["adamw", "adagrad"])
def test_in_two_steps_it_is_the_same(implementation: Implementation, device: torch.device, rule: str) -> None:
    table, lookup = make_case(SIZES[0], F32, rule, device)
    rows, grads, _ = torch.ops.ultramem.lookup_reduce_backward_rows(
        lookup.grad, table.values, lookup.indices, lookup.scores, False
    )
    assert torch.equal(rows, table.rows)
    expected = table._replace(rows=rows, grads=grads).updated(rule)
    for a, b in zip(updated(table, rule, lookup).state(), expected.state(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["adamw", "adagrad"])
@pytest.mark.parametrize("wide_scores", [False, True])
def test_bfloat16_rows_are_the_float32_rows_rounded_stochastically(
    monkeypatch: pytest.MonkeyPatch, implementation: Implementation, device: torch.device, wide_scores: bool, rule: str
) -> None:
    use_small_windows(monkeypatch)
    table, lookup = make_case(SIZES[0], BF16, rule, device, coarse=True)
    wide = Lookup(lookup.grad.float(), lookup.indices, lookup.scores.float())
    if wide_scores:
        lookup = lookup._replace(scores=wide.scores)
    rounded, exact = updated(table, rule, lookup), updated(in_dtype(table, F32), rule, wide)
    expected = round_stochastically(exact.values[table.rows], table.rows, seed=SEED, step=STEPS + 1)
    assert torch.equal(rounded.values[table.rows], expected)
    for a, b in zip(rounded.state()[1:], exact.state()[1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", ["adamw", "adagrad"])
def test_rows_past_two_to_the_31_elements(
    monkeypatch: pytest.MonkeyPatch, implementation: Implementation, device: torch.device, rule: str
) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    use_small_windows(monkeypatch)
    t, k, c, e, few, d = 2, 9, 2, 2, 3, 1024
    n = 2_200_000_000 // d
    near, lookup = make_case((t, k, c, e, few, d), F32, rule, device)
    places = torch.tensor([5, 2**31 // d, n - 1], device=device)

    def far(tensor: Tensor) -> Tensor:  # on a CPU: virtual memory, untouched but for 3 rows
        whole = torch.empty(n, *tensor.shape[1:], dtype=tensor.dtype, device=device)
        whole[places] = tensor
        return whole

    moments = (m if m is None else far(m) for m in near.lazy[3:5])
    lazy = LazyRows(*near.lazy[:2], far(near.lazy.last_step_N), *moments, near.lazy.eps)
    values, row_sum = far(near.values), far(near.row_sum)
    assert values.numel() > 2**31
    slots = sort_slots(places[lookup.indices % few] + lookup.indices // few * n, n, num_blocks=e)
    if rule == "adamw":
        adamw_segments_(values, lazy, slots, lookup.grad, lookup.scores, betas=BETAS, **STEP)
    else:
        adagrad_segments_(values, lazy, row_sum, slots, lookup.grad, lookup.scores, **STEP)
    actual = [values, lazy.last_step_N, row_sum, *(m for m in lazy[3:5] if m is not None)]
    for a, b in zip(actual, updated(near, rule, lookup).state(), strict=True):
        assert torch.equal(a[places], b)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("num_rows", [7, 2**31])
def test_slots_come_in_the_order_of_their_rows(
    implementation: Implementation, device: torch.device, num_rows: int, seed: int | None
) -> None:
    addresses = torch.randint(num_rows * 3, (4, 11), device=device)
    addresses[0, :4] = addresses[3, :4]
    keys, slots = sort_slots(addresses, num_rows, num_blocks=3, permutation_seed=seed)
    indices = addresses if seed is None else permute_addresses(addresses, num_rows * 3, seed)
    order = sorted(
        range(44), key=lambda s: (int(indices.flatten()[s]) % num_rows, int(indices.flatten()[s]) // num_rows, s)
    )
    assert slots.tolist() == order
    chosen = indices.flatten()[slots]
    assert torch.equal(keys.long(), chosen % num_rows * 3 + chosen // num_rows)
    assert keys.dtype == (torch.int32 if num_rows == 7 else torch.int64)


def test_opcheck(implementation: Implementation, device: torch.device) -> None:
    ops = torch.ops.ultramem
    for rule in ("adamw", "adagrad"):
        table, lookup = make_case(SIZES[0], F32, rule, device)
        torch.library.opcheck(ops.sort_slots.default, (lookup.indices, 9, 4))
        slots = sort_slots(lookup.indices, 9, num_blocks=4)
        moments = [m for m in table.lazy[3:5] if m is not None] or [table.row_sum]
        arguments = (table.values, *moments, table.lazy.last_step_N, table.lazy.schedule_S3, *slots)
        betas = BETAS if rule == "adamw" else ()
        numbers = (STEPS + 1, 1e-2, *betas, table.lazy.eps, DECAY, SEED)
        op = getattr(ops, f"{rule}_segments_").default
        torch.library.opcheck(op, (*arguments, lookup.grad, lookup.scores, *numbers))


def test_a_whole_step_compiles(implementation: Implementation, device: torch.device) -> None:
    torch._dynamo.reset()
    table, lookup = make_case(SIZES[0], F32, "adamw", device)

    def step(values: Tensor, lazy: LazyRows, lookup: Lookup) -> None:
        slots = sort_slots(lookup.indices, values.shape[0], num_blocks=4)
        adamw_segments_(values, lazy, slots, lookup.grad, lookup.scores, betas=BETAS, **STEP)

    expected = updated(table, "adamw", lookup)
    torch.compile(step, fullgraph=True, backend="aot_eager")(table.values, table.lazy, lookup)
    for a, b in zip(table.state(), expected.state(), strict=True):
        torch.testing.assert_close(a, b)


def test_bad_arguments() -> None:
    device = torch.device("cpu")
    table, (grad, indices, scores) = make_case(SIZES[0], F32, "adagrad", device)
    slots = sort_slots(indices, 9, num_blocks=4)
    arguments = table.values, table.lazy, table.row_sum
    with pytest.raises(
        ValueError, match=re.escape("slots.keys_S must have shape (60,) (T*K of scores_TKC), got (45,)")
    ):
        adagrad_segments_(*arguments, sort_slots(indices[:3], 9, num_blocks=4), grad, scores, **STEP)
    with pytest.raises(ValueError, match=re.escape("grad_TED must have shape (4, 4, 12)")):
        adagrad_segments_(*arguments, slots, grad[:3], scores, **STEP)
    with pytest.raises(ValueError, match="number of cores that divides the value dim 12, got 0"):
        adagrad_segments_(*arguments, slots, grad, scores[:, :, :0], **STEP)
    with pytest.raises(TypeError, match=re.escape("grad_TED must have the dtype of values_ND (torch.float32)")):
        adagrad_segments_(*arguments, slots, grad.double(), scores, **STEP)
    with pytest.raises(TypeError, match=re.escape("scores_TKC must have dtype torch.float32 or that of values_ND")):
        adagrad_segments_(*arguments, slots, grad, scores.bfloat16(), **STEP)
    with pytest.raises(ValueError, match=re.escape("lazy must have moments (exp_avg_ND, exp_avg_sq_ND), got None")):
        adamw_segments_(table.values, table.lazy, slots, grad, scores, betas=BETAS, **STEP)
    with pytest.raises(ValueError, match=re.escape("num_blocks must be at least 1, got 0")):
        sort_slots(indices, 9, num_blocks=0)


def test_kernels_refuse_what_they_would_get_wrong(device: torch.device) -> None:
    if not triton_is_installed():
        pytest.skip("Triton is not installed")
    with use_implementation(Implementation.TRITON):
        for rule in ("adamw", "adagrad"):
            table, lookup = make_case(SIZES[0], F64, rule, device)
            with pytest.raises(TypeError, match=r"float64.*Implementation\.ATEN"):
                updated(table, rule, lookup)
        table, (grad, indices, scores) = make_case(SIZES[0], F32, "adagrad", device)
        across, slots = table.values.t().contiguous().t(), sort_slots(indices, 9, num_blocks=4)
        with pytest.raises(ValueError, match=re.escape("values_ND must be contiguous for the Triton kernels, got")):
            adagrad_segments_(across, table.lazy, table.row_sum, slots, grad, scores, **STEP)
