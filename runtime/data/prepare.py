"""Tokenise a corpus once, into shards: resumable, hashed, in memory that does not grow with the corpus.

Parts are tokenised after one another, so that the place of a shard's end is one place in the sources: the record of a
shard holds it, and a killed run goes on there. A document's pieces are tokenised each for itself, and where they end
does not depend on where a run began; so the shards do not either.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ultramem.config import from_dict
from ultramem.graph.weights import write_atomically
from ultramem.runtime.data.held_out import HELD_OUT_SHARE, HeldOutRule, Part, pieces
from ultramem.runtime.data.named import find_sources
from ultramem.runtime.data.part_writer import PartWriter, Progress
from ultramem.runtime.data.shards import (
    MANIFEST_FILE,
    PROGRESS_FOLDER,
    REQUEST_FILE,
    Shard,
    check_shard,
    dtype_for,
    read_manifest,
    sync_folder,
    write_manifest,
)
from ultramem.runtime.hugging_face_tokenizer import train_bpe
from ultramem.runtime.tokenizer import TOKENIZER_FILE, ByteTokenizer, Tokenizer, load_tokenizer, read_tokenizer

PARTS: tuple[Part, ...] = ("held_out", "train", "out_of_domain")
"""In the order of their making: that a corpus is too small to hold anything out shows before the long part."""
BPE_VOCAB_SIZE = 8192
BPE_TEXT_BYTES = 1 << 28
"""A BPE is trained on about this much of the training text, taken in pieces at even distances."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """How a corpus is prepared.

    Raises:
        ValueError: a field is out of range; the message names the field, the value and what is accepted.
    """

    tokenizer: str = "bytes"
    """"bytes", "bpe" (trained on the training text), or a tokenizer.json."""
    vocab_size: int | None = None
    """Of a BPE; None: BPE_VOCAB_SIZE."""
    text_field: str = "text"
    """Field or column of JSONL, Parquet and datasets that holds the text."""
    held_out: float = HELD_OUT_SHARE
    """Share of the text that is not trained on."""
    shard_tokens: int = 1 << 24
    """Tokens per shard; the last one of a part may be shorter."""

    def __post_init__(self) -> None:
        if self.vocab_size is not None and self.tokenizer != "bpe":
            raise ValueError(f"vocab_size must be left out unless tokenizer is bpe, got {self.vocab_size}")
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens must be at least 1, got {self.shard_tokens}")
        HeldOutRule(share=self.held_out, whole_files=False, whole_characters=False)  # it knows what is a share


class _Silent:
    def stage(self, name: str, total_bytes: float, done_bytes: float = 0.0) -> None:
        pass

    def advance(self, *, source_bytes: float, documents: int = 0, tokens: int = 0, text_bytes: int = 0) -> None:
        pass


def prepare(
    data: str,
    out: Path,
    config: PrepareConfig,
    *,
    out_of_domain: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenise `data` into the folder `out`, or go on where a run of the same arguments was ended; the manifest.

    Args:
        data: a named corpus, a file, a folder or a dataset on disk.
        out: folder to write; it has a manifest.json once all is done.
        config: tokenizer, split and shards.
        out_of_domain: text of another kind, to evaluate on alone; None: a named corpus's own, else none.
        progress: told about it as it goes on.

    Raises:
        FileNotFoundError: there is no such data.
        FileExistsError: `out` holds something else.
        ValueError: bad text, a damaged shard, or `out` was begun with other arguments.
        ImportError: the format or the tokenizer needs a library that is not installed.
        KeyboardInterrupt: Ctrl-C; what is done is saved.
    """
    return _Preparation(data, out, config, out_of_domain, progress or _Silent()).run()


