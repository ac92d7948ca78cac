"""Experts spread over ranks, and the balance of all ranks' choices."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES
from test_sharded_table import make_batch, mean_loss
from torch.distributed.device_mesh import init_device_mesh

from ultramem import MoEConfig, ParallelConfig
from ultramem.graph import build_model
from ultramem.graph.sharded_module import parts_of
from ultramem.runtime.distributed import Ranks, balance_together

CONFIG = replace(FAMILIES["moe"], dropout=0.0)


def check_moe(spread, compiled):
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("copies", "shards"))
    ranks = Ranks(rank=rank, size=size, mesh=mesh, parallel=ParallelConfig(expert_parallel=spread))
    models = []
    for experts in (None, ranks.expert_shard()):
        torch.manual_seed(0)
        models.append(build_model(CONFIG, dtype=torch.float64, experts=experts).train())
    whole, parts = models
    balance_together(parts, ranks)
    inputs, targets = make_batch(CONFIG.vocab_size)
    expected = mean_loss(whole, inputs, targets)
    expected.backward()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        function = torch.compile(mean_loss, fullgraph=True) if compiled else mean_loss
        loss = function(parts, inputs.chunk(size)[rank], targets.chunk(size)[rank]) / size
        loss.backward()
    torch._dynamo.reset()
    total = ranks.add_up(loss.detach().clone())
    torch.testing.assert_close(total, expected.detach(), rtol=1e-9, atol=0)
    cut = parts_of(parts)
    assert bool(cut) == spread
    for (name, parameter), reference in zip(parts.named_parameters(), whole.parameters(), strict=True):
        if name in cut:
            own = slice(rank * len(parameter), (rank + 1) * len(parameter))
            torch.testing.assert_close(parameter, reference[own], rtol=0, atol=0)
            gradient, wanted = parameter.grad, reference.grad[own]
        else:
            gradient, wanted = ranks.add_up(parameter.grad), reference.grad
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()), msg=name)


@pytest.mark.parametrize(
    ("size", "spread", "compiled"), [(2, True, False), (4, True, False), (2, False, False), (2, True, True)]
)
def test_losses_and_gradients_are_those_of_one_process(ranks, size, spread, compiled):
    ranks(size).run(check_moe, spread, compiled)


def error_of(experts):
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("copies", "shards"))
    ranks = Ranks(rank=dist.get_rank(), size=2, mesh=mesh, parallel=ParallelConfig(expert_parallel=True))
    try:
        build_model(replace(CONFIG, moe=MoEConfig(num_experts=experts)), experts=ranks.expert_shard())
    except ValueError as error:
        return str(error)
    return None


def test_experts_that_cannot_be_spread_are_refused(ranks):
    for message in ranks(2).run(error_of, 3):
        assert message == "num_experts must be a multiple of the 2 ranks of expert_parallel, got 3"
