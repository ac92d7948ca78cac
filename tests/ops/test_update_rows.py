"""A step on touched rows is the dense optimiser's, with the steps that each row missed; the rest of the table stays."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch
import torch._dynamo.testing
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
from ultramem.optim.schedule import advance_, new_schedule

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
NAMES = {"adamw": ("values", "exp_avg", "exp_avg_sq"), "adagrad": ("values", "row_sum")}
STEPS, BETAS, DECAY, EPS = 12, (0.9, 0.95), 0.1, 1e-18


def lr(step: int) -> float:
    return 1e-2 * (1 + step % 3)


class Table(NamedTuple):
    """A table [N,D] whose rows were last touched at steps of their own, and its optimiser's state, after STEPS."""

    values: Tensor
    lazy: LazyRows
    row_sum: Tensor
    rows: Tensor
    grads: Tensor

    def state(self) -> list[Tensor]:
        moments = [m for m in (self.lazy.exp_avg_ND, self.lazy.exp_avg_sq_ND) if m is not None]
        return [self.values, self.lazy.last_step_N, self.row_sum, *moments]

    def updated(self, rule: str) -> Table:
        """After step STEPS + 1; this one stays as it is."""
        moments = (m if m is None else m.clone() for m in (self.lazy.exp_avg_ND, self.lazy.exp_avg_sq_ND))
        lazy = LazyRows(self.lazy.schedule_S3, self.lazy.step, self.lazy.last_step_N.clone(), *moments, EPS)
        table = Table(self.values.clone(), lazy, self.row_sum.clone(), self.rows, self.grads)
        step = {"step": STEPS + 1, "lr": lr(STEPS + 1), "weight_decay": DECAY, "seed": 5}
        if rule == "adamw":
            adamw_rows_(table.values, lazy, table.rows, table.grads, betas=BETAS, **step)
        else:
            adagrad_rows_(table.values, lazy, table.row_sum, table.rows, table.grads, **step)
        return table


def make_table(n: int, d: int, touched: int, dtype: torch.dtype, rule: str = "adamw") -> Table:
    torch.manual_seed(0)
    schedule = new_schedule(torch.device("cpu"))
    for step in range(1, STEPS + 1):
        advance_(schedule, step, lr=lr(step), weight_decay=DECAY, betas=BETAS if rule == "adamw" else None)
    wide = torch.promote_types(dtype, F32)
    last_step = torch.randint(0, STEPS + 1, (n,), dtype=torch.int32)
    values, moment, square, grads = (
        torch.randn(n, d),
        torch.randn(n, d),
        torch.rand(n, d) + 0.1,
        torch.randn(touched, d),
    )
    moments = (moment.to(wide), square.to(wide)) if rule == "adamw" else (None, None)
    lazy = LazyRows(schedule, torch.tensor(STEPS), last_step, *moments, EPS)
    rows = torch.randperm(n)[:touched].sort().values
    return Table(values.to(dtype), lazy, torch.rand(n).to(wide), rows, grads.to(dtype))


def in_dtype(table: Table, dtype: torch.dtype) -> Table:
    moments = (m if m is None else m.to(dtype) for m in (table.lazy.exp_avg_ND, table.lazy.exp_avg_sq_ND))
    lazy = LazyRows(*table.lazy[:3], *moments, EPS)
    return Table(table.values.to(dtype), lazy, table.row_sum.to(dtype), table.rows, table.grads.to(dtype))


def oracle(table: Table, rule: str, *, read: bool = False) -> list[Tensor]:
    """The touched rows in float64, step by step from the last that touched them: values and what the rule keeps."""
    rows = in_dtype(table, F64)
    values = rows.values[table.rows]
    if rule == "adamw":
        m, v = rows.lazy.exp_avg_ND[table.rows], rows.lazy.exp_avg_sq_ND[table.rows]
    sums = rows.row_sum[table.rows]
    last = table.lazy.last_step_N[table.rows].unsqueeze(1)
    for step in range(1, STEPS + 1 if read else STEPS + 2):
        due = last < step
        grads = rows.grads if step == STEPS + 1 else torch.zeros_like(values)
        moved = values * (1 - lr(step) * DECAY)
        if rule == "adamw":
            m = torch.where(due, m * BETAS[0] + (1 - BETAS[0]) * grads, m)
            v = torch.where(due, v * BETAS[1] + (1 - BETAS[1]) * grads**2, v)
            m_hat, v_hat = m / (1 - BETAS[0] ** step), v / (1 - BETAS[1] ** step)
            moved = moved - lr(step) * m_hat / (v_hat.sqrt() + EPS)
        elif step == STEPS + 1:
            sums = sums + grads.square().mean(1)
            moved = moved - lr(step) * grads / (sums.sqrt().unsqueeze(1) + EPS)
        values = torch.where(due, moved, values)
    return [values, m, v] if rule == "adamw" else [values, sums]


