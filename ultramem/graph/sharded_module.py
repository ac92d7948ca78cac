"""What modules share of which every process holds a part: names and shapes of the whole, its state, its first numbers.

Shapes: N rows of the whole, whatever they are (value rows, experts).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from ultramem.graph.table_shard import TableShard
from ultramem.ops.parts import local_part

_CHUNK_ELEMENTS = 2**22
_DRAWN_AT_ONCE = 16  # normal numbers that PyTorch draws together on a CPU


@runtime_checkable
class Sharded(Protocol):
    """A module whose parameters are parts of larger ones."""

    shard: TableShard

    @property
    def whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole, by parameter."""
        ...


class Part(NamedTuple):
    """A parameter that is a part of a larger one."""

    parameter: nn.Parameter
    shard: TableShard
    shape: tuple[int, ...]
    """Of the whole."""


def parts_of(model: nn.Module) -> dict[str, Part]:
    """The parameters of `model` of which other ranks hold the rest, by name."""
    parts = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Sharded):
            for name, shape in module.whole_shapes.items():
                full_name = f"{prefix}.{name}" if prefix else name
                parts[full_name] = Part(getattr(module, name), module.shard, shape)
    return parts


def keep_state_whole(module: nn.Module) -> None:
    """Have `state_dict` give a sharded module's parameters as DTensors, and `load_state_dict` take such."""
    module.register_state_dict_post_hook(_as_dtensors)
    module.register_load_state_dict_pre_hook(_to_local)


def _as_dtensors(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    sharded = cast(Sharded, module)
    for name, shape in sharded.whole_shapes.items():
        state[prefix + name] = sharded.shard.as_dtensor(state[prefix + name], shape)


def _to_local(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name in cast(Sharded, module).whole_shapes:
        tensor = state.get(prefix + name)
        if tensor is not None:
            state[prefix + name] = local_part(tensor)


@torch.no_grad()
def draw_part_(part: Tensor, shape: tuple[int, ...], shard: TableShard, *, std: float) -> None:
    """Fill a part with the normal numbers that it would have if all [N,...] of `shape` were drawn; a few at a time."""
    rows, columns = shape[0], math.prod(shape[1:])
    kept_rows, kept_columns = shard.slices(rows, columns)
    matrix = part.view(part.shape[0], -1)
    for begin, end in _chunks(rows, columns):
        chunk = torch.empty(end - begin, columns, dtype=part.dtype, device=part.device).normal_(std=std)
        first, last = max(begin, kept_rows.start), min(end, kept_rows.stop)
        if first < last:
            kept = chunk[first - begin : last - begin, kept_columns]
            matrix[first - kept_rows.start : last - kept_rows.start] = kept


def _chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Rows to draw at a time, so that the generator gives what it would give for all of them at once."""
    together = _DRAWN_AT_ONCE // math.gcd(_DRAWN_AT_ONCE, columns)
    step = max(1, _CHUNK_ELEMENTS // columns // together) * together
    starts = list(range(0, rows, step))
    if len(starts) > 1 and (rows - starts[-1]) * columns < _DRAWN_AT_ONCE:
        starts.pop()
    yield from zip(starts, [*starts[1:], rows], strict=True)
