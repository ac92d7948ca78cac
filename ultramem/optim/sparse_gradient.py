"""Sparse gradients as autograd leaves them: added up by concatenation, and no longer marked as coalesced."""

from __future__ import annotations

import torch
from torch import Tensor


def coalesced(gradient: Tensor) -> Tensor:
    """A sparse COO gradient with each row named once, in ascending order. Reads one truth value on the host.

    One lookup names its rows so already, but the mark is lost on the way through the compiler; sorting them again is
    what is saved here.
    """
    if gradient.is_coalesced():
        return gradient
    rows_U = gradient._indices()[0]
    if bool((rows_U[1:] > rows_U[:-1]).all()):
        return torch.sparse_coo_tensor(
            gradient._indices(), gradient._values(), gradient.shape, is_coalesced=True, check_invariants=False
        )
    return gradient.coalesce()
