"""Which optimiser gets what."""

from __future__ import annotations

import pytest
import torch
from table_training import build, value_tables

from ultramem.optim import LazyAdamW, RowAdagrad, build_optimizers


@pytest.mark.parametrize(("tables", "kind"), [("lazy_adamw", LazyAdamW), ("row_adagrad", RowAdagrad)])
def test_tables_have_their_own_optimiser(tables: str, kind: type) -> None:
    model = build()
    dense, sparse = build_optimizers(model, lr=1e-3, value_lr_ratio=7.0, weight_decay=0.2, tables=tables)
    assert type(dense) is torch.optim.AdamW
    assert type(sparse) is kind
    assert [group["name"] for group in dense.param_groups] == ["weights", "scales"]
    assert [group["name"] for group in sparse.param_groups] == ["values"]
    (group,) = sparse.param_groups
    assert group["lr"] == pytest.approx(7e-3)
    assert group["weight_decay"] == 0.2
    assert {id(p) for p in group["params"]} == {id(table.values_NV) for table in value_tables(model)}
    assert all(table.sparse_grad and table.lazy_rows is not None for table in value_tables(model))


def test_rebuilding_for_another_optimiser_resets_the_tables() -> None:
    model = build()
    build_optimizers(model, lr=1e-3, tables="lazy_adamw")
    (only,) = build_optimizers(model, lr=1e-3, tables="adamw")
    assert sum(len(group["params"]) for group in only.param_groups) == len(list(model.parameters()))
    assert all(not table.sparse_grad and table.lazy_rows is None for table in value_tables(model))


def test_without_decay_adagrad_leaves_no_row_stale() -> None:
    model = build()
    build_optimizers(model, lr=1e-3, tables="row_adagrad", weight_decay=0.0)
    assert all(table.sparse_grad and table.lazy_rows is None for table in value_tables(model))


def test_a_model_without_tables() -> None:
    assert len(build_optimizers(torch.nn.Linear(3, 3), lr=1e-3, tables="lazy_adamw")) == 1


def test_unknown_choice() -> None:
    with pytest.raises(ValueError, match="tables must be one of adamw, lazy_adamw, row_adagrad, got 'sgd'"):
        build_optimizers(build(), lr=1e-3, tables="sgd")
