"""How many different rows of the value tables a forward reads: the model's own lookups, not arithmetic.

Shapes: T tokens, H heads, M slots per head, N rows.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from ultramem.graph import Transformer
from ultramem.graph.memory_layer import Lookup
from ultramem.graph.sharded_table import ShardedValueTable
from ultramem.graph.value_table import ValueTable
from ultramem.runtime.profile.measure import Inputs
from ultramem.runtime.profile.request_schema import RowUse
from ultramem.runtime.profile.schema import DECODE, PREFILL


def whole_shapes(table: ValueTable) -> list[tuple[int, ...]]:
    """Of the values and the experts' input rows, whichever ranks hold them."""
    if isinstance(table, ShardedValueTable):
        return list(table.whole_shapes.values())
    return [tuple(each.shape) for each in (table.values_NV, table.experts_NP) if each is not None]


@torch.no_grad()
def rows_touched(model: Transformer, inputs: Inputs) -> list[RowUse]:
    """Row use of the prefill and of the decode step after it, a record for each table.

    Args:
        model: eager, in eval mode; on whichever device.
        inputs: tokens of one batch, as all engines get them.
    """
    device = model.embedding.weight.device
    paths: dict[nn.Module, str] = {module: path for path, module in model.named_modules()}
    reads: dict[ValueTable, list[Tensor]] = defaultdict(list)

    def before(module: nn.Module, args: Any) -> None:
        assert isinstance(module, Lookup)
        _, addresses_THM, _, table = args
        indices_TK = module.virtual_indices(addresses_THM.flatten(1))
        reads[table].append((indices_TK % whole_shapes(table)[0][0]).flatten())

    def records(phase: str) -> list[RowUse]:
        found = []
        for table, rows in reads.items():
            every = torch.cat(rows)
            shapes = whole_shapes(table)
            found.append(
                RowUse(
                    batch=inputs.prompt_BS.shape[0],
                    phase=phase,
                    table=paths[table],
                    reads=every.numel(),
                    rows_touched=every.unique().numel(),
                    table_rows=shapes[0][0],
                    row_bytes=sum(columns for _, columns in shapes) * table.values_NV.element_size(),
                )
            )
        reads.clear()
        return found

    handles = [module.register_forward_pre_hook(before) for module in paths if isinstance(module, Lookup)]
    try:
        cache = model(inputs.prompt_BS.to(device)).cache
        found = records(PREFILL)
        model(inputs.next_B1.to(device), cache=cache)
        return found + records(DECODE)
    finally:
        for handle in handles:
            handle.remove()
