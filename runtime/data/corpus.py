"""A corpus in its parts: from a name, from files read into memory, or from prepared shards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ultramem.runtime.data.documents import Documents, LoadedDocuments, Stream
from ultramem.runtime.data.held_out import HELD_OUT_SHARE, HeldOutRule
from ultramem.runtime.data.named import NAMED, Sources, find_sources
from ultramem.runtime.data.shards import MANIFEST_FILE, PROGRESS_FOLDER, REQUEST_FILE, open_documents, read_manifest
from ultramem.runtime.data.sources import Document, Source, TextSource
from ultramem.runtime.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

IN_MEMORY_BYTES = 1 << 30
"""Sources up to this size are tokenised in memory; larger ones are prepared first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Documents as tokens, split into parts."""

    name: str
    tokenizer: Tokenizer
    train: Documents
    held_out: Documents
    """The end of each document, or whole documents that are not trained on."""
    out_of_domain: Documents
    """Documents of another source; empty for most text."""
    sha256: str
    """Of all documents, in order, and of the tokenizer if its tokens are not bytes."""

    def train_stream(self) -> Tensor | Stream:
        """All training documents as one stream of tokens, with an end-of-text token before each."""
        return self.train.stream()


def load_corpus(data: str, *, tokenizer: Tokenizer | None = None) -> Corpus:
    """Read "austen" (in the package), "gutenberg" (downloaded before), or what people have.

    Held out are the last 5 % of each text file, and of rows (JSONL, Parquet, datasets) one in 20, by their hash.

    Args:
        data: a name; a text, JSONL or Parquet file; a folder of `*.txt`, or of such files at any depth; a Hugging Face
            dataset on disk; or a folder written by `ultramem data prepare`, which is not loaded but memory-mapped.
        tokenizer: None: the one of prepared data, and bytes for all else.

    Raises:
        FileNotFoundError: no such file or folder, nothing in it to read, or a corpus that is not downloaded.
        ValueError: a file is empty, damaged or too large for memory, or data prepared with another tokenizer.
        ImportError: the format needs a library that is not installed.
    """
    path = Path(data)
    if data not in NAMED and path.is_dir():
        if (path / MANIFEST_FILE).is_file():
            return _open_prepared(path, tokenizer)
        if (path / PROGRESS_FOLDER / REQUEST_FILE).is_file():
            raise ValueError(f"data: {path} is not wholly prepared; run the same `ultramem data prepare` again")
        if files := sorted(path.glob("*.txt")):
            sources = Sources([TextSource(name=file.name, path=file) for file in files], [])
            return _load(data, sources, tokenizer or ByteTokenizer())
    return _load(data, find_sources(data), tokenizer or ByteTokenizer())


def _load(name: str, sources: Sources, tokenizer: Tokenizer) -> Corpus:
    size = sum(source.size for part in sources for source in part)
    if size > IN_MEMORY_BYTES:
        raise ValueError(
            f"data: {name} is {size / 1e9:.1f} GB, too large to be tokenised in memory; "
            f"run `ultramem data prepare {name} --out DIR` and use DIR"
        )
    is_bytes = isinstance(tokenizer, ByteTokenizer)
    rule = HeldOutRule(share=HELD_OUT_SHARE, whole_files=False, whole_characters=not is_bytes)
    train, held_out, outside = list[Tensor](), list[Tensor](), list[Tensor]()
    digest = hashlib.sha256()
    encode = _encoder(tokenizer)
    for source in sources.in_domain:
        for document in _documents(source):
            text = _read(document)
            digest.update(text)
            for part, documents in (("train", train), ("held_out", held_out)):
                start, stop = rule.range(source, document, part)  # type: ignore[arg-type]  # two of the three parts
                if start < stop:
                    documents.append(encode(text[start:stop]))
    for source in sources.out_of_domain:
        for document in _documents(source):
            text = _read(document)
            digest.update(text)
            outside.append(encode(text))
    if not is_bytes:
        digest.update(tokenizer.fingerprint.encode())
    if not train and not held_out:
        raise ValueError(f"data: {name} holds no text")
    parts = [
        LoadedDocuments(part, end_of_text=tokenizer.end_of_text, vocab_size=tokenizer.vocab_size)
        for part in (train, held_out, outside)
    ]
    return Corpus(
        name=name,
        tokenizer=tokenizer,
        train=parts[0],
        held_out=parts[1],
        out_of_domain=parts[2],
        sha256=digest.hexdigest(),
    )


def _documents(source: Source) -> list[Document]:
    documents = list(source.documents())
    if not documents and isinstance(source, TextSource):
        raise ValueError(f"data: {source.path} is empty")
    return documents


def _read(document: Document) -> bytes:
    with document.open() as file:
        return file.read(document.size)


def _encoder(tokenizer: Tokenizer) -> Callable[[bytes], Tensor]:
    dtype = torch.uint8 if isinstance(tokenizer, ByteTokenizer) else torch.int32

    def encode(text: bytes) -> Tensor:
        return torch.tensor(tokenizer.encode_batch([text])[0], dtype=dtype)

    return encode


def _open_prepared(folder: Path, tokenizer: Tokenizer | None) -> Corpus:
    manifest = read_manifest(folder)
    own = load_tokenizer(folder)
    if own.fingerprint != manifest["tokenizer"]["sha256"]:
        raise ValueError(f"data: the tokenizer in {folder} is not the one of its {MANIFEST_FILE} (sha256 differs)")
    if tokenizer is not None and tokenizer.fingerprint != own.fingerprint:
        raise ValueError(f"data: {folder} was prepared with another tokenizer than the run's (sha256 differs)")
    parts = {name: open_documents(folder, manifest, name) for name in ("train", "held_out", "out_of_domain")}
    return Corpus(
        name=str(folder),
        tokenizer=own,
        train=parts["train"],
        held_out=parts["held_out"],
        out_of_domain=parts["out_of_domain"],
        sha256=manifest["sha256"],
    )
