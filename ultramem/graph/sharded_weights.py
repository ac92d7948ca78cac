"""One safetensors file, written and read by ranks that each hold a part: nobody ever has the whole of a table.

The ranks see the same file system.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ultramem.graph.mapped_weights import map_weights

_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""In the order of tensors in a file that safetensors itself writes; by name, where types are the same."""
_CHUNK_BYTES = 64 * 2**20


def write_parts(path: Path, tensors: dict[str, Tensor], *, is_main: bool, wait: Callable[[], None]) -> None:
    """Write `path` together, whole or not at all.

    Args:
        path: of the file.
        tensors: by name, the same on all ranks: DTensors of which each rank holds a part, and tensors that all have.
        is_main: on one rank.
        wait: until all ranks have called it.
    """
    temporary = path.with_name(f".{path.name}.parts.tmp")
    header, starts = _layout(tensors)
    if is_main:
        with temporary.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(_bytes(each) for each in tensors.values()))
    wait()
    for name, tensor in tensors.items():
        part = _part(tensor)
        if part is None or not (is_main or isinstance(tensor, DTensor)):
            continue
        local, rows, columns = part
        whole = np.memmap(temporary, np.uint8, "r+", len(header) + starts[name], _as_matrix(tensor))
        width = tensor.element_size()
        for first, last in _chunks(len(local), _bytes(local)):
            data = local[first:last].cpu().contiguous().view(torch.uint8).numpy()
            whole[rows.start + first : rows.start + last, columns.start * width : columns.stop * width] = data
        whole.flush()
    wait()
    if is_main:
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    wait()


@torch.no_grad()
def read_parts(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place, each rank with its part of what the file has under the same name.

    Raises:
        ValueError: the file lacks a name, or has another shape under it.
    """
    found = map_weights(path)
    for name, tensor in tensors.items():
        if name not in found:
            raise ValueError(f"{path} has no tensor {name}")
        source = found[name]
        if source.shape != tensor.shape:
            raise ValueError(f"{path}: {name} is {tuple(source.shape)}, expected {tuple(tensor.shape)}")
        if tensor.ndim == 0:
            tensor.copy_(source)
            continue
        part = _part(tensor, every_copy=True)
        assert part is not None
        local, rows, columns = part
        for first, last in _chunks(len(local), _bytes(local)):
            piece = slice(rows.start + first, rows.start + last)
            _local(tensor)[first:last].copy_(source[piece, columns] if tensor.ndim == 2 else source[piece])


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a file."""
    return {name: tuple(tensor.shape) for name, tensor in map_weights(path).items()}


def _layout(tensors: dict[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """The head of the file, and where each tensor begins after it; both as safetensors would have them."""
    entries, starts, offset = {}, {}, 0
    order = list(_NAMES)
    for name, tensor in sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        starts[name] = offset
        end = offset + _bytes(tensor)
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts


def _part(tensor: Tensor, *, every_copy: bool = False) -> tuple[Tensor, slice, slice] | None:
    """What this rank writes, as a matrix [rows, columns], and where; None where another rank has the same."""
    local, shape = _local(tensor), tuple(tensor.shape)
    offset: tuple[int, ...] = (0,) * tensor.ndim
    if isinstance(tensor, DTensor):
        _, offset = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
        coordinate = tensor.device_mesh.get_coordinate()
        assert coordinate is not None
        copies = zip(coordinate, tensor.placements, strict=True)
        if not every_copy and any(place > 0 for place, how in copies if isinstance(how, Replicate)):
            return None
    matrix = local.reshape(local.shape[0], -1) if local.ndim else local.reshape(1, 1)
    first = offset[0] if offset else 0
    column = offset[1] if tensor.ndim == 2 else 0
    return matrix, slice(first, first + matrix.shape[0]), slice(column, column + matrix.shape[1])


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _as_matrix(tensor: Tensor) -> tuple[int, int]:
    """Rows and bytes a row of the whole tensor."""
    rows = tensor.shape[0] if tensor.ndim else 1
    return rows, math.prod(tensor.shape[1:]) * tensor.element_size()


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()


def _chunks(rows: int, size: int) -> Iterator[tuple[int, int]]:
    """Rows at a time, so that no more than a few megabytes are copied at once."""
    step = max(1, _CHUNK_BYTES * rows // max(size, 1))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)
