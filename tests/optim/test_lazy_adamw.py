"""Lazy AdamW is dense AdamW: same losses, same weights, whatever the schedule, sharing or accumulation."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from table_training import Training, batch, build, loss_of, value_tables
from torch import Tensor

import ultramem.optim.schedule as schedule
from ultramem.optim import LazyAdamW

STEPS = 50
F32, F64 = torch.float32, torch.float64


@functools.cache
def losses(tables: str, dtype: torch.dtype, **options: Any) -> Tensor:
    shape = {name: options.pop(name) for name in ("share_table", "experts") if name in options}
    return Training(build(dtype, **shape), tables=tables, **options).run(STEPS)


@pytest.mark.parametrize(
    "options",
    [{}, {"share_table": True, "experts": True, "eps": 1e-12}, {"parts": 3}, {"betas": (0.8, 0.999)}],
    ids=str,
)
def test_losses_are_those_of_dense_adamw(options: dict[str, Any]) -> None:
    exact, dense, lazy = (
        losses("adamw", F64, **options),
        losses("adamw", F32, **options),
        losses("lazy_adamw", F32, **options),
    )
    rounding = (dense - exact).abs().max()
    assert (lazy - exact).abs().max() <= 4 * rounding + 4 * torch.finfo(F32).eps * exact.max()
    assert exact[-10:].mean() < exact[:10].mean() - 0.2  # it learns: there is a trajectory to differ from


def test_exact_to_rounding_where_eps_is_negligible() -> None:
    dense, lazy = losses("adamw", F64, eps=1e-18), losses("lazy_adamw", F64, eps=1e-18)
    torch.testing.assert_close(lazy, dense, rtol=1e-12, atol=0)


def test_synced_weights_are_those_of_dense_adamw() -> None:
    dense, lazy = (Training(build(F64), tables=tables, eps=1e-18) for tables in ("adamw", "lazy_adamw"))
    for training in (dense, lazy):
        training.run(STEPS)
    last_step = lazy.optimizers[1].state[lazy.tables()[0]]["last_step"]
    assert {0, STEPS} < set(last_step.tolist())  # rows of every kind
    stale = [table.detach().clone() for table in lazy.tables()]
    lazy.optimizers[1].sync()
    for name, expected in dense.model.state_dict().items():
        torch.testing.assert_close(lazy.model.state_dict()[name], expected, rtol=1e-11, atol=1e-13)
    assert not torch.allclose(stale[0], lazy.tables()[0], rtol=1e-3)  # there was something to make up
    torch.testing.assert_close(lazy.run(5), dense.run(5), rtol=1e-12, atol=0)


def test_stale_reads_are_another_training() -> None:
    """Why tables are attached: rows read as of their last gradient change the losses by far more than rounding."""
    dense = losses("adamw", F64)
    training = Training(build(F64), tables="lazy_adamw")
    for table in value_tables(training.model):
        table.lazy_rows = None
    assert (training.run(STEPS) - dense).abs().max() > 1e-3


def test_large_eps_is_made_up_to_first_order() -> None:
    def gap(eps: float) -> float:
        return (losses("adamw", F64, eps=eps) - losses("lazy_adamw", F64, eps=eps)).abs().max().item()

    dense, other_eps = losses("adamw", F64, eps=1e-5), losses("adamw", F64, eps=1.5e-5)
    assert gap(1e-5) < 0.1 * (dense - other_eps).abs().max()
    assert gap(1e-8) < 1e-5


def test_evaluation_sees_fresh_rows_and_changes_nothing() -> None:
    watched, alone, dense = (Training(build(F64), tables=t, eps=1e-18) for t in ("lazy_adamw", "lazy_adamw", "adamw"))
    for _ in range(3):
        for training in (watched, alone, dense):
            training.run(7)
        inputs, targets = batch(999)[0]
        with torch.no_grad():
            seen, expected = (loss_of(training.model.eval())(inputs, targets) for training in (watched, dense))
            for training in (watched, dense):
                training.model.train()
        torch.testing.assert_close(seen, expected, rtol=1e-12, atol=0)
    assert torch.equal(watched.run(3), alone.run(3))


def copied(state: dict[Any, dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{key: tensor.clone() for key, tensor in entry.items()} for entry in state.values()]


@pytest.mark.parametrize("tables", ["lazy_adamw", "row_adagrad"])
@pytest.mark.parametrize("how", ["assign", "load_state_dict"])
def test_resuming_is_bitwise(tables: str, how: str) -> None:
    through = Training(build(), tables=tables)
    through.run(9)
    weights = {name: tensor.clone() for name, tensor in through.model.state_dict().items()}
    states = [copied(optimizer.state) for optimizer in through.optimizers]
    whole = [optimizer.state_dict() for optimizer in through.optimizers]
    assert all(isinstance(t, Tensor) for state in states for entry in state for t in entry.values())
    if how == "load_state_dict":
        whole = torch.load(_saved(whole), weights_only=True)
    expected = through.run(6)

    resumed = Training(build(), tables=tables)
    resumed.run(2)  # state that must go
    resumed.model.load_state_dict(weights)
    for optimizer, entries, state_dict in zip(resumed.optimizers, states, whole, strict=True):
        if how == "load_state_dict":
            optimizer.load_state_dict(state_dict)
            continue
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter, entry in zip(parameters, entries, strict=True):
            optimizer.state[parameter] = entry
    resumed.done = 9
    assert torch.equal(resumed.run(6), expected)
    for name, tensor in through.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def _saved(value: Any) -> Any:
    import io

    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_compiled_training_is_one_graph_while_the_schedule_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Training(build(experts=True), tables="lazy_adamw").run(12)
    monkeypatch.setattr(schedule, "_FIRST_STEPS", 3)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    model = build(experts=True)
    compiled = torch.compile(loss_of(model), fullgraph=True, backend=counter)
    training = Training(model, loss=compiled, tables="lazy_adamw")
    torch.testing.assert_close(training.run(12), expected, rtol=1e-5, atol=0)
    assert counter.frame_count == 1
    assert len(training.optimizers[1].state[training.tables()[0]]["schedule"]) == 24


def test_a_dense_gradient_touches_every_row() -> None:
    table, expected = (torch.nn.Parameter(torch.arange(12.0, dtype=F64).view(4, 3)) for _ in range(2))
    lazy, dense = (
        LazyAdamW([table], eps=1e-18),
        torch.optim.AdamW([expected], betas=(0.9, 0.95), weight_decay=0.1, eps=1e-18),
    )
    for _ in range(4):
        for parameter, optimizer in ((table, lazy), (expected, dense)):
            parameter.grad = torch.sin(parameter.detach() + 1)
            optimizer.step()
    torch.testing.assert_close(table, expected, rtol=1e-12, atol=0)


def test_refuses_what_it_cannot_do() -> None:
    table = torch.nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"betas must be 0 <= beta1 < beta2 < 1.*got \(0.99, 0.95\)"):
        LazyAdamW([table], betas=(0.99, 0.95))
    with pytest.raises(ValueError, match=r"params must be tables \[N,D\], got shape \(3,\)"):
        LazyAdamW([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(TypeError, match=r"params must have a dtype of float32, bfloat16, float64, got torch.float16"):
        LazyAdamW([torch.nn.Parameter(torch.zeros(3, 3).half())])
    with pytest.raises(ValueError, match=r"eps must be above 0, got 0"):
        LazyAdamW([table], eps=0.0)
    optimizer = LazyAdamW([table], lr=20.0, weight_decay=0.1)
    table.grad = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"lr \* weight_decay must be below 1, got 20.0 \* 0.1"):
        optimizer.step()
