"""Checkpoints of a training run: weights and optimiser state as safetensors, never pickled, whole or absent.

`step-00000250.safetensors` holds the tensors; `step-00000250.json`, written after it, holds the step, a fingerprint of
the configuration and the sha256 of the tensors. A checkpoint exists when its JSON does.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ultramem.graph.sharded_weights import write_parts
from ultramem.graph.weights import write_atomically

ONE_FILE, PARTS = 1, 2
"""Format versions: a file, of one process; a folder of parts, of several ranks (`ultramem.runtime.distributed`)."""


class Record(NamedTuple):
    """A checkpoint that exists."""

    path: Path
    """The file, or the folder of parts."""
    step: int
    """Steps that are done."""
    format_version: int


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], fingerprint: str, *, keep: int) -> None:
    """Write the checkpoint of `step` and delete all but the newest `keep`."""
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}.safetensors"
    write_parts(path, tensors)
    record = {
        "format_version": ONE_FILE,
        "step": step,
        "fingerprint": fingerprint,
        "sha256": _sha256(path),
    }
    write_atomically(path.with_suffix(".json"), json.dumps(record, indent=2).encode() + b"\n")
    sync_folder(folder)
    keep_newest(folder, keep)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def keep_newest(folder: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep`, and what a killed process left behind."""
    records = sorted(folder.glob("step-*.json"))
    for old in records[:-keep]:
        old.unlink()  # the record first: tensors without one are no checkpoint
    whole = {record.stem for record in records[-keep:]}
    for leftover in folder.iterdir():
        if leftover.is_dir():
            if leftover.name not in whole:
                shutil.rmtree(leftover)
        elif leftover.suffix == ".tmp" or leftover.stem not in whole:
            leftover.unlink()


def newest_record(folder: Path, fingerprint: str) -> Record | None:
    """The newest checkpoint, or None if there is none.

    Raises:
        ValueError: it is damaged, or was made under another configuration.
    """
    records = sorted(folder.glob("step-*.json"))
    if not records:
        return None
    path = records[-1]
    try:
        record = json.loads(path.read_text())
        step, version = int(record["step"]), record["format_version"]
        if version == ONE_FILE:
            digest, tensors = record["sha256"], path.with_suffix(".safetensors")
            found = _sha256(tensors)
        elif version == PARTS:
            tensors = path.with_suffix("")
            if not (tensors / ".metadata").is_file():
                raise FileNotFoundError(f"{tensors} has no .metadata")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"checkpoint {path} is damaged ({type(error).__name__}: {error})") from error
    if version not in (ONE_FILE, PARTS):
        raise ValueError(f"checkpoint {path} must have format_version {ONE_FILE} or {PARTS}, got {version!r}")
    if record.get("fingerprint") != fingerprint:
        raise ValueError(f"checkpoint {path} was made under another configuration or text than this run's")
    if version == ONE_FILE and found != digest:
        raise ValueError(f"checkpoint {tensors} is damaged: its sha256 is not the one in {path.name}")
    return Record(tensors, step, version)


def state_tensors(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], others: dict[str, Tensor]
) -> dict[str, Tensor]:
    """All that a run goes on from, by name, on the CPU: weights, the state of each optimiser, and `others`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, tensor in state.items():
                tensors[f"optimizer.{names[id(parameter)]}/{key}"] = tensor
    tensors |= {f"other.{name}": tensor for name, tensor in others.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def sync_folder(folder: Path) -> None:
    """Make renames in the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
