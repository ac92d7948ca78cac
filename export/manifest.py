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
from ultramem.export.options import ExportOptions
from ultramem.export.parity import CaseError, Parity, Rounding
from ultramem.export.program import PassRecord
from ultramem.export.shard_record import ShardRecord, read_record
from ultramem.export.signature import TensorSpec

FILE = "manifest.json"
FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """A file of the folder."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The document of manifest.json."""

    engine: str
    options: ExportOptions
    model: ModelConfig
    weights_sha256: str
    """Of the model that was exported, before any rounding."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: dict[str, FileRecord]
    passes: tuple[PassRecord, ...]
    parity: Parity
    how_to_load: tuple[str, ...]
    versions: dict[str, str]
    source_commit: str | None
    shard: ShardRecord | None = None
    """The part of the tables that is in here; None: all of them."""
    format_version: int = FORMAT_VERSION

    def __str__(self) -> str:
        size = sum(file.bytes for file in self.files.values())
        types = "/".join(filter(None, (self.options.dtype, self.options.table)))
        part = "" if self.shard is None else f"{self.shard}, "
        return f"{self.engine} {types}, {part}{size / 1e6:.1f} MB, {self.parity}"


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
        found = Manifest(
            **{
                **document,
                "options": _options(document["options"]),
                "model": from_dict(ModelConfig, document["model"]),
                "inputs": _specs(document["inputs"]),
                "outputs": _specs(document["outputs"]),
                "files": {name: FileRecord(**file) for name, file in document["files"].items()},
                "passes": tuple(PassRecord(**each) for each in document["passes"]),
                "parity": _parity(document["parity"]),
                "how_to_load": tuple(document["how_to_load"]),
                "shard": read_record(document.get("shard")),
            }
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    for name in found.files:
        if name != Path(name).name or name in ("", "..", FILE) or "\\" in name:
            raise ValueError(f"{path} is damaged: files must be names in the folder itself, got {name!r}")
    return found


def _options(document: dict[str, Any]) -> ExportOptions:
    static = document["static"]
    return ExportOptions(**{**document, "static": None if static is None else tuple(static)})


def _specs(items: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=each["name"], shape=tuple(each["shape"]), dtype=each["dtype"]) for each in items)


def _parity(document: dict[str, Any]) -> Parity:
    rounding = document["rounding"]
    return Parity(
        **{
            **document,
            "cases": tuple(CaseError(**each) for each in document["cases"]),
            "rounding": None if rounding is None else Rounding(**rounding),
        }
    )


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


def versions(device: str = "cpu") -> dict[str, str]:
    """Of what an export depends on; for a GPU, its architecture too, since native code is for that alone."""
    found = {"ultramem": ultramem.__version__, "python": platform.python_version(), "torch": torch.__version__}
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        found |= {"cuda": str(torch.version.cuda), "gpu": f"sm_{major}{minor}"}
    for name in ("onnx", "onnxscript", "onnxruntime", "tensorrt", "transformers"):
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
