"""Shapes and dtypes of what the C++ ops return, for compilers."""

from __future__ import annotations

import torch
from torch import Tensor


def register() -> None:
    """Give every op of the loaded library its fake kernel."""
    for name, fake in (("lookup_reduce", _lookup_reduce),):
        torch.library.register_fake(f"ultramem_native::{name}", fake)


def _lookup_reduce(values_ND: Tensor, indices_TK: Tensor, scores_TKC: Tensor, num_blocks: int) -> Tensor:
    return values_ND.new_empty(indices_TK.shape[0], num_blocks, values_ND.shape[1])
