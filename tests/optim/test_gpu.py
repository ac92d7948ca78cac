"""Optimisers of tables on a GPU."""

import pytest
import torch
from table_training import Training, build, loss_of

STEPS = 20


@pytest.fixture(autouse=True)
def _deterministic():
    """cuBLAS would want a workspace for it, and nothing here is compared to the bit."""


@pytest.mark.gpu
@pytest.mark.parametrize("tables", ["lazy_adamw", "row_adagrad"])
def test_losses_are_those_of_the_cpu(tables):
    def losses(device, dtype):
        model = build(dtype).to(device)
        loss = loss_of(model)
        return Training(model, loss=lambda x, t: loss(x.to(device), t.to(device)), tables=tables).run(STEPS)

    exact, on_cpu, on_gpu = losses("cpu", torch.float64), losses("cpu", torch.float32), losses("cuda", torch.float32)
    rounding = (on_cpu - exact).abs().max()
    assert (on_gpu - exact).abs().max() <= 16 * rounding + 1e-4
