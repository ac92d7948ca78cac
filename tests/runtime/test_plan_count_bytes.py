"""The byte counter: every collective that it knows, on PyTorch's fake process group, against its stated convention."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch.testing._internal.distributed.fake_pg import FakeStore

from ultramem.runtime.plan.count_bytes import CountBytes

RANKS = 8

# torch 2.13 has new names for two functional collectives; the old ones are those that 2.11 has as well.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


@pytest.fixture
def group():
    dist.init_process_group("fake", rank=2, world_size=RANKS, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def waited(result):
    """A functional collective's result, which PyTorch wants to be waited for."""
    return torch.ops._c10d_functional.wait_tensor(result)


def test_functional_collectives(group):
    rows = torch.ones(16, 4, dtype=torch.bfloat16)
    with CountBytes() as count:
        waited(collectives.all_gather_tensor(rows, 0, group))
        waited(collectives.reduce_scatter_tensor(rows, "sum", 0, group))
        waited(collectives.all_reduce(rows, "sum", group))
        waited(collectives.all_to_all_single(rows, None, None, group))
    assert [(each.kind, each.sent_bytes) for each in count.sent] == [
        ("all_gather", 7 * 128),
        ("reduce_scatter", 7 * 16),
        ("all_reduce", 2 * 7 * 16),
        ("all_to_all", 7 * 16),
    ]
    assert {(each.dtype, each.ranks) for each in count.sent} == {(torch.bfloat16, RANKS)}
    assert count.total_bytes == 7 * 128 + 4 * 7 * 16
    assert count.by_kind()["all_to_all"] == 112
    assert len(count.take()) == 4
    assert count.sent == []


def test_splits_count_what_leaves_the_rank(group):
    """Rank 2 keeps five of its fifteen rows."""
    rows = torch.ones(15, 3, dtype=torch.float64)
    splits = [1, 0, 5, 2, 2, 2, 2, 1]
    with CountBytes() as count:
        waited(collectives.all_to_all_single(rows, splits, splits, group))
        dist.all_to_all_single(torch.empty_like(rows), rows, splits, splits)
        dist.all_to_all_single(torch.empty(16), torch.ones(16))
    assert [each.sent_bytes for each in count.sent] == [10 * 24, 10 * 24, 14 * 4]


def test_collectives_of_c10d(group):
    rows = torch.ones(16, 4)
    with CountBytes() as count:
        dist.all_gather_into_tensor(torch.empty(128, 4), rows)
        dist.all_gather([torch.empty(16, 4) for _ in range(RANKS)], rows)
        dist.reduce_scatter_tensor(torch.empty(2, 4), rows)
        dist.all_reduce(rows)
        dist.broadcast(rows, 2)
        dist.broadcast(rows, 0)
        dist.barrier()
    assert [(each.kind, each.sent_bytes) for each in count.sent] == [
        ("all_gather", 7 * 256),
        ("all_gather", 7 * 256),
        ("reduce_scatter", 7 * 32),
        ("all_reduce", 14 * 32),
        ("broadcast", 7 * 256),
        ("broadcast", 0),
    ]


def test_gradients_are_counted(group):
    """The gradient of an all-gather is a reduce-scatter, that of an all-to-all goes back the way it came."""
    rows = torch.ones(16, 4, requires_grad=True)
    with CountBytes() as count:
        gathered = collectives.all_gather_tensor_autograd(rows, 0, group)
        exchanged = collectives.all_to_all_single_autograd(rows, [2] * RANKS, [2] * RANKS, group)
        count.take()
        (gathered.sum() + exchanged.sum()).backward()
    assert sorted((each.kind, each.sent_bytes) for each in count.sent) == [
        ("all_to_all", 7 * 32),
        ("reduce_scatter", 7 * 256),
    ]


def test_what_is_not_known_is_not_guessed(group):
    with CountBytes(), pytest.raises(NotImplementedError, match=r"c10d::send"):
        dist.send(torch.ones(3), 1)


def test_fsdp_is_counted(group):
    """FSDP2: parameters are gathered for the forward and, resharded, for the backward; gradients are scattered."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    linear = torch.nn.Linear(32, 16, bias=False)
    fully_shard(linear, mesh=init_device_mesh("cpu", (RANKS,)), reshard_after_forward=True)
    with CountBytes() as count:
        linear(torch.ones(2, 32)).sum().backward()
    shard_bytes = 32 * 16 * 4 // RANKS
    by_kind = count.by_kind()
    assert by_kind["all_gather"] == 2 * 7 * shard_bytes
    assert by_kind["reduce_scatter"] == 7 * shard_bytes
