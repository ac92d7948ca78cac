"""The norm over dense and sparse gradients together is torch's norm of the same gradients made dense."""

from __future__ import annotations

import math

import pytest
import torch
from table_training import batch, build, loss_of

from ultramem.optim import build_optimizers, clip_grad_norm_


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Dense, sparse with repeated rows in any order, sparse in order, none."""
    result = [torch.nn.Parameter(torch.zeros(*shape, dtype=dtype)) for shape in ((4, 5), (9, 3), (9, 3), (2,))]
    result[0].grad = torch.randn(4, 5, dtype=dtype)
    for parameter, rows in ((result[1], [7, 2, 7, 2, 0]), (result[2], [1, 3, 4, 6, 8])):
        grads = torch.randn(5, 3, dtype=dtype)
        parameter.grad = torch.sparse_coo_tensor(torch.tensor([rows]), grads, (9, 3), check_invariants=True)
    return result


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e3, math.inf, 0.0])
def test_as_torch_on_dense_gradients(max_norm: float) -> None:
    torch.manual_seed(3)
    sparse = parameters(torch.float64)
    torch.manual_seed(3)
    dense = parameters(torch.float64)
    for parameter in dense[:3]:
        parameter.grad = parameter.grad.to_dense()
    norm = clip_grad_norm_(iter(sparse), max_norm)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(dense, max_norm), rtol=1e-14, atol=0)
    for a, b in zip(sparse[:3], dense[:3], strict=True):
        torch.testing.assert_close(a.grad.to_dense(), b.grad, rtol=1e-13, atol=0)
    assert all(p.grad.layout == torch.sparse_coo and p.grad.is_coalesced() for p in sparse[1:3])


def test_a_shared_table_with_accumulated_gradients() -> None:
    norms = []
    for tables in ("adamw", "lazy_adamw"):
        model = build(torch.float64, share_table=True)
        build_optimizers(model, lr=1e-3, tables=tables)
        for inputs, targets in batch(1, parts=2):
            loss_of(model)(inputs, targets).backward()
        norms.append(clip_grad_norm_(model.parameters(), 1e-3))
        clipped = sum(
            p.grad.to_dense().square().sum() if p.grad.is_sparse else p.grad.square().sum() for p in model.parameters()
        )
        assert clipped.sqrt().item() == pytest.approx(1e-3, rel=1e-3)
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-12, atol=0)


def test_low_precision_gradients_are_measured_in_float32() -> None:
    parameter = torch.nn.Parameter(torch.zeros(300, 300, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    assert clip_grad_norm_([parameter], math.inf).item() == 300.0


def test_nothing_to_clip() -> None:
    assert clip_grad_norm_([torch.nn.Parameter(torch.zeros(3))], 1.0).item() == 0
    with pytest.raises(ValueError, match=r"max_norm must be at least 0, got -1"):
        clip_grad_norm_([], -1.0)
