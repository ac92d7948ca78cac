"""What autograd keeps for a backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def kept_for_backward(module: nn.Module, run: Callable[[], object]) -> int:
    """Bytes of all storages that autograd keeps in `run()`, weights and buffers of the module apart."""
    weights = {each.untyped_storage().data_ptr() for each in (*module.parameters(), *module.buffers())}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in kept.values())
