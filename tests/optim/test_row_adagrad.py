"""Row-wise Adagrad: sparse gradients give what dense ones do, and the rule is the one in its docstring."""

from __future__ import annotations

import pytest
import torch
from table_training import Training, build, value_tables
from torch import Tensor

from ultramem.optim import RowAdagrad

STEPS = 50
N, D = 30, 6


def gradient(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows with repeats, and gradients as functions of the step alone."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(N, (5,), generator=generator)
    return rows, torch.randn(5, D, generator=generator, dtype=torch.float64).to(dtype)


def trained(kind: str, dtype: torch.dtype, weight_decay: float) -> Tensor:
    table = torch.nn.Parameter(torch.linspace(-1, 1, N * D, dtype=torch.float64).view(N, D).to(dtype))
    optimizer = RowAdagrad([table], lr=0.1, weight_decay=weight_decay)
    row_sum = torch.zeros(N, dtype=dtype)
    for step in range(1, STEPS + 1):
        rows, grads = gradient(step, dtype)
        lr = optimizer.param_groups[0]["lr"] = 0.1 / step
        sparse = torch.sparse_coo_tensor(rows.unsqueeze(0), grads, (N, D), check_invariants=True)
        if kind == "rule":
            dense = sparse.to_dense()
            row_sum += dense.square().mean(1)
            scaled = lr * dense / (row_sum.sqrt() + 1e-8).unsqueeze(1)
            table.data = table.data * (1 - lr * weight_decay) - scaled
        else:
            table.grad = sparse if kind == "sparse" else sparse.to_dense()
            optimizer.step()
    optimizer.sync()
    return table.detach()


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_sparse_dense_and_the_rule_agree(weight_decay: float) -> None:
    exact = trained("rule", torch.float64, weight_decay)
    rounding = (trained("rule", torch.float32, weight_decay).double() - exact).abs().max()
    for kind in ("sparse", "dense"):
        torch.testing.assert_close(trained(kind, torch.float64, weight_decay), exact, rtol=1e-12, atol=1e-14)
        assert (trained(kind, torch.float32, weight_decay).double() - exact).abs().max() <= 4 * rounding


def test_a_model_trains_as_with_dense_gradients() -> None:
    def losses(sparse: bool, dtype: torch.dtype) -> Tensor:
        training = Training(build(dtype), tables="row_adagrad", weight_decay=0.5)
        if not sparse:  # every row is then brought up to date in every step
            for table in value_tables(training.model):
                table.sparse_grad, table.lazy_rows = False, None
        return training.run(STEPS)

    torch.testing.assert_close(losses(True, torch.float64), losses(False, torch.float64), rtol=1e-11, atol=0)
    exact, dense = losses(False, torch.float64), losses(False, torch.float32)
    rounding = (dense - exact).abs().max()
    assert (losses(True, torch.float32) - exact).abs().max() <= 4 * rounding
    assert exact[-10:].mean() < exact[:10].mean() - 0.2


def test_state_is_two_columns() -> None:
    table = torch.nn.Parameter(torch.zeros(1000, 64))
    state = RowAdagrad([table]).state[table]
    assert sum(tensor.nbytes for name, tensor in state.items() if len(tensor.shape) and len(tensor) == 1000) == 8000
