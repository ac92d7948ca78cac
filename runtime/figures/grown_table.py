"""Layers and models whose table grows, all on one buffer: a table of N rows is its first N rows.

So the largest table is all the memory that a sweep takes, every size lies in pages of the same kind, and a mixture of
experts of as many parameters can stand beside: its experts are the same numbers in another shape. Times do not depend
on the numbers.

Shapes: N rows, V value dim, E experts, D hidden size, I width of an expert, B sequences, W convolution width.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from ultramem.config import MemoryConfig, ModelConfig, MoEConfig
from ultramem.graph import Transformer
from ultramem.graph.memory_layer import UltraMemLayer
from ultramem.graph.moe import MoE
from ultramem.graph.shared_copy import shared_copy
from ultramem.graph.value_table import ValueTable
from ultramem.ops.huge_pages import LARGE_BYTES, advise_huge_pages

HIDDEN = 512
INNER = 512
"""Width of an expert: with two of them a token uses as many parameters whatever their number."""
ROW_WIDTH = 64
"""Of the tables that grow to 2^24 rows: 4.3 GB in float32. The paper's rows are half the hidden size, 256 here."""
_CHUNK = 2**22


def make_buffer(numbers: int, device: torch.device) -> Tensor:
    """Random numbers, a chunk of them repeated, in huge pages where there are any."""
    buffer = torch.empty(numbers, device=device)
    advise_huge_pages(buffer, at_least_bytes=LARGE_BYTES)
    chunk = torch.randn(min(numbers, _CHUNK), generator=torch.Generator().manual_seed(0)) / math.sqrt(HIDDEN)
    for part in buffer.split(_CHUNK):
        part.copy_(chunk[: part.numel()])
    return buffer


def memory_config(rows: int, layers: int = 1) -> MemoryConfig:
    """UltraMem's layer over `rows` rows, a square."""
    side = math.isqrt(rows)
    if side * side != rows:
        raise ValueError(f"rows must be a square, got {rows}")
    return MemoryConfig(
        hidden_size=HIDDEN, num_layers=layers, value_dim=ROW_WIDTH, key_dim=64, knum=side, table="shared"
    )


def rows_of(buffer: Tensor, rows: int, width: int) -> Tensor:
    """The first `rows` rows [N,V] of the buffer."""
    return buffer[: rows * width].view(rows, width)


def table_of(config: MemoryConfig, buffer: Tensor) -> ValueTable:
    """A table whose rows are the buffer's."""
    with torch.device("meta"):
        table = ValueTable(config)
    table.values_NV = nn.Parameter(rows_of(buffer, config.num_values, config.value_dim), requires_grad=False)
    return table.eval()


def memory_layer(config: MemoryConfig, buffer: Tensor) -> UltraMemLayer:
    """A layer with keys of its own that reads the buffer."""
    layer = UltraMemLayer(config, own_table=False).to(buffer.device)
    layer.table = table_of(config, buffer)
    return layer.eval()


def num_experts(rows: int) -> int:
    """How many experts have as many parameters as that many rows."""
    return rows * ROW_WIDTH // (2 * HIDDEN * INNER)


def moe_layer(rows: int, buffer: Tensor) -> MoE:
    """A mixture of experts of as many parameters as a table of `rows` rows has, which are the buffer's."""
    experts = num_experts(rows)
    with torch.device("meta"):
        layer = MoE(MoEConfig(num_experts=experts), HIDDEN, INNER)
    router = nn.Linear(HIDDEN, experts, bias=False, device=buffer.device)
    nn.init.normal_(router.weight, std=HIDDEN**-0.5)
    layer.router = router
    up, down = buffer[: experts * 2 * HIDDEN * INNER].chunk(2)
    layer.up_EDI = nn.Parameter(up.view(experts, HIDDEN, INNER), requires_grad=False)
    layer.down_EID = nn.Parameter(down.view(experts, INNER, HIDDEN), requires_grad=False)
    return layer.eval()


def grown_config(base: ModelConfig, rows: int) -> ModelConfig:
    """The model of `base` with a table of `rows` rows."""
    return replace(base, memory=memory_config(rows, base.num_layers))


def with_table(model: Transformer, rows: int, buffer: Tensor) -> Transformer:
    """A model that shares all but its memory layers with `model`, and whose layers read `rows` rows of the buffer."""
    grown = shared_copy(model)
    config = grown_config(model.config, rows)
    assert config.memory is not None
    grown.config = config
    grown.memories = nn.ModuleList(
        UltraMemLayer(config.memory, index=index, own_table=False).to(buffer.device)
        for index in range(len(config.parsed_insertions))
    )
    grown.table = table_of(config.memory, buffer)
    return grown.eval()
