"""The lookup alone, on uniform indices into a table of any size.

Shapes: T tokens, K slots a token, C cores, N rows, V value dim.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ultramem import ops
from ultramem.runtime.figures.agreement import require_lookup
from ultramem.runtime.figures.cases import Case
from ultramem.runtime.figures.expected import expected_distinct
from ultramem.runtime.figures.grown_table import rows_of
from ultramem.runtime.figures.rates import cycle, inputs_for, random_rows
from ultramem.runtime.profile.arithmetic import ADDRESS_BYTES, StageCost

SERIES = "lookup"
BLOCKS, CORES = 4, 2
CACHED_ROWS = 64


def lookup_case(buffer: Tensor, rows: int, width: int, *, tokens: int, slots: int) -> Case:
    """`ops.lookup_reduce` of `tokens` tokens with `slots` slots each."""
    values_NV = rows_of(buffer, rows, width)
    row_bytes = width * values_NV.element_size()
    generator = torch.Generator().manual_seed(rows)
    inputs = [
        (
            torch.randint(rows * BLOCKS, (tokens, slots), generator=generator).to(buffer.device),
            torch.rand(tokens, slots, CORES, generator=generator).to(buffer.device),
        )
        for _ in range(inputs_for(tokens * slots * row_bytes))
    ]
    require_lookup(values_NV, *inputs[0], BLOCKS)

    def cost(used: float) -> tuple[StageCost, ...]:
        moved = tokens * (slots * (CORES * values_NV.element_size() + ADDRESS_BYTES) + BLOCKS * row_bytes)
        return (StageCost("lookup", 2 * tokens * slots * width, 0, round(used * row_bytes), 0, moved),)

    # The same work on rows that all lie in the caches.
    few_NV = rows_of(buffer, CACHED_ROWS, width)
    twin_inputs = [(indices_TK % (CACHED_ROWS * BLOCKS), scores_TKC) for indices_TK, scores_TKC in inputs[:16]]
    used = sum((indices % rows).unique().numel() for indices, _ in inputs) / len(inputs)
    used_expected = expected_distinct(tokens * slots, rows)
    return Case(
        series=SERIES,
        engine="eager",
        x=rows,
        batch=tokens,
        costs=cost(used_expected),
        used_costs=cost(used),
        call=cycle([partial(ops.lookup_reduce, values_NV, *each, num_blocks=BLOCKS) for each in inputs]),
        table_rows=rows,
        row_bytes=row_bytes,
        used=used,
        used_expected=used_expected,
        twin=cycle([partial(ops.lookup_reduce, few_NV, *each, num_blocks=BLOCKS) for each in twin_inputs]),
        twin_costs=cost(CACHED_ROWS),
        twin_is=f"on a table of {CACHED_ROWS} rows",
        rows=random_rows(values_NV, tokens, slots, seed=rows),
    )
