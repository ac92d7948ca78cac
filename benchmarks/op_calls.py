"""The PyTorch operators inside a call of an op of ours."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_COMPUTE_NOTHING = ("empty", "new_empty", "_unsafe_view", "_sparse_coo_tensor", "_coalesced")


class Call(NamedTuple):
    """An operator, and the bytes of its tensor arguments and results, each once."""

    name: str
    num_bytes: int


class OperatorRecorder(TorchDispatchMode):
    """Writes down every operator that computes something, composite ones and our own by what is inside them.

    Attributes:
        calls: in their order.
        bodies: the last calls inside each op of ours, by its name.
        paused: nothing is written down.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.bodies: dict[str, list[Call]] = {}
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        with self:
            if func.namespace == "ultramem":
                before = len(self.calls)
                result = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
                self.bodies[name] = self.calls[before:]
                return result
            inner = func.decompose(*args, **kwargs)
        if inner is not NotImplemented:
            return inner
        result = func(*args, **kwargs)
        if not func.is_view and not name.startswith(_COMPUTE_NOTHING):
            leaves = pytree.tree_leaves((args, kwargs, result))
            dense = (leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.layout == torch.strided)
            self.calls.append(Call(name, sum(leaf.nbytes for leaf in dense)))
        return result
