"""Checkpoints of a training run: weights and optimiser state as safetensors, never pickled, whole or absent.

`step-00000250.safetensors` holds the tensors; `step-00000250.json`, written after it, holds the step, a fingerprint of
the configuration and the sha256 of the tensors. A checkpoint exists when its JSON does.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ultramem.graph.weights import write_atomically

FORMAT_VERSION = 1


class Checkpoint(NamedTuple):
    step: int
    """Steps that are done."""
    tensors: dict[str, Tensor]


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], fingerprint: str, *, keep: int) -> None:
    """Write the checkpoint of `step` and delete all but the newest `keep`."""
    from safetensors.torch import save

    folder.mkdir(exist_ok=True)
    data = save(tensors)
    path = folder / f"step-{step:08d}.safetensors"
    record = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "fingerprint": fingerprint,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_atomically(path, data)
    write_atomically(path.with_suffix(".json"), json.dumps(record, indent=2).encode() + b"\n")
    _sync_folder(folder)
    for old in _records(folder)[:-keep]:
        old.unlink()  # the record first: a file of tensors without one is no checkpoint
        old.with_suffix(".safetensors").unlink(missing_ok=True)
    whole = {record.stem for record in _records(folder)}
    for leftover in folder.iterdir():  # what a killed process left behind
        if leftover.suffix == ".tmp" or leftover.stem not in whole:
            leftover.unlink()


def load_latest_checkpoint(folder: Path, fingerprint: str) -> Checkpoint | None:
    """The newest checkpoint, or None if there is none.

    Raises:
        ValueError: it is damaged, or was made under another configuration.
    """
    from safetensors.torch import load

    records = _records(folder)
    if not records:
        return None
    path = records[-1]
    tensors_path = path.with_suffix(".safetensors")
    try:
        record = json.loads(path.read_text())
        step, digest, version = int(record["step"]), record["sha256"], record["format_version"]
        data = tensors_path.read_bytes()
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"checkpoint {path} is damaged ({type(error).__name__}: {error})") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"checkpoint {path} must have format_version {FORMAT_VERSION}, got {version!r}")
    if record.get("fingerprint") != fingerprint:
        raise ValueError(f"checkpoint {path} was made under another configuration or text than this run's")
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"checkpoint {tensors_path} is damaged: its sha256 is not the one in {path.name}")
    return Checkpoint(step, load(data))


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


def restore(
    tensors: dict[str, Tensor], model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """Put the tensors of `state_tensors` into a model and optimisers of the same configuration; returns the others."""
    model.load_state_dict(_under("model.", tensors))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = _under(f"optimizer.{names[id(parameter)]}/", tensors)
                optimizer.state[parameter] = {name: tensor.to(parameter.device) for name, tensor in state.items()}
    return _under("other.", tensors)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _records(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.json"))


def _sync_folder(folder: Path) -> None:
    """Make renames in the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
