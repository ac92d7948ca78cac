"""One safetensors file, written and read by one process, or by ranks that each hold a part: nobody has a table twice.

The file is mapped, so that what is written is no copy in memory. The ranks see the same file system.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ultramem.graph.mapped_weights import map_weights
from ultramem.ops.parts import is_dtensor, local_part

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

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


@torch.no_grad()
def write_parts(
    path: Path, tensors: dict[str, Tensor], *, is_main: bool = True, wait: Callable[[], None] = lambda: None
) -> None:
    """Write `path` together, whole or not at all. With the defaults this process is alone.

    Args:
        path: of the file.
        tensors: by name, the same on all ranks: DTensors of which each rank holds a part, and tensors that all have.
        is_main: on one rank.
        wait: until all ranks have called it.

    Raises:
        OSError: the disk is full, or the file may not be written.
    """
    temporary = path.with_name(f".{path.name}.parts.tmp")
    try:
        _write_temporary(temporary, tensors, is_main=is_main, wait=wait)
        if is_main:
            temporary.replace(path)
    finally:
        if is_main:
            temporary.unlink(missing_ok=True)
    wait()


def _write_temporary(temporary: Path, tensors: dict[str, Tensor], *, is_main: bool, wait: Callable[[], None]) -> None:
    header, starts = _layout(tensors)
    if is_main:
        with temporary.open("wb") as file:
            file.write(header)
            file.flush()
            _reserve(file.fileno(), len(header) + sum(_bytes(each) for each in tensors.values()))
    wait()
    everything = torch.from_file(str(temporary), shared=True, size=temporary.stat().st_size, dtype=torch.uint8)
    for name, tensor in tensors.items():
        if not tensor.numel() or not (_writes(tensor) if is_dtensor(tensor) else is_main):
            continue
        begin = len(header) + starts[name]
        whole = everything[begin : begin + _bytes(tensor)].view(tensor.dtype).view(tensor.shape)
        for piece, place in _chunks(_local(tensor), _place(tensor)):
            whole[place] = piece.cpu()
    del everything
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    wait()


def _reserve(file: int, size: int) -> None:
    """Make a file of `size` bytes for which there is room: writing to a mapped page that has none ends the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)


@torch.no_grad()
def read_parts(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place, each rank with its part of what the file has under the same name.

    Raises:
        ValueError: the file lacks a name, or has another shape under it.
    """
    found = map_weights(path)  # mapped for reading, which costs no memory of the process's own
    for name, tensor in tensors.items():
        if name not in found:
            raise ValueError(f"{path} has no tensor {name}")
        source = found[name]
        if source.shape != tensor.shape:
            raise ValueError(f"{path}: {name} is {tuple(source.shape)}, expected {tuple(tensor.shape)}")
        if tensor.ndim == 0:
            tensor.copy_(source)
            continue
        for piece, place in _chunks(_local(tensor), _place(tensor)):
            piece.copy_(source[place])


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


def _place(tensor: Tensor) -> tuple[slice, ...]:
    """Where in the whole tensor this rank's part lies."""
    local, offset = _local(tensor), (0,) * tensor.ndim
    if is_dtensor(tensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        _, offset = compute_local_shape_and_global_offset(tuple(tensor.shape), tensor.device_mesh, tensor.placements)
    return tuple(slice(first, first + size) for first, size in zip(offset, local.shape, strict=True))


def _writes(tensor: DTensor) -> bool:
    """Whether this rank is the first of those that hold the same part."""
    from torch.distributed.tensor import Replicate

    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    copies = zip(coordinate, tensor.placements, strict=True)
    return all(place == 0 for place, how in copies if isinstance(how, Replicate))


def _local(tensor: Tensor) -> Tensor:
    return local_part(tensor) if is_dtensor(tensor) else tensor.detach()


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()


def _chunks(local: Tensor, place: tuple[slice, ...]) -> Iterator[tuple[Tensor, tuple[slice, ...]]]:
    """A part in pieces of a few megabytes along its first dimension, each with its place in the whole."""
    if not local.ndim:
        yield local, place
        return
    size = local.shape[0]
    step = max(1, _CHUNK_BYTES * size // max(_bytes(local), 1))
    for first in range(0, size, step):
        last = min(first + step, size)
        start = place[0].start
        yield local[first:last], (slice(start + first, start + last), *place[1:])
