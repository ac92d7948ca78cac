"""A step on touched rows is the dense optimiser's, with the steps that each row missed; the rest of the table stays."""

from __future__ import annotations

import re

import pytest
import torch
import torch._dynamo.testing
from lazy_tables import (
    BETAS,
    BF16,
    DECAY,
    EPS,
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
    with_coarse_gradients,
)
from op_parity import assert_as_exact_as_eager
from torch import Tensor

from ultramem.ops import (
    Implementation,
    LazyRows,
    adagrad_rows_,
    adamw_rows_,
    catch_up_rows,
    round_stochastically,
    use_implementation,
)
from ultramem.optim.schedule import new_schedule

# (N, D, U): odd widths below, at and above a vector; one row; no row; every row; rows in several pieces.
SIZES = [(40, 37, 11), (7, 1, 3), (9, 8, 9), (30, 64, 1), (5, 3, 0), (600, 5, 500), (9, 768, 5), (6, 1100, 4)]


@pytest.mark.parametrize("rule", ["adamw", "adagrad"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_touched_rows_move_as_in_a_dense_step_and_others_stay(
    implementation: Implementation, device: torch.device, dtype: torch.dtype, size: tuple[int, int, int], rule: str
) -> None:
    skip_refused(implementation, dtype)
    table = make_table(*size, dtype, rule, device)
    with use_implementation(Implementation.ATEN):
        eager = kept(in_dtype(table, F32).updated(rule), rule)
    after, exact = table.updated(rule), oracle(table, rule)
    if dtype == F64:
        torch.testing.assert_close(kept(after, rule), exact, rtol=1e-13, atol=1e-13)
    else:
        assert_as_exact_as_eager(NAMES[rule], kept(after, rule), eager, exact)
    assert (after.lazy.last_step_N[table.rows] == STEPS + 1).all()
    others = torch.ones(size[0], dtype=torch.bool, device=device).index_fill(0, table.rows, False)
    assert all(torch.equal(a[others], b[others]) for a, b in zip(after.state(), table.state(), strict=True))


@pytest.mark.parametrize("rule", ["adamw", "adagrad"])
@pytest.mark.parametrize("d", [37, 768])
def test_bfloat16_rows_are_the_float32_rows_rounded_stochastically(
    implementation: Implementation, device: torch.device, d: int, rule: str
) -> None:
    table = with_coarse_gradients(make_table(50, d, 20, BF16, rule, device))
    exact, rounded = in_dtype(table, F32).updated(rule), table.updated(rule)
    expected = round_stochastically(exact.values[table.rows], table.rows, seed=SEED, step=STEPS + 1)
    assert torch.equal(rounded.values[table.rows], expected)
    assert not torch.equal(expected, exact.values[table.rows].bfloat16())
    for a, b in zip(rounded.state()[1:], exact.state()[1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so_in_bfloat16(
    implementation: Implementation, device: torch.device, bad: float
) -> None:
    table = make_table(3, 9, 3, BF16, "adagrad", device)
    table.values[1] = bad
    values = table.updated("adagrad").values.cpu()
    torch.testing.assert_close(values[1], torch.full((9,), bad, dtype=BF16), equal_nan=True)
    assert values[[0, 2]].isfinite().all()


@pytest.mark.parametrize("rule", ["adamw", "adagrad"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("d", [37, 1100])
def test_rows_are_read_up_to_date(
    implementation: Implementation, device: torch.device, d: int, dtype: torch.dtype, rule: str
) -> None:
    skip_refused(implementation, dtype)
    table = make_table(40, d, 11, dtype, rule, device)
    with use_implementation(Implementation.ATEN):
        eager = catch_up_rows(table.values.float(), in_dtype(table, F32).lazy, table.rows)
    read = catch_up_rows(table.values, table.lazy, table.rows)
    assert_as_exact_as_eager(["rows"], [read], [eager], oracle(table, rule, read=True)[:1])


@pytest.mark.parametrize("rule", ["adamw", "adagrad"])
def test_any_number_of_threads_gives_the_same_bits(rule: str) -> None:
    table, before = make_table(3000, 37, 1500, BF16, rule), torch.get_num_threads()
    with use_implementation(Implementation.NATIVE):
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([*table.updated(rule).state(), catch_up_rows(table.values, table.lazy, table.rows)])
    torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_opcheck(implementation: Implementation, device: torch.device) -> None:
    table, adagrad = (make_table(20, 5, 7, F32, rule, device) for rule in ("adamw", "adagrad"))
    lazy, ops = table.lazy, torch.ops.ultramem
    step = (STEPS + 1, 1e-2)
    state = (table.values, lazy.exp_avg_ND, lazy.exp_avg_sq_ND, lazy.last_step_N, lazy.schedule_S3)
    torch.library.opcheck(ops.adamw_rows_.default, (*state, table.rows, table.grads, *step, *BETAS, EPS, DECAY, 0))
    state = (adagrad.values, adagrad.row_sum, adagrad.lazy.last_step_N, adagrad.lazy.schedule_S3)
    torch.library.opcheck(ops.adagrad_rows_.default, (*state, adagrad.rows, adagrad.grads, *step, EPS, DECAY, 0))


def test_compiles_once_whatever_the_number_of_rows(implementation: Implementation, device: torch.device) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(table: Table) -> Tensor:
        options = {"step": STEPS + 1, "lr": 1e-2, "betas": BETAS, "weight_decay": DECAY}
        adamw_rows_(table.values, table.lazy, table.rows, table.grads * 2, **options)
        return table.values.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    frames = set()
    for touched in (7, 4, 19):
        one, other = (make_table(20, 5, touched, F32, device=device) for _ in range(2))
        torch.testing.assert_close(compiled(one), step(other))
        frames.add(counter.frame_count)
    assert len(frames) == 1  # the first call itself traces twice: eps is a float that becomes a constant


@pytest.mark.parametrize("rule", ["adamw", "adagrad"])
def test_gradients_in_float32_of_a_bfloat16_table(
    implementation: Implementation, device: torch.device, rule: str
) -> None:
    table = with_coarse_gradients(make_table(20, 37, 7, BF16, rule, device))
    wide = table._replace(grads=table.grads.float())
    assert all(torch.equal(a, b) for a, b in zip(table.updated(rule).state(), wide.updated(rule).state(), strict=True))
    wide = wide._replace(grads=wide.grads * (1 + 2**-12))  # which bfloat16 does not hold
    with use_implementation(Implementation.ATEN):
        exact = in_dtype(wide, F32).updated(rule)
    finer = wide.updated(rule)
    difference = (finer.values.float() - exact.values)[table.rows].abs()
    assert (difference <= exact.values[table.rows].abs() * 2**-7).all()
    for a, b in zip(kept(finer, rule)[1:], kept(exact, rule)[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_the_first_step_of_rows_that_were_never_touched(implementation: Implementation, device: torch.device) -> None:
    table = make_table(6, 20, 6, F32, device=device)
    zero = torch.zeros_like(table.values)
    first = torch.zeros(6, dtype=torch.int32, device=device)
    schedule = new_schedule(device)
    lazy = LazyRows(schedule, torch.zeros((), dtype=torch.int64, device=device), first, zero, zero.clone(), 1e-8)
    dense = table.values.clone().requires_grad_()
    dense.grad = table.grads[table.rows.argsort()].clone()
    torch.optim.AdamW([dense], lr=1e-2, betas=BETAS, eps=1e-8, weight_decay=DECAY).step()
    adamw_rows_(table.values, lazy, table.rows, table.grads, step=1, lr=1e-2, betas=BETAS, weight_decay=DECAY)
    torch.testing.assert_close(table.values, dense.detach(), rtol=1e-6, atol=1e-7)
    assert (first == 1).all()


@pytest.mark.parametrize("rule", ["adamw", "adagrad"])
def test_rows_past_two_to_the_31_elements(
    monkeypatch: pytest.MonkeyPatch, implementation: Implementation, device: torch.device, rule: str
) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    d, n = 1024, 2_200_000_000 // 1024
    near = make_table(3, d, 3, F32, rule, device)
    far_rows = torch.tensor([2**31 // d, n - 1, 5], device=device)

    def far(tensor: Tensor) -> Tensor:  # on a CPU: virtual memory, untouched but for 3 rows
        whole = torch.empty(n, *tensor.shape[1:], dtype=tensor.dtype, device=device)
        whole[far_rows] = tensor
        return whole

    moments = (m if m is None else far(m) for m in near.lazy[3:5])
    last_step = far(near.lazy.last_step_N)
    lazy = LazyRows(*near.lazy[:2], last_step, *moments, EPS)
    values, row_sum = far(near.values), far(near.row_sum)
    assert values.numel() > 2**31
    read = catch_up_rows(values, lazy, far_rows)
    assert torch.equal(read, catch_up_rows(near.values, near.lazy, torch.arange(3, device=device)))
    step = {"step": STEPS + 1, "lr": lr(STEPS + 1), "weight_decay": DECAY, "seed": SEED}
    if rule == "adamw":
        adamw_rows_(values, lazy, far_rows[near.rows], near.grads, betas=BETAS, **step)
    else:
        adagrad_rows_(values, lazy, row_sum, far_rows[near.rows], near.grads, **step)
    actual = [values, last_step, row_sum, *(m for m in lazy[3:5] if m is not None)]
    for a, b in zip(actual, near.updated(rule).state(), strict=True):
        assert torch.equal(a[far_rows], b)


def test_kernels_refuse_what_they_would_get_wrong(device: torch.device) -> None:
    pytest.importorskip("triton")
    step = {"step": STEPS + 1, "lr": 1e-2, "weight_decay": DECAY}
    with use_implementation(Implementation.TRITON):
        for rule in ("adamw", "adagrad"):
            with pytest.raises(TypeError, match=r"float64.*Implementation\.ATEN"):
                make_table(5, 3, 2, F64, rule, device).updated(rule)
        table = make_table(5, 3, 2, F64, "adagrad", device)
        with pytest.raises(TypeError, match=r"float64.*Implementation\.ATEN"):
            catch_up_rows(table.values, table.lazy, table.rows)
        table = make_table(5, 4, 2, F32, "adagrad", device)
        across = table.values.t().contiguous().t()
        with pytest.raises(ValueError, match=re.escape("values_ND must be contiguous for the Triton kernels, got")):
            adagrad_rows_(across, table.lazy, table.row_sum, table.rows, table.grads, **step)


def test_bad_arguments() -> None:
    table = make_table(6, 3, 2, F32)
    step = {"step": STEPS + 1, "lr": 1e-2, "weight_decay": DECAY}
    with pytest.raises(ValueError, match=re.escape("grads_UD must have shape (2, 3) (rows_U, then D), got (1, 3)")):
        adamw_rows_(table.values, table.lazy, table.rows, table.grads[:1], betas=BETAS, **step)
    with pytest.raises(TypeError, match=re.escape("rows_U must have dtype torch.int64, got torch.int32")):
        adamw_rows_(table.values, table.lazy, table.rows.int(), table.grads, betas=BETAS, **step)
    with pytest.raises(ValueError, match=re.escape("lazy must have moments (exp_avg_ND, exp_avg_sq_ND), got None")):
        adamw_rows_(
            table.values, make_table(6, 3, 2, F32, "adagrad").lazy, table.rows, table.grads, betas=BETAS, **step
        )
    with pytest.raises(ValueError, match=re.escape("row_sum_N must have shape (6,) (the rows of values_ND), got (2,)")):
        adagrad_rows_(table.values, table.lazy, table.row_sum[:2], table.rows, table.grads, **step)
