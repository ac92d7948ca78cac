"""`manifest.json`: what an export folder holds, what it was made from, and how far its results are from eager's."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ultramem
from ultramem.config import ModelConfig, from_dict, to_dict
from ultramem.export.parity import Parity
from ultramem.export.program import PassRecord

FILE = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """An input or output; a free size is a name or a sum of names."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """A file of the folder."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The document of manifest.json."""

    engine: str
    model: ModelConfig
    weights_sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: dict[str, FileRecord]
    passes: tuple[PassRecord, ...]
    parity: Parity
    how_to_load: tuple[str, ...]
    versions: dict[str, str]
    source_commit: str | None
    format_version: int = FORMAT_VERSION

    def __str__(self) -> str:
        size = sum(file.bytes for file in self.files.values())
        return f"{self.engine}, {size / 1e6:.1f} MB, {self.parity}"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    document = {**asdict(manifest), "model": to_dict(manifest.model)}
    ordered = {"format_version": document.pop("format_version"), **document}
    (folder / FILE).write_text(json.dumps(ordered, indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an export folder.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: it is damaged, or of a format that this version does not read.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not an export folder: it has no {FILE}")
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        version = document["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest: {error!r}") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} must have format_version {FORMAT_VERSION}, got {version!r}")
    try:
        return Manifest(
            **{
                **document,
                "model": from_dict(ModelConfig, document["model"]),
                "inputs": _specs(document["inputs"]),
                "outputs": _specs(document["outputs"]),
                "files": {name: FileRecord(**file) for name, file in document["files"].items()},
                "passes": tuple(PassRecord(**each) for each in document["passes"]),
                "parity": Parity(**document["parity"]),
                "how_to_load": tuple(document["how_to_load"]),
            }
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _specs(items: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=each["name"], shape=tuple(each["shape"]), dtype=each["dtype"]) for each in items)


def tensor_specs(config: ModelConfig) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of an exported model, in order."""
    conv = ("batch", config.hidden_size, config.conv_length)

    def state(key_name: str, conv_name: str, length: str) -> list[TensorSpec]:
        keys = ("batch", config.num_heads, length, config.head_dim)
        pairs = [f"{key_name}.{i}.{side}" for i in range(config.num_layers) for side in ("key", "value")]
        convs = [f"{conv_name}.{j}" for j in range(config.num_convs)]
        return [TensorSpec(name=name, shape=keys, dtype="float32") for name in pairs] + [
            TensorSpec(name=name, shape=conv, dtype="float32") for name in convs
        ]

    inputs = [
        TensorSpec(name="input_ids", shape=("batch", "seq"), dtype="int64"),
        TensorSpec(name="attention_mask", shape=("batch", "past + seq"), dtype="int64"),
        TensorSpec(name="position_ids", shape=("batch", "seq"), dtype="int64"),
        *state("past_key_values", "past_conv", "past"),
    ]
    logits = TensorSpec(name="logits", shape=("batch", "seq", config.vocab_size), dtype="float32")
    return tuple(inputs), (logits, *state("present", "present_conv", "past + seq"))


def file_record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(bytes=path.stat().st_size, sha256=digest)


def weights_sha256(model: nn.Module) -> str:
    """A hash of every weight and buffer: name, dtype, shape and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    found = {"ultramem": ultramem.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("onnx", "onnxscript", "onnxruntime", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def source_commit() -> str | None:
    """The commit of this package's source, if it runs from a git checkout."""
    root = Path(ultramem.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
