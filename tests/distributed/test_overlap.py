"""Where a compiled model waits: rows travel beside the layers that their memory skips, there and back."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES
from test_sharded_table import WAYS, make_batch, mean_loss
from torch._inductor.utils import run_and_get_code
from torch.distributed.device_mesh import init_device_mesh

from ultramem.graph import build_model
from ultramem.graph.table_shard import TableShard
from ultramem.runtime.distributed import Ranks
from ultramem.runtime.distributed.compiling import compiling_exchanges

BASE = FAMILIES["ultramem"]
CONFIG = replace(BASE, num_layers=3, insertions="1:3", dropout=0.0, memory=replace(BASE.memory, num_layers=3))
SKIPPED = 10
"""Products between source and target: the MLP of layer 1, and four of attention and MLP in layers 2 and 3."""
LAUNCHES = ("all_to_all_single.default(", "reduce_scatter_tensor.default(", "all_gather_into_tensor.default(")


def generated_code(way):
    """Code of the forward and of the backward."""
    mesh = init_device_mesh("cpu", (2,))
    model = build_model(CONFIG, shard=TableShard(mesh=mesh, **way)).train()
    inputs, targets = make_batch(CONFIG.vocab_size)
    function = torch.compile(mean_loss, fullgraph=True)
    with compiling_exchanges(Ranks(size=2)):
        _, codes = run_and_get_code(lambda: function(model, inputs, targets).backward())
    torch._dynamo.reset()
    assert dist.get_world_size() == 2
    return codes


def products_beside_exchanges(code) -> list[int]:
    """For each exchange of the code in order: the matrix products between its start and its wait."""
    running, counts = {}, {}
    for line in code.splitlines():
        text = line.strip()
        if any(launch in text for launch in LAUNCHES) and " = torch.ops" in text:
            name = text.split(" = ")[0]
            running[name] = counts[name] = 0
        elif "wait_tensor.default(" in text:
            running.pop(text.split("wait_tensor.default(")[1].split(")")[0], None)
        elif text.startswith("extern_kernels.") and "mm(" in text:
            for name in running:
                counts[name] += 1
    return list(counts.values())


@pytest.mark.parametrize("way", ["rows", "columns", pytest.param("rows, pooled at the owner", marks=pytest.mark.slow)])
def test_the_skipped_layers_run_while_rows_travel(ranks, way):
    forward, backward = ranks(2).run(generated_code, WAYS[way])[0]
    beside = products_beside_exchanges(forward)
    assert len(beside) == 3
    assert beside[-1] == SKIPPED
    assert max(products_beside_exchanges(backward)) >= 2 * SKIPPED - 1  # two products a matrix, of weights and inputs


def test_the_count_sees_a_wait_that_comes_too_early():
    code = """
    buf1 = torch.ops._c10d_functional.all_to_all_single.default(buf0, [1, 1], [1, 1], '0')
    extern_kernels.mm(a, b, out=c)
    torch.ops._c10d_functional.wait_tensor.default(buf1)
    extern_kernels.mm(a, b, out=c)
    """
    assert products_beside_exchanges(code) == [1]