class _Preparation:
    def __init__(
        self, data: str, out: Path, config: PrepareConfig, out_of_domain: str | None, progress: Progress
    ) -> None:
        self.out, self.config, self.progress = out, config, progress
        self.records = out / PROGRESS_FOLDER
        if out.exists() and not out.is_dir():
            raise FileExistsError(f"out: {out} exists and is not a folder")
        if (Path(data) / MANIFEST_FILE).is_file():
            raise ValueError(f"data: {data} is prepared already")
        self.sources = find_sources(data, text_field=config.text_field)
        if out_of_domain is not None:
            self.sources = self.sources._replace(
                out_of_domain=find_sources(out_of_domain, text_field=config.text_field).in_domain
            )
        self.given = read_tokenizer(Path(config.tokenizer)) if config.tokenizer not in ("bytes", "bpe") else None
        self.request = asdict(config) | {
            "data": Path(data).resolve().name,
            "out_of_domain": out_of_domain and Path(out_of_domain).resolve().name,
            "tokenizer": self.given.fingerprint if self.given else config.tokenizer,
        }

    def run(self) -> dict[str, Any]:
        known = self._known()
        sources = self._describe_sources()
        self._same("sources", known.get("sources", sources), sources)
        if (self.out / MANIFEST_FILE).is_file():
            return self._finished()
        tokenizer = self._tokenizer()  # first: what is wrong with it shows before anything is written
        self.records.mkdir(parents=True, exist_ok=True)
        write_atomically(self.records / REQUEST_FILE, json.dumps(self.request | {"sources": sources}).encode())
        for leftover in [*self.out.glob(".*.tmp"), *self.records.glob(".*.tmp")]:  # of a killed run
            leftover.unlink()
        if not (self.out / TOKENIZER_FILE).is_file():
            tokenizer.save(self.out)
        rule = self._rule(whole_characters=not isinstance(tokenizer, ByteTokenizer))
        splits: dict[str, list[Shard]] = {}
        for part in PARTS:
            sources_of_part = self.sources.out_of_domain if part == "out_of_domain" else self.sources.in_domain
            writer = PartWriter(self.out, part, sources_of_part, rule, tokenizer, self.config.shard_tokens)
            splits[part] = writer.run(self.progress)
            if part != "out_of_domain" and not splits[part]:
                raise ValueError(f"data: there is too little text for a {part} part: {rule.describe(sources_of_part)}")
        plan = {
            "request": self.request,
            "sources": sources,
            "held_out": rule.describe(self.sources.in_domain),
            "tokenizer": {
                "kind": tokenizer.kind,
                "vocab_size": tokenizer.vocab_size,
                "end_of_text": tokenizer.end_of_text,
                "sha256": tokenizer.fingerprint,
            },
            "dtype": dtype_for(tokenizer.vocab_size),
        }
        manifest = write_manifest(self.out, plan, splits)
        sync_folder(self.out)
        shutil.rmtree(self.records)
        return manifest

    def _known(self) -> dict[str, Any]:
        """What the folder was begun with, checked against what is asked for now; empty for a new folder."""
        if (self.out / MANIFEST_FILE).is_file():
            manifest = read_manifest(self.out)
            known = manifest["request"] | {"sources": manifest["sources"]}
        elif (self.records / REQUEST_FILE).is_file():
            known = json.loads((self.records / REQUEST_FILE).read_text())
        else:
            # A run killed in its first moments leaves no more than the folder of the records.
            if self.out.exists() and any(path != self.records for path in self.out.iterdir()):
                raise FileExistsError(f"out: the folder {self.out} holds something else; name another")
            return {}
        for name, value in self.request.items():
            self._same(name, known.get(name), value)
        return dict(known)

    def _same(self, name: str, was: Any, now: Any) -> None:
        if was == now:
            return
        if name == "sources":
            raise ValueError(f"data: its files have changed since {self.out} was begun; name another --out")
        raise ValueError(f"{name} must be {was!r}, with which {self.out} was begun, got {now!r}; name another --out")

    def _describe_sources(self) -> list[dict[str, Any]]:
        self.progress.stage("hash", sum(source.size for part in self.sources for source in part))
        described = []
        for role, sources in self.sources._asdict().items():
            for source in sources:
                entry = {"name": source.name, "role": source.part or role, "bytes": source.size}
                entry |= {"sha256": source.sha256()}
                if source.max_bytes is not None:
                    entry |= {"first_bytes": source.max_bytes}
                described.append(entry)
                self.progress.advance(source_bytes=source.size)
        return described

    def _finished(self) -> dict[str, Any]:
        manifest = read_manifest(self.out)
        for split in manifest["splits"].values():
            for record in split["shards"]:
                check_shard(self.out, from_dict(Shard, record), manifest["dtype"])
        shutil.rmtree(self.records, ignore_errors=True)  # of a run killed after its manifest
        return manifest

    def _tokenizer(self) -> Tokenizer:
        if (self.out / TOKENIZER_FILE).is_file():
            return load_tokenizer(self.out)
        return self.given or (ByteTokenizer() if self.config.tokenizer == "bytes" else self._train_bpe())

    def _train_bpe(self) -> Tokenizer:
        size = sum(source.size for source in self.sources.in_domain)
        every = max(1, round(size / BPE_TEXT_BYTES))
        self.progress.stage("train BPE", size)

        def texts() -> Iterator[bytes]:
            for index, piece in enumerate(pieces(self.sources.in_domain, self._rule(whole_characters=True), "train")):
                self.progress.advance(source_bytes=piece.source_bytes)
                if index % every == 0:
                    yield piece.text

        return train_bpe(texts(), self.config.vocab_size or BPE_VOCAB_SIZE)

    def _rule(self, *, whole_characters: bool) -> HeldOutRule:
        return HeldOutRule.of(self.sources.in_domain, self.config.held_out, whole_characters=whole_characters)
