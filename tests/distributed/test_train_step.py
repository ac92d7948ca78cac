"""Training steps over ranks: losses, norms and weights of one process."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from ultramem import ParallelConfig, TrainConfig
from ultramem.graph import build_model
from ultramem.optim import build_optimizers
from ultramem.runtime.determinism import deterministic_algorithms
from ultramem.runtime.distributed import ALONE, Ranks, ShardedLoss, balance_together
from ultramem.runtime.distributed.compiling import compiling_exchanges
from ultramem.runtime.optimizers import sync
from ultramem.runtime.train_step import TrainStep, make_train_loss

TRAIN = TrainConfig(batch_size=8, sequence_length=6, compile=False, table_optimizer="lazy_adamw", warmup_ratio=0.1)


def train(config, train_config, dtype, ranks):
    """Rows of metrics, and the weights at the end, whole."""
    torch.manual_seed(0)
    model = build_model(
        replace(config, dropout=0.0), dtype=dtype, shard=ranks.table_shard(), experts=ranks.expert_shard()
    ).train()
    balance_together(model, ranks)
    loss = make_train_loss(model, train_config)
    if ranks.parallel.dense == "fsdp":
        loss = ShardedLoss(model, loss, ranks)
    optimizers = build_optimizers(model, lr=train_config.lr, tables=train_config.table_optimizer)
    stream = torch.randint(0, config.vocab_size, (400,), generator=torch.Generator().manual_seed(1))
    with deterministic_algorithms(), compiling_exchanges(ranks):
        step = TrainStep(model, optimizers, train_config, stream, ranks=ranks, loss=loss)
        rows = [step(number) for number in range(1, train_config.steps + 1)]
    torch._dynamo.reset()
    sync(optimizers)
    weights = {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }
    return rows, weights


def compare(family, parallel, train_config, dtype, rtol):
    config, size = FAMILIES[family], dist.get_world_size()
    copies = parallel.table_copies
    mesh = init_device_mesh("cpu", (copies, size // copies), mesh_dim_names=("copies", "shards"))
    ranks = Ranks(rank=dist.get_rank(), size=size, mesh=mesh, parallel=parallel)
    with torch.random.fork_rng():
        expected, whole = train(config, train_config, dtype, ALONE)
    rows, weights = train(config, train_config, dtype, ranks)
    for ours, theirs in zip(rows, expected, strict=True):
        for name in ("loss", "grad_norm"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=0)
        torch.testing.assert_close(ours["aux_loss"], theirs["aux_loss"], rtol=1e3 * rtol, atol=1e-12)
    assert len({row["loss"] for row in rows}) == train_config.steps
    if dtype == torch.float64:
        for name, tensor in whole.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-6, atol=1e-9)


def make_parallel(placement, pool, dense, copies=1):
    return ParallelConfig(table_placement=placement, pool=pool, dense=dense, table_copies=copies)


# (ranks, placement, pool, dense, accumulate, copies, table optimiser): every pair of two values at least once.
CASES = [
    (2, "rows", "home", "replicate", 1, 1, "lazy_adamw"),
    (2, "columns", "home", "fsdp", 2, 1, "adamw"),
    (2, "rows", "owner", "fsdp", 1, 1, "row_adagrad"),
    (2, "replicate", "home", "replicate", 2, 1, "row_adagrad"),
    (4, "rows", "home", "fsdp", 2, 2, "adamw"),
    (4, "columns", "home", "replicate", 1, 2, "lazy_adamw"),
    (4, "replicate", "home", "fsdp", 1, 1, "lazy_adamw"),
    (4, "rows", "owner", "replicate", 2, 1, "row_adagrad"),
]


@pytest.mark.parametrize(("size", "placement", "pool", "dense", "accumulate", "copies", "optimizer"), CASES)
def test_fifty_steps_in_float64(ranks, size, placement, pool, dense, accumulate, copies, optimizer):
    config = replace(TRAIN, steps=50, accumulate=accumulate, table_optimizer=optimizer)
    parallel = make_parallel(placement, pool, dense, copies)
    ranks(size).run(compare, "ultramem", parallel, config, torch.float64, 1e-9)


@pytest.mark.parametrize("family", ["moe", "pkm", "peer", "ultramem-v2"])
def test_families_in_float32(ranks, family):
    parallel = ParallelConfig(table_placement="rows", pool="home", expert_parallel=family == "moe", dense="fsdp")
    ranks(2).run(compare, family, parallel, replace(TRAIN, steps=5), torch.float32, 1e-5)


@pytest.mark.parametrize(("placement", "dense"), [("rows", "fsdp"), ("columns", "replicate")])
def test_compiled_steps(ranks, placement, dense):
    config = replace(TRAIN, steps=5, compile=True)
    ranks(2).run(compare, "ultramem", make_parallel(placement, "home", dense), config, torch.float32, 1e-5)


WAYS = [("rows", "home"), ("rows", "owner"), ("columns", "home")]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dense", ["replicate", "fsdp"])
@pytest.mark.parametrize("compiled", [False, True])
def test_every_combination(ranks, size, way, dense, compiled):
    config = replace(TRAIN, steps=50, compile=compiled)
    ranks(size).run(compare, "ultramem", make_parallel(*way, dense), config, torch.float64, 1e-9)
