"""bfloat16 tables: small updates add up, training learns, resuming is bitwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from table_training import Training, build, value_tables
from torch import Tensor

from ultramem.optim import LazyAdamW, RowAdagrad

BF16 = torch.bfloat16


def table_after(optimizer_class: Any, dtype: torch.dtype, steps: int) -> Tensor:
    """Ones whose every element moves down by about 2e-5 a step; bfloat16's spacing below 1 is 4e-3."""
    table = torch.nn.Parameter(torch.ones(64, 64, dtype=dtype))
    optimizer = optimizer_class([table], lr=2e-5, weight_decay=0.0)
    for _ in range(steps):
        rows = torch.arange(64).unsqueeze(0)
        table.grad = torch.sparse_coo_tensor(rows, torch.ones(64, 64, dtype=dtype), (64, 64), check_invariants=True)
        optimizer.step()
    return table.detach().double()


@pytest.mark.parametrize("optimizer_class", [LazyAdamW, RowAdagrad])
def test_updates_far_below_the_spacing_move_the_mean(optimizer_class: Any) -> None:
    exact = table_after(optimizer_class, torch.float64, 40)
    rounded = table_after(optimizer_class, BF16, 40)
    moved = 1 - exact.mean()
    assert moved < 2**-8 / 2  # rounding to nearest would keep every element at 1
    # Each element is a coin between 1 and 1 - 2^-8 (or fell further); five standard errors of their mean.
    coin = (moved * 2**-8 / rounded.numel()) ** 0.5
    assert (rounded.mean() - exact.mean()).abs() < 5 * coin


def bfloat16_training(tables: str) -> Training:
    model = build()
    for table in value_tables(model):
        table.to(BF16)
    return Training(model, tables=tables)


@pytest.mark.parametrize("tables", ["lazy_adamw", "row_adagrad"])
def test_training_learns_and_resumes_bitwise(tables: str) -> None:
    through = bfloat16_training(tables)
    first = through.run(30)
    weights = {name: tensor.clone() for name, tensor in through.model.state_dict().items()}
    states = [{p: {k: t.clone() for k, t in s.items()} for p, s in o.state.items()} for o in through.optimizers]
    expected = through.run(15)
    assert expected[-10:].mean() < first[:10].mean() - 0.2

    resumed = bfloat16_training(tables)
    resumed.model.load_state_dict(weights)
    of_name = dict(resumed.model.named_parameters())
    names = {id(parameter): name for name, parameter in through.model.named_parameters()}
    for optimizer, state in zip(resumed.optimizers, states, strict=True):
        for parameter, entry in state.items():
            optimizer.state[of_name[names[id(parameter)]]] = entry
    resumed.done = 30
    assert torch.equal(resumed.run(15), expected)
    for name, tensor in through.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_learns_as_well_as_with_a_float32_table() -> None:
    wide, narrow = Training(build(), tables="lazy_adamw").run(50), bfloat16_training("lazy_adamw").run(50)
    assert not torch.equal(narrow, wide)
    assert (narrow[-20:].mean() - wide[-20:].mean()).abs() < 0.3 * (wide[:20].mean() - wide[-20:].mean())


@pytest.mark.parametrize("optimizer_class", [LazyAdamW, RowAdagrad])
def test_moments_are_kept_in_float32(optimizer_class: Any) -> None:
    table = torch.nn.Parameter(torch.zeros(4, 3, dtype=BF16))
    floating = [t.dtype for t in optimizer_class([table]).state[table].values() if t.is_floating_point()]
    assert BF16 not in floating


def test_sync_is_unbiased() -> None:
    """Weight decay alone, far below the spacing, made up in one go."""
    tables = [torch.nn.Parameter(torch.ones(512, 64, dtype=dtype)) for dtype in (BF16, torch.float64)]
    for table in tables:
        optimizer = RowAdagrad([table], lr=1e-4, weight_decay=0.1)
        for _ in range(50):
            gradient = torch.zeros(1, 64, dtype=table.dtype)
            row = torch.zeros(1, 1, dtype=torch.int64)
            table.grad = torch.sparse_coo_tensor(row, gradient, (512, 64), check_invariants=True)
            optimizer.step()
        optimizer.sync()
    narrow, wide = (table.detach().double().mean() for table in tables)
    assert 1 - wide < 2**-9
    assert (narrow - wide).abs() < 5 * ((1 - wide) * 2**-8 / tables[0].numel()) ** 0.5
