"""Bytes that collectives send, counted as the dispatcher sees them: on any backend, PyTorch's fake one included.

Conventions, for a group of P ranks; the share of a rank to itself is not counted:

| collective | bytes sent to others |
| --- | --- |
| all-to-all | those of the splits for other ranks |
| all-gather | (P-1) times the input |
| reduce-scatter | (P-1)/P of the input: a chunk for every other rank |
| all-reduce | 2 (P-1)/P of the tensor, as a ring sends |
| broadcast | (P-1) times the tensor on the source, else nothing |
| barriers, waiting, receiving | nothing |

Compiled code does not pass the dispatcher: count in eager mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_NAMESPACES = ("_c10d_functional::", "c10d::")
_KINDS = {
    "all_to_all_single": "all_to_all",
    "alltoall_base_": "all_to_all",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_out": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "all_reduce_coalesced_": "all_reduce",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "broadcast": "broadcast",
    "broadcast_": "broadcast",
}
_SILENT = (
    "_wrap_tensor_autograd",
    "wait_tensor",
    "barrier",
    "monitored_barrier_",
    "check_for_nan",
    "recv_",
    "recv_any_source_",
    "irecv",
)
_INPUTS = ("input", "inputs", "input_tensor", "input_tensors", "tensors")
"""What the operators call the tensors that they send."""


class Sent(NamedTuple):
    """What one collective sent."""

    kind: str
    dtype: torch.dtype
    ranks: int
    """Of its group."""
    sent_bytes: int
    """To other ranks."""


class CountBytes(TorchDispatchMode):
    """Counts what collectives send while it is entered: `with CountBytes() as count: ...`, then `count.sent`.

    Raises, from within the collective:
        NotImplementedError: its bytes are not known here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Sent] = []

    @property
    def total_bytes(self) -> int:
        """Of all collectives so far."""
        return sum(each.sent_bytes for each in self.sent)

    def by_kind(self) -> dict[str, int]:
        """Bytes by kind of collective, those without any left out."""
        found: dict[str, int] = {}
        for each in self.sent:
            found[each.kind] = found.get(each.kind, 0) + each.sent_bytes
        return {kind: sent for kind, sent in found.items() if sent}

    def take(self) -> list[Sent]:
        """What was sent since the last time, for counting phase by phase."""
        taken, self.sent = self.sent, []
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith(_NAMESPACES):
            self._count(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        name = func.name().split("::")[1].split(".")[0]
        if name in _SILENT:
            return
        if name not in _KINDS:
            raise NotImplementedError(
                f"collective: the bytes of {func.name()} are not known, those of {list(_KINDS)} are"
            )
        named = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
        tensors = _tensors(next(named[each] for each in _INPUTS if each in named))
        group = _group(named)
        sent = sum(_sent_bytes(_KINDS[name], tensor, named, group) for tensor in tensors)
        self.sent.append(Sent(_KINDS[name], tensors[0].dtype, group.size(), sent))


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _group(named: dict[str, Any]) -> dist.ProcessGroup:
    group: dist.ProcessGroup
    if "group_name" in named:
        resolve = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]  # not exported by name
        group = resolve(named["group_name"])
    else:
        group = dist.ProcessGroup.unbox(named["process_group"])
    return group


def _sent_bytes(kind: str, tensor: Tensor, named: dict[str, Any], group: dist.ProcessGroup) -> int:
    ranks, rank = group.size(), group.rank()
    size = tensor.numel() * tensor.element_size()
    if kind == "all_to_all":
        splits = named["input_split_sizes"]
        if not splits:
            return size - size // ranks
        row_bytes = math.prod(tensor.shape[1:]) * tensor.element_size()
        return int(sum(splits) - splits[rank]) * row_bytes
    if kind == "all_gather":
        return (ranks - 1) * size
    if kind == "reduce_scatter":
        return size - size // ranks
    if kind == "all_reduce":
        return 2 * (size - size // ranks)
    source = named["src"] if "src" in named else named["root_rank"]
    return (ranks - 1) * size if source == rank else 0
