"""Huge pages for a table: random rows of a large one cost a walk through the page tables each."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # of <linux/mman.h>; Python's mmap names the first alone


def advise_huge_pages(tensor: Tensor) -> bool:
    """Ask Linux to back the memory of a CPU tensor with huge pages, those that it has already included.

    Worth it for tables beyond some 100 MB whose rows are looked up at random. Values do not change. The pages stay
    huge for as long as the tensor's memory lives. Where the system's setting
    (`/sys/kernel/mm/transparent_hugepage/enabled`) is `always` or `madvise`, that is; collapsing what is there already
    takes about the time of a copy, and needs Linux 6.1.

    Returns:
        Whether Linux took the advice: False on another system, for a tensor that is not on the CPU or not contiguous,
        or smaller than a page, and where huge pages are turned off.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous():
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
