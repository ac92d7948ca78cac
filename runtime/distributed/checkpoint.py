"""Checkpoints of a run over several ranks, by PyTorch's Distributed Checkpoint: every rank writes what it holds.

`step-00000250/` holds the tensors, and `step-00000250.json`, written after it, the step and a fingerprint of the
configuration. A checkpoint exists when its JSON does. Any number of ranks, and any placement, reads it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor

from ultramem.graph.sharded_module import Part, parts_of
from ultramem.graph.sharded_weights import read_parts, shapes_in
from ultramem.graph.weights import write_atomically
from ultramem.ops.parts import local_part
from ultramem.runtime.checkpoint import ONE_FILE, PARTS, keep_newest, newest_record, sync_folder
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


class CheckpointWriter:
    """Writes checkpoints while training goes on, one at a time.

    Tensors are copied before `save` returns, so that steps may change them in place; each rank copies what it holds.
    Threads of all ranks then write, in a process group of their own. When all parts are on disk, the main rank writes
    the record, and only then is there a checkpoint. A failed write is raised by the next call of any method.

    Args:
        folder: of the checkpoints.
        fingerprint: of the configuration.
        keep: how many checkpoints stay.
        ranks: that write, more than one; all of them make a writer, and call its methods, at the same time.
    """

    def __init__(self, folder: Path, fingerprint: str, *, keep: int, ranks: Ranks) -> None:
        self.folder, self.fingerprint, self.keep, self.ranks = folder, fingerprint, keep, ranks
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=ranks.parallel.timeout_s))
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-record")
        self.pending: Future[None] | None = None

    def save(self, step: int, state: dict[str, Tensor]) -> None:
        """Begin to write the checkpoint of `step`, once the one before is whole.

        Raises:
            OSError: the one before could not be written.
        """
        self.wait()
        path = self.folder / f"step-{step:08d}"

        def prepare() -> None:
            self.folder.mkdir(exist_ok=True)
            shutil.rmtree(path, ignore_errors=True)

        self.ranks.on_main(prepare)
        parts = async_save(dict(state), checkpoint_id=path, process_group=self.group, async_stager=_Copies())
        assert isinstance(parts, Future)
        self.pending = self.thread.submit(self._finish, parts, path, step)

    def wait(self) -> None:
        """Until the last checkpoint is whole.

        Raises:
            OSError: it could not be written.
        """
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        wait_for([pending])
        self.ranks.on_main(pending.result)  # the record's error too is everybody's
        pending.result()

    def close(self) -> None:
        """Let what was begun come to its end, whole or not; for a run that ends with an error."""
        if self.pending is not None:
            wait_for([self.pending])
        self.thread.shutdown()

    def _finish(self, parts: Future[Any], path: Path, step: int) -> None:
        try:
            parts.result()
        except CheckpointException as error:  # the same on all ranks, and no Exception
            rank, (cause, _) = next(iter(error.failures.items()))
            raise OSError(f"the checkpoint of step {step} could not be written: rank {rank}: {cause}") from error
        if not self.ranks.is_main:
            return
        sync_folder(path)
        record = {"format_version": PARTS, "step": step, "fingerprint": self.fingerprint}
        write_atomically(path.with_suffix(".json"), json.dumps(record, indent=2).encode() + b"\n")
        sync_folder(self.folder)
        keep_newest(self.folder, self.keep)


class _Copies(BlockingAsyncStager):
    """Copies of what a rank holds, on the CPU. (PyTorch's own stagers allocate a DTensor's part twice, torch 2.13.)"""

    @torch.no_grad()
    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {name: self._copy(tensor) for name, tensor in state_dict.items()}

    def _copy(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor.to("cpu", copy=True)
        copy = cast(DTensor, tensor.detach())
        copy._local_tensor = tensor.to_local().to("cpu", copy=True)
        return cast(Tensor, copy)


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
        ValueError: it cannot be read, or was made under another configuration.
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
            if not isinstance(parameter, DTensor):  # a part of a cut table, whose state is plain too
                loaded = {key: local_part(each) for key, each in loaded.items()}
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
        try:
            load_parts(state, checkpoint_id=self.path, no_dist=not dist.is_initialized())
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise ValueError(f"checkpoint {self.path} cannot be read: rank {rank}: {cause}") from error


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
