"""Which rows of its value tables a model reads: noted at its own lookups, not arithmetic.

Shapes: T tokens, H heads, M slots per head, K = H*M slots, R = T*K reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from ultramem.graph.memory_layer import Lookup
from ultramem.graph.sharded_table import ShardedValueTable
from ultramem.graph.value_table import ValueTable


class RowReads(NamedTuple):
    """Of one call of a memory layer's lookup."""

    lookup: str
    """Path of the module."""
    table: ValueTable
    rows_R: Tensor
    """Of the whole table, int64."""


def whole_shapes(table: ValueTable) -> list[tuple[int, ...]]:
    """Of the values and the experts' input rows, whichever ranks hold them."""
    if isinstance(table, ShardedValueTable):
        return list(table.whole_shapes.values())
    return [tuple(each.shape) for each in (table.values_NV, table.experts_NP) if each is not None]


@contextlib.contextmanager
def noted_reads(model: nn.Module) -> Iterator[list[RowReads]]:
    """A list that grows by one record for each lookup of an eager forward of `model`, in their order."""
    paths = {module: path for path, module in model.named_modules()}
    noted: list[RowReads] = []

    def before(module: nn.Module, args: Any) -> None:
        assert isinstance(module, Lookup)
        _, addresses_THM, _, table = args
        indices_TK = module.virtual_indices(addresses_THM.flatten(1))
        noted.append(RowReads(paths[module], table, (indices_TK % whole_shapes(table)[0][0]).flatten()))

    handles = [module.register_forward_pre_hook(before) for module in paths if isinstance(module, Lookup)]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()