def kept(table: Table, rule: str) -> list[Tensor]:
    lazy = table.lazy
    tensors = [table.values, lazy.exp_avg_ND, lazy.exp_avg_sq_ND] if rule == "adamw" else [table.values, table.row_sum]
    return [tensor[table.rows] for tensor in tensors]


# (N, D, U): odd widths below, at and above a vector; one row; no row; every row.
SIZES = [(40, 37, 11), (7, 1, 3), (9, 8, 9), (30, 64, 1), (5, 3, 0), (600, 5, 500)]


@pytest.mark.parametrize("rule", ["adamw", "adagrad"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_touched_rows_move_as_in_a_dense_step_and_others_stay(
    implementation: Implementation, dtype: torch.dtype, size: tuple[int, int, int], rule: str
) -> None:
    table = make_table(*size, dtype, rule)
    with use_implementation(Implementation.ATEN):
        eager = kept(in_dtype(table, F32).updated(rule), rule)
    after, exact = table.updated(rule), oracle(table, rule)
    if dtype == F64:
        torch.testing.assert_close(kept(after, rule), exact, rtol=1e-13, atol=1e-13)
    else:
        assert_as_exact_as_eager(NAMES[rule], kept(after, rule), eager, exact)
    assert (after.lazy.last_step_N[table.rows] == STEPS + 1).all()
    others = torch.ones(size[0], dtype=torch.bool).index_fill(0, table.rows, False)
    assert all(torch.equal(a[others], b[others]) for a, b in zip(after.state(), table.state(), strict=True))


@pytest.mark.parametrize("rule", ["adamw", "adagrad"])
def test_bfloat16_rows_are_the_float32_rows_rounded_stochastically(implementation: Implementation, rule: str) -> None:
    table = make_table(50, 37, 20, BF16, rule)
    exact, rounded = in_dtype(table, F32).updated(rule), table.updated(rule)
    expected = round_stochastically(exact.values[table.rows], table.rows, seed=5, step=STEPS + 1)
    assert torch.equal(rounded.values[table.rows], expected)
    assert not torch.equal(expected, exact.values[table.rows].bfloat16())
    for a, b in zip(rounded.state()[1:], exact.state()[1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so_in_bfloat16(implementation: Implementation, bad: float) -> None:
    table = make_table(3, 9, 3, BF16, "adagrad")
    table.values[1] = bad
    values = table.updated("adagrad").values
    torch.testing.assert_close(values[1], torch.full((9,), bad, dtype=BF16), equal_nan=True)
    assert values[[0, 2]].isfinite().all()


@pytest.mark.parametrize("rule", ["adamw", "adagrad"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_rows_are_read_up_to_date(implementation: Implementation, dtype: torch.dtype, rule: str) -> None:
    table = make_table(40, 37, 11, dtype, rule)
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


def test_opcheck(implementation: Implementation) -> None:
    table, adagrad = make_table(20, 5, 7, F32), make_table(20, 5, 7, F32, "adagrad")
    lazy, ops = table.lazy, torch.ops.ultramem
    step = (STEPS + 1, 1e-2)
    state = (table.values, lazy.exp_avg_ND, lazy.exp_avg_sq_ND, lazy.last_step_N, lazy.schedule_S3)
    torch.library.opcheck(ops.adamw_rows_.default, (*state, table.rows, table.grads, *step, *BETAS, EPS, DECAY, 0))
    state = (adagrad.values, adagrad.row_sum, adagrad.lazy.last_step_N, adagrad.lazy.schedule_S3)
    torch.library.opcheck(ops.adagrad_rows_.default, (*state, adagrad.rows, adagrad.grads, *step, EPS, DECAY, 0))


def test_compiles_once_whatever_the_number_of_rows(implementation: Implementation) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(table: Table) -> Tensor:
        options = {"step": STEPS + 1, "lr": 1e-2, "betas": BETAS, "weight_decay": DECAY}
        adamw_rows_(table.values, table.lazy, table.rows, table.grads * 2, **options)
        return table.values.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    frames = set()
    for touched in (7, 4, 19):
        torch.testing.assert_close(compiled(make_table(20, 5, touched, F32)), step(make_table(20, 5, touched, F32)))
        frames.add(counter.frame_count)
    assert len(frames) == 1  # the first call itself traces twice: eps is a float that becomes a constant


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
