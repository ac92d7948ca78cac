"""Rows of a table that is mapped from a file: the system reads those that are named, all at once and in the background.

Without it a lookup waits for row after row, each at its first touch.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from functools import cache

from torch import Tensor


@cache
def _madvise() -> Callable[[int, int, int], int]:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


def ask_for_rows(rows_ND: Tensor, index: Tensor) -> None:
    """Tell Linux which rows of a mapped table will be read soon, and return before they are there.

    A row that is in memory already costs the call and no more. Nothing happens on another system.

    Args:
        rows_ND: contiguous, on the CPU, its memory mapped from a file.
        index: rows, int64, of any shape; the same row may be named again.
    """
    if sys.platform != "linux":
        return
    madvise, start, row_bytes = _madvise(), rows_ND.data_ptr(), rows_ND.stride(0) * rows_ND.element_size()
    for row in index.unique().tolist():
        begin = start + row * row_bytes
        page = begin // mmap.PAGESIZE * mmap.PAGESIZE
        madvise(page, begin + row_bytes - page, mmap.MADV_WILLNEED)


def expect_single_rows(rows_ND: Tensor) -> None:
    """Tell Linux that single rows of a mapped table are read, so that a row is not read with 128 KB of its neighbours.

    Nothing happens on another system.

    Args:
        rows_ND: contiguous, on the CPU, its memory mapped from a file.
    """
    if sys.platform != "linux":
        return
    begin = -(-rows_ND.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # pages that the table has for itself
    end = (rows_ND.data_ptr() + rows_ND.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        _madvise()(begin, end - begin, mmap.MADV_RANDOM)
