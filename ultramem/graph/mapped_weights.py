"""A safetensors file as tensors whose memory is the file: a weight costs no memory of the process's own.

Pages are read when they are first touched. They belong to the system's cache of files: processes share them, and where
memory runs short they are dropped and read again. A mapping that nobody can write to is not what RLIMIT_DATA counts;
one that is copied where it is written to (`safetensors.torch.load_file`) is.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_LENGTH_BYTES = 8  # a safetensors file begins with the length of its header


class TensorPlace(NamedTuple):
    """Where in a file a tensor stands."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """Of its bytes, from the start of the file."""
    end: int


def map_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped for reading.

    Nothing may be written into them: that ends the process (SIGSEGV). The file may be replaced or removed while they
    live; cutting it short ends the process that reads what is gone (SIGBUS).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole safetensors file, or a tensor's type or place in it can't be mapped.
    """
    with path.open("rb") as file:
        places = tensor_places(path, file)
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # as it should be
        whole = torch.frombuffer(pages, dtype=torch.uint8)  # keeps the mapping as long as a tensor lives
    return {name: whole[place.begin : place.end].view(place.dtype).view(place.shape) for name, place in places.items()}


def tensor_places(path: Path, file: BinaryIO) -> dict[str, TensorPlace]:
    """Where each tensor of a safetensors file stands.

    Args:
        path: for messages.
        file: open at its start.

    Raises:
        ValueError: as `map_weights`.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    start = _LENGTH_BYTES + length
    if start > size:
        raise _broken(path, f"its header should take {length} bytes, the file has {size}")
    try:
        header = json.loads(file.read(length))
    except ValueError as error:
        raise _broken(path, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    places = dict(_places(path, header, start))
    expected = start
    for name, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.begin != expected:
            raise _broken(path, f"{name} should begin at byte {expected}, not {place.begin}")
        expected = place.end
    if expected != size:
        raise _broken(path, f"it should have {expected} bytes, not {size}")
    return places


def _places(path: Path, header: dict[str, Any], start: int) -> Iterator[tuple[str, TensorPlace]]:
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers = (*shape, begin, end)
        except (KeyError, TypeError, ValueError) as error:
            raise _broken(path, f"its header says of {name}: {entry!r}") from error
        if any(type(number) is not int or number < 0 for number in numbers):
            raise _broken(path, f"its header says of {name}: {entry!r}")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"{path} can't be mapped: {name} must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        item_bytes = _DTYPES[dtype].itemsize
        if end - begin != math.prod(shape) * item_bytes:
            raise _broken(path, f"its header says of {name}: {entry!r}")
        if (start + begin) % item_bytes:
            raise ValueError(
                f"{path} can't be mapped: {name} must begin at a multiple of {item_bytes} bytes, as safetensors "
                f"writes it, got byte {start + begin}"
            )
        yield name, TensorPlace(_DTYPES[dtype], shape, start + begin, start + end)


def _broken(path: Path, problem: str) -> ValueError:
    return ValueError(f"{path} is not a whole safetensors file: {problem}")
