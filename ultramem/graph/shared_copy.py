"""A copy of a model that shares with it whatever is not replaced, so that a table is never held twice for nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from ultramem.graph.value_table import ValueTable

Model = TypeVar("Model", bound=nn.Module)


def shared_copy(
    model: Model,
    *,
    tensors: Callable[[Tensor], Tensor] | None = None,
    modules: Callable[[nn.Module], nn.Module | None] | None = None,
) -> Model:
    """A model with modules of its own whose weights are those of `model`.

    Args:
        model: stays as it is.
        tensors: what each parameter or buffer becomes; None: each is shared.
        modules: what to put in the place of a module, whose insides are then not looked at; or None to copy it.

    Raises:
        ValueError: a table is stale, so that its rows mean nothing without its optimiser.
    """
    for table in model.modules():
        if isinstance(table, ValueTable) and (table.lazy_rows is not None or table.lazy_experts is not None):
            raise ValueError("the tables must be up to date to be shared: load the saved weights (ultramem.load)")
    memo: dict[int, Any] = {}
    kept: list[nn.Module] = []  # an id is unique as long as its object lives
    for module in model.modules():
        made = modules(module) if modules is not None else None
        if made is not None:
            memo[id(module)] = made
            kept.append(module)
            # deepcopy does not go into a replaced module, so neither must its tensors be converted.
            for tensor in (*module.parameters(), *module.buffers()):
                memo[id(tensor)] = tensor
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in memo:
            memo[id(tensor)] = _converted(tensor, tensors)
    # deepcopy gives back what stands in the memo, and only copies the rest: modules, configs.
    twin: Model = copy.deepcopy(model, memo)
    return twin


def _converted(tensor: Tensor, convert: Callable[[Tensor], Tensor] | None) -> Tensor:
    if convert is None:
        return tensor
    made = convert(tensor.detach())
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
