"""Value tables in the host's memory, which a GPU reads over the bus: rows cross it as they are looked up, tables never.

The pages are locked, so that the device may read them at any time, by the address that they have on the host. A tensor
on the device stands for them: kernels, compiled graphs and recorded ones take it as any other.
"""

from __future__ import annotations

import mmap
import weakref
from typing import Any

import torch
from torch import Tensor

from ultramem.graph.quantized_table import QuantizedValueTable
from ultramem.graph.shared_copy import Model, shared_copy
from ultramem.graph.value_table import ValueTable
from ultramem.ops.huge_pages import LARGE_BYTES, advise_huge_pages

_PORTABLE_AND_MAPPED = 1 | 2
"""Flags of cudaHostRegister: for every device, by an address of its own."""


def pin_tables(model: Model, device: torch.device | str) -> Model:
    """A copy of a model on a GPU whose value tables stay in the host's memory, in locked pages.

    A lookup then takes the bus's time for its rows instead of the device's memory: for tables that the device has no
    room for. Locked memory cannot be swapped out. The copy is for inference, and takes no gradients.

    Args:
        model: stays as it is. `ultramem.load(..., mmap=True)` has tables in no memory of the process's own.
        device: of CUDA.

    Raises:
        ValueError: the device is not of CUDA, or the tables are stale.
        RuntimeError: the system will not lock so much memory.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"device must be of CUDA for tables in pinned memory, got {device}")
    tables = [module for module in model.modules() if isinstance(module, ValueTable | QuantizedValueTable)]
    tensors = (tensor for table in tables for tensor in (*table.parameters(), *table.buffers()))
    rows = {tensor.data_ptr() for tensor in tensors if tensor.ndim == 2}  # scales of rows go to the device

    def moved(tensor: Tensor) -> Tensor:
        return seen_from(device, tensor) if tensor.data_ptr() in rows else tensor.to(device)

    pinned = shared_copy(model, tensors=moved)
    for module in pinned.modules():
        if isinstance(module, ValueTable):
            module.is_mapped = False
    return pinned.requires_grad_(False)


def seen_from(device: torch.device, tensor: Tensor) -> Tensor:
    """A tensor on a CUDA `device` with the numbers of another, which lie in locked pages of the host.

    Raises:
        RuntimeError: the system will not lock so much memory.
    """
    pages = _own_pages(tensor.nbytes)
    host = pages[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    host.copy_(tensor)
    with torch.cuda.device(device):
        seen = torch.as_tensor(_Locked(pages), device=device)
    return seen[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def _own_pages(size: int) -> Tensor:
    """Bytes in pages that nothing else is in: no page may be locked twice."""
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    room = torch.empty(whole + mmap.PAGESIZE, dtype=torch.uint8)
    advise_huge_pages(room, at_least_bytes=LARGE_BYTES)
    start = -room.data_ptr() % mmap.PAGESIZE
    return room[start : start + whole]


class _Locked:
    """Locks pages of the host for as long as it lives; a tensor that is made from it keeps it alive."""

    def __init__(self, pages: Tensor) -> None:
        runtime: Any = torch.cuda.cudart()
        address = pages.data_ptr()
        status = runtime.cudaHostRegister(address, pages.nbytes, _PORTABLE_AND_MAPPED)
        if int(status):
            raise RuntimeError(f"{pages.nbytes} bytes of the host's memory could not be locked: {status}")
        # The pages outlive their lock; at the end of the process the driver lets go of both.
        weakref.finalize(self, _unlock, runtime, pages).atexit = False
        self.__cuda_array_interface__ = {
            "shape": (pages.nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def _unlock(runtime: Any, pages: Tensor) -> None:
    runtime.cudaHostUnregister(pages.data_ptr())
