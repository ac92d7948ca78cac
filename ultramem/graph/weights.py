"""Weights on disk: `config.json` beside `model.safetensors`, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ultramem.config import FORMAT_VERSION, ModelConfig, from_dict, to_dict
from ultramem.graph.mapped_weights import map_weights, tensor_places
from ultramem.graph.sharded_weights import read_parts, write_parts
from ultramem.graph.table_shard import TableShard
from ultramem.graph.transformer import Transformer, build_model
from ultramem.graph.value_table import ValueTable
from ultramem.ops import expect_single_rows
from ultramem.ops.parts import local_part

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def write_atomically(path: Path, data: bytes) -> None:
    """Write `path` so that readers see the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_config(folder: Path, model_config: ModelConfig, **sections: dict[str, Any]) -> None:
    """Write config.json: a format version, the model, and the caller's sections ("train", "environment", ...)."""
    document = {"format_version": FORMAT_VERSION, "model": to_dict(model_config), **sections}
    write_atomically(folder / CONFIG_FILE, json.dumps(document, indent=2).encode() + b"\n")


def read_config(folder: Path) -> dict[str, Any]:
    """The document of config.json, its version checked.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is not JSON, or of a format that this version does not read.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no {CONFIG_FILE}")
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} must have format_version {FORMAT_VERSION}, got {version!r}")
    return dict(document)


def read_model_config(folder: Path) -> ModelConfig:
    document = read_config(folder)
    if not isinstance(document.get("model"), dict):
        raise ValueError(f"{folder / CONFIG_FILE} must hold an object 'model', got {document.get('model')!r}")
    return from_dict(ModelConfig, document["model"])


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write model.safetensors."""
    write_parts(folder / WEIGHTS_FILE, dict(model.state_dict()))


def load(
    run_or_folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    mmap: bool = False,
    shard: TableShard | None = None,
) -> Transformer:
    """The trained model of a run, in eval mode.

    Args:
        run_or_folder: a folder with config.json and model.safetensors.
        device: where to; None: the CPU.
        dtype: of the weights; None: as saved.
        mmap: weights are pages of model.safetensors that are read when they are first touched, shared with other
            processes and never copied, so that a table may be larger than the memory that the process may have. Such
            a model is for inference: its weights take no gradients, and writing into one ends the process.
        shard: the part of the value tables that this process holds; None: all of them. No more than that is read. With
            `tokens="same"` the weights take no gradients.

    Raises:
        FileNotFoundError: the folder, its config or its weights are missing.
        ValueError: the config or the weights are damaged or do not belong together, or mapped weights are asked for on
            another device, in another dtype than they have in the file, or in parts.
    """
    if mmap and shard is not None:
        raise ValueError("mmap must be False for a part of the tables, which is read from the file, got True")
    if mmap and torch.device(device or "cpu").type != "cpu":
        raise ValueError(f"device must be the CPU for weights that are mapped from a file, got {device}")
    folder = Path(run_or_folder)
    config = read_model_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_FILE}: the run has not finished (train it with --resume)")
    if shard is None:
        model = build_model(config, device="meta")
        tensors = map_weights(path) if mmap else _read_weights(path, device)
        _require_fits(model, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)
        if mmap:
            _require_as_saved(tensors, dtype)
        model.load_state_dict(tensors, assign=True)
    else:
        model = _load_parts(config, path, shard, device, dtype)
    is_trainable = not mmap and (shard is None or shard.tokens == "own")
    for parameter in model.parameters():
        parameter.requires_grad_(is_trainable)
    for module in model.modules():
        if isinstance(module, ValueTable):
            module.is_mapped = mmap
            if mmap:
                for rows_ND in module.parameters():
                    expect_single_rows(rows_ND)
    return (model if dtype is None else model.to(dtype)).eval()


def _load_parts(
    config: ModelConfig,
    path: Path,
    shard: TableShard,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Transformer:
    """The model with this process's parts of the tables, which alone are read."""
    model = build_model(config, device="meta", shard=shard)
    with path.open("rb") as file:
        places = tensor_places(path, file)
    _require_fits(model, {name: place.shape for name, place in places.items()}, path)
    parts = {}
    for name, tensor in model.state_dict().items():
        saved = places[name].dtype
        part = local_part(tensor)
        wanted = dtype if dtype is not None and saved.is_floating_point else saved
        parts[name] = torch.empty(part.shape, dtype=wanted, device=device or "cpu")
    model.load_state_dict(parts, assign=True)
    read_parts(path, dict(model.state_dict()))
    return model


def _require_fits(model: Transformer, found: dict[str, tuple[int, ...]], path: Path) -> None:
    """Raise unless a file has the tensors of the model, and of their shapes."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(
            f"{path} does not fit {path.with_name(CONFIG_FILE)}: {wrong[0]} is {found.get(wrong[0])}, "
            f"expected {expected.get(wrong[0])} ({len(wrong)} tensors differ)"
        )


def _read_weights(path: Path, device: torch.device | str | None) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device=str(device or "cpu"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _require_as_saved(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    for name, tensor in tensors.items():
        if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype:
            raise ValueError(
                f"dtype must be None or that of the file for weights that are mapped from it: {name} is "
                f"{tensor.dtype}, got {dtype}"
            )
