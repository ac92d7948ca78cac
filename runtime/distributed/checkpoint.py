"""Checkpoints of a run over several ranks, by PyTorch's Distributed Checkpoint: every rank writes what it holds.

`step-00000250/` holds the tensors, and `step-00000250.json`, written after it, the step and a fingerprint of the
configuration. A checkpoint exists when its JSON does. Any number of ranks, and any placement, reads it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.distributed.tensor import DTensor

from ultramem.graph.sharded_module import Part, parts_of
from ultramem.graph.sharded_weights import read_parts, shapes_in
from ultramem.graph.weights import write_atomically
from ultramem.optim import TableOptimizer
from ultramem.runtime.checkpoint import ONE_FILE, PARTS, keep_newest, newest_record
from ultramem.runtime.distributed.ranks import Ranks


def whole_state(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], others: dict[str, Tensor]
) -> dict[str, Tensor]:
    """All that a run goes on from, by name; what ranks hold parts of are DTensors. Nothing is copied."""
    parts = parts_of(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for optimizer in optimizers:
        for parameter, tensors in optimizer.state.items():
            name = names[id(parameter)]
            for key, tensor in tensors.items():
                if name in parts:
                    tensor = _as_whole(tensor, parts[name])
                state[f"optimizer.{name}/{key}"] = tensor
    return state | {f"other.{name}": tensor for name, tensor in others.items()}


def _as_whole(tensor: Tensor, part: Part) -> Tensor:
    """State of a part: of its shape, or a number a row, or one for all."""
    if tensor.shape == part.parameter.shape:
        return part.shard.as_dtensor(tensor, part.shape)
    if tensor.shape == part.parameter.shape[:1] and part.shard.placement == "rows":
        return part.shard.as_dtensor(tensor, part.shape[:1])
    return tensor


def save_sharded(
    folder: Path, step: int, state: dict[str, Tensor], fingerprint: str, *, keep: int, ranks: Ranks
) -> None:
    """Write the checkpoint of `step`, and delete all but the newest `keep`."""
    path = folder / f"step-{step:08d}"
    if ranks.is_main:
        folder.mkdir(exist_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    ranks.wait()
    save_parts(dict(state), checkpoint_id=path)
    ranks.wait()
    if not ranks.is_main:
        return
    record = {"format_version": PARTS, "step": step, "fingerprint": fingerprint}
    write_atomically(path.with_suffix(".json"), json.dumps(record, indent=2).encode() + b"\n")
    keep_newest(folder, keep)


@torch.no_grad()
def load_newest(
    folder: Path,
    fingerprint: str,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    others: dict[str, Tensor],
) -> int | None:
    """Put the newest checkpoint, of any number of ranks, into a model, its optimisers and the tensors of `others`.

    Returns:
        Its step, or None if there is none.

    Raises:
        ValueError: it is damaged, or was made under another configuration.
    """
    record = newest_record(folder, fingerprint)
    if record is None:
        return None
    start_states(optimizers)
    state = whole_state(model, optimizers, others)
    reader = _FileReader(record.path) if record.format_version == ONE_FILE else _FolderReader(record.path)
    for name, shape in reader.shapes().items():
        if name in state and tuple(state[name].shape) != shape:  # a schedule that has grown
            state[name] = state[name].new_empty(shape)
    reader.fill(state)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, tensors in list(optimizer.state.items()):
            prefix = f"optimizer.{names[id(parameter)]}/"
            loaded = {key: state[prefix + key] for key in tensors}
            if isinstance(optimizer, TableOptimizer):
                loaded = {key: each.to_local() if isinstance(each, DTensor) else each for key, each in loaded.items()}
            optimizer.state[parameter] = loaded
    for name, tensor in others.items():
        tensor.copy_(state[f"other.{name}"])
    return record.step


class _FileReader:
    """A checkpoint of one process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return shapes_in(self.path)

    def fill(self, state: dict[str, Tensor]) -> None:
        read_parts(self.path, state)


class _FolderReader:
    """A checkpoint of several ranks."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        entries = FileSystemReader(self.path).read_metadata().state_dict_metadata
        return {name: tuple(entry.size) for name, entry in entries.items() if hasattr(entry, "size")}

    def fill(self, state: dict[str, Tensor]) -> None:
        load_parts(state, checkpoint_id=self.path, no_dist=not dist.is_initialized())


def start_states(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Give AdamW the state that it makes in its first step, for a checkpoint to be read into."""
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.AdamW):
            continue
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if not optimizer.state[parameter]:
                    optimizer.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
                    }
