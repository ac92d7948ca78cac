"""The PyTorch operators inside a call of an op of ours."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_COMPUTE_NOTHING = ("empty", "new_empty", "_unsafe_view")


class Call(NamedTuple):
    """An operator, and the bytes of its tensor arguments and results, each once."""

    name: str
    num_bytes: int


class OperatorRecorder(TorchDispatchMode):
    """Writes down every operator that computes something, composite ones and our own by what is inside them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        with self:
            if func.namespace == "ultramem":
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
            inner = func.decompose(*args, **kwargs)
        if inner is not NotImplemented:
            return inner
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(_COMPUTE_NOTHING):
            leaves = pytree.tree_leaves((args, kwargs, result))
            self.calls.append(Call(name, sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))))
        return result
