"""How many different rows of the value tables a forward reads."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from ultramem.graph import Transformer
from ultramem.graph.value_table import ValueTable
from ultramem.runtime.profile.measure import Inputs
from ultramem.runtime.profile.request_schema import RowUse
from ultramem.runtime.profile.schema import DECODE, PREFILL
from ultramem.runtime.row_reads import noted_reads, whole_shapes


@torch.no_grad()
def rows_touched(model: Transformer, inputs: Inputs) -> list[RowUse]:
    """Row use of the prefill and of the decode step after it, a record for each table.

    Args:
        model: eager, in eval mode; on whichever device.
        inputs: tokens of one batch, as all engines get them.
    """
    device = model.embedding.weight.device
    paths = {module: path for path, module in model.named_modules()}
    with noted_reads(model) as noted:

        def records(phase: str) -> list[RowUse]:
            reads: dict[ValueTable, list[Tensor]] = defaultdict(list)
            for each in noted:
                reads[each.table].append(each.rows_R)
            noted.clear()
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
            return found

        cache = model(inputs.prompt_BS.to(device)).cache
        found = records(PREFILL)
        model(inputs.next_B1.to(device), cache=cache)
        return found + records(DECODE)
