"""Singular pairs and values against LAPACK in float64."""

import pytest
import torch

from ultramem.graph.singular import leading_singular_pair, singular_values

# Power iteration damps the second vector by (s2/s1)^2048; at a relative gap of 2 % that is below float32's rounding.
GAP = 0.02
FLOAT32 = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("draw", [torch.rand, torch.randn], ids=["positive", "signed"])
def test_pair_and_values_match_svd(rank, draw):
    torch.manual_seed(rank)
    core = draw(400, rank, rank) * 0.1
    left, values, right = torch.linalg.svd(core.double())
    u, t = leading_singular_pair(core)
    sign = torch.where(left[:, :, 0].sum(1) + right[:, 0].sum(1) < 0, -1.0, 1.0).unsqueeze(1)
    clear = (values[:, 0] - values[:, 1]) / values[:, 0] > GAP if rank > 1 else torch.ones(400, dtype=torch.bool)
    # An eigenvector's error is the matrix's relative error over its relative gap.
    bound = 16 * FLOAT32 / GAP
    assert (u - sign * left[:, :, 0])[clear].abs().max() < bound
    assert (t - sign * right[:, 0])[clear].abs().max() < bound
    assert (u.sum(1) + t.sum(1) >= -bound).all()
    # Two trailing values closer than 1/1024 of each other are not told apart: each may come out as one between them.
    mixing = values[:, 1] / 1024 if rank > 2 else torch.zeros(400)
    error = (singular_values(core) - values).abs().amax(1)
    assert (error <= 16 * FLOAT32 * values[:, 0] + mixing).all()


@pytest.mark.parametrize("rank", [2, 3])
def test_gradient_of_values_matches_svd(rank):
    torch.manual_seed(0)
    core = torch.randn(5, rank, rank, requires_grad=True)
    (ours,) = torch.autograd.grad(singular_values(core)[:, 1:].square().sum(), core)
    exact = core.detach().double().requires_grad_()
    (theirs,) = torch.autograd.grad(torch.linalg.svdvals(exact)[:, 1:].square().sum(), exact)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_zero_core_gives_no_nan(rank):
    core = torch.zeros(2, rank, rank)
    for tensor in (*leading_singular_pair(core), singular_values(core)):
        assert torch.isfinite(tensor).all()
    assert (singular_values(core) == 0).all()


def test_rank_one_core_has_no_trailing_value():
    u, t = torch.tensor([0.6, 0.8]), torch.tensor([0.28, 0.96])
    values = singular_values((2 * u.unsqueeze(1) * t).unsqueeze(0))
    assert torch.allclose(values, torch.tensor([[2.0, 0.0]]), atol=1e-6)
