"""Tokens on disk: `manifest.json`, written last, and shards of raw little-endian unsigned integers.

A shard is written beside its place and renamed, and then a record of it is written; a shard without a record does not
exist. When all are there, their records become the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ultramem.config import from_dict
from ultramem.graph.weights import write_atomically
from ultramem.runtime.data.documents import ShardedDocuments, ShardedTokens

MANIFEST_FILE = "manifest.json"
PROGRESS_FOLDER = "progress"
REQUEST_FILE = "request.json"  # in the progress folder
FORMAT_VERSION = 1
DTYPES = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """What the manifest says of a shard."""

    file: str
    documents: int
    """Documents that begin in it."""
    tokens: int
    bytes: int
    """UTF-8 bytes of text that its tokens stand for."""
    sha256: str


def dtype_for(vocab_size: int) -> str:
    """The narrowest of DTYPES for token ids below `vocab_size`."""
    return next(name for name, code in DTYPES.items() if vocab_size - 1 <= np.iinfo(code).max)


class ShardWriter:
    """Writes one shard; it appears under its name when `close` is called, whole and on disk.

    Args:
        path: of the shard.
        dtype: of DTYPES.
        token_bytes: bytes of each token id, [vocab_size].
        end_of_text: the token that a document begins with.
    """

    def __init__(self, path: Path, dtype: str, token_bytes: NDArray[np.int64], end_of_text: int) -> None:
        self.path, self.token_bytes, self.end_of_text = path, token_bytes, end_of_text
        self.code = DTYPES[dtype]
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.file: BinaryIO = self.temporary.open("wb")
        self.digest = hashlib.sha256()
        self.documents = self.tokens = self.bytes = 0

    def write(self, tokens: NDArray[Any]) -> None:
        data = tokens.astype(self.code).tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.tokens += len(tokens)
        self.documents += int(np.count_nonzero(tokens == self.end_of_text))
        self.bytes += int(self.token_bytes[tokens].sum())

    def close(self) -> Shard:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.temporary.replace(self.path)
        return Shard(
            file=self.path.name,
            documents=self.documents,
            tokens=self.tokens,
            bytes=self.bytes,
            sha256=self.digest.hexdigest(),
        )

    def discard(self) -> None:
        """Leave nothing behind."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def check_shard(folder: Path, shard: Shard, dtype: str) -> None:
    """Check a shard against its record.

    Raises:
        ValueError: it is missing, cut off or changed.
    """
    path, size = folder / shard.file, shard.tokens * np.dtype(DTYPES[dtype]).itemsize
    if not path.is_file():
        raise ValueError(f"data: the shard {path} is missing; prepare the data again")
    if path.stat().st_size != size:
        raise ValueError(f"data: the shard {path} is damaged: it must have {size} bytes, got {path.stat().st_size}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != shard.sha256:
        raise ValueError(f"data: the shard {path} is damaged: its sha256 must be {shard.sha256}, got {digest}")


def write_manifest(folder: Path, plan: dict[str, Any], splits: dict[str, list[Shard]]) -> dict[str, Any]:
    """Write manifest.json from what was planned and the shards that came out; returns it."""
    manifest: dict[str, Any] = {"format_version": FORMAT_VERSION, **plan, "splits": {}}
    digest = hashlib.sha256(plan["tokenizer"]["sha256"].encode())
    for name, shards in splits.items():
        totals = {key: sum(getattr(shard, key) for shard in shards) for key in ("documents", "tokens", "bytes")}
        manifest["splits"][name] = {**totals, "shards": [asdict(shard) for shard in shards]}
        digest.update(f"{name} {' '.join(shard.sha256 for shard in shards)}\n".encode())
    manifest["sha256"] = digest.hexdigest()
    write_atomically(folder / MANIFEST_FILE, json.dumps(manifest, indent=1).encode() + b"\n")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The document of manifest.json.

    Raises:
        ValueError: it is not JSON, lacks a section, or is of another version.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"data: {path} is not valid JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        version = manifest.get("format_version") if isinstance(manifest, dict) else None
        raise ValueError(f"data: {path} must have format_version {FORMAT_VERSION}, got {version!r}")
    for name in ("tokenizer", "dtype", "splits", "sha256"):
        if name not in manifest:
            raise ValueError(f"data: {path} must hold {name!r}")
    return manifest


def open_documents(folder: Path, manifest: dict[str, Any], split: str) -> ShardedDocuments:
    """The memory-mapped documents of a split, after a check of every shard's sha256.

    Raises:
        ValueError: a shard is missing or damaged.
    """
    arrays: list[NDArray[Any]] = []
    documents = 0
    for record in manifest["splits"].get(split, {}).get("shards", []):
        shard = from_dict(Shard, record)
        check_shard(folder, shard, manifest["dtype"])
        # Copy-on-write, since PyTorch warns of arrays that cannot be written to; nobody writes.
        arrays.append(np.memmap(folder / shard.file, dtype=DTYPES[manifest["dtype"]], mode="c"))
        documents += shard.documents
    end_of_text = manifest["tokenizer"]["end_of_text"]
    return ShardedDocuments(ShardedTokens(arrays), documents=documents, end_of_text=end_of_text)


def sync_folder(folder: Path) -> None:
    """Make renames in the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
