"""A table's gradient as a sparse tensor of touched rows, in graphs that a compiler traces too."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def rows_gradient(rows_U: Tensor, row_grads_UD: Tensor, like_ND: Tensor) -> Tensor:
    """Sparse COO [N,D] from unique ascending rows and their gradients."""
    if type(rows_U) is not Tensor:  # a stand-in of a compiler that is tracing
        _let_inductor_compare_sparse_tensors()
    return torch.sparse_coo_tensor(rows_U.unsqueeze(0), row_grads_UD, like_ND.shape, check_invariants=False)


def _let_inductor_compare_sparse_tensors() -> None:
    """Mend Inductor where it asks a sparse tensor of its graph for a storage, which has none, and raises.

    It asks when a node upstream of the gradient was rewritten, which happens in whole models and not in small graphs
    (https://github.com/pytorch/pytorch/issues/170761, torch 2.13). Only what raised before behaves differently.
    """
    fx_utils: Any = sys.modules.get("torch._inductor.fx_utils")
    if fx_utils is None or getattr(fx_utils.get_storage, "knows_sparse", False):
        return
    get_storage = fx_utils.get_storage

    def get_storage_or_identity(tensor: Tensor) -> int:
        return int(get_storage(tensor)) if torch._C._has_storage(tensor) else id(tensor)

    get_storage_or_identity.knows_sparse = True  # type: ignore[attr-defined]
    fx_utils.get_storage = get_storage_or_identity
