"""Huge pages for a table: random rows of a large one cost a walk through the page tables each."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor
from torch.nn import Parameter

LARGE_BYTES = 64 * 2**20
"""From here on random rows are worth huge pages: small ones would need more entries than processors cache."""

_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # of <linux/mman.h>; Python's mmap names the first alone


def advise_huge_pages(tensor: Tensor, *, at_least_bytes: int = 0) -> bool:
    """Ask Linux to back the memory of a CPU tensor with huge pages, those that it has already included.

    Worth it for large tables whose rows are looked up at random; `ultramem` asks for its own tables, of `LARGE_BYTES`
    and more, when it makes them. Values do not change. The pages stay huge for as long as the tensor's memory lives.
    Where the system's setting (`/sys/kernel/mm/transparent_hugepage/enabled`) is `always` or `madvise`, that is;
    collapsing what is there already takes about the time of a copy, and needs Linux 6.1.

    Args:
        tensor: any.
        at_least_bytes: smaller tensors are left alone.

    Returns:
        Whether Linux took the advice: False on another system, for a tensor that is not on the CPU, not contiguous or
        without memory (a fake one), or smaller than a page or `at_least_bytes`, and where huge pages are turned off.
    """
    if sys.platform != "linux" or type(tensor) not in (Tensor, Parameter) or tensor.nbytes < at_least_bytes:
        return False
    if not tensor.is_cpu or not tensor.is_contiguous():
        return False
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if end <= begin:
        return False
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if madvise(begin, end - begin, _MADV_HUGEPAGE):
        return False
    madvise(begin, end - begin, _MADV_COLLAPSE)  # as far as it goes: what it leaves, the kernel's own thread may do
    return True
