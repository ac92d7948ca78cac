"""The shards of one part of a corpus, from where an earlier run was ended."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ultramem.config import from_dict
from ultramem.graph.weights import write_atomically
from ultramem.runtime.data.held_out import START, HeldOutRule, Part, Piece, Position, pieces
from ultramem.runtime.data.interrupt import delayed_interrupt
from ultramem.runtime.data.shards import PROGRESS_FOLDER, Shard, ShardWriter, check_shard, dtype_for, sync_folder
from ultramem.runtime.data.sources import Source
from ultramem.runtime.tokenizer import Tokenizer

BATCH_BYTES = 1 << 20
"""Text that is tokenised in one call, so that a tokenizer can use all cores."""


class Progress(Protocol):
    """Told how far a preparation is; source bytes are of `total_bytes`, text bytes are UTF-8."""

    def stage(self, name: str, total_bytes: float, done_bytes: float = 0.0) -> None: ...

    def advance(self, *, source_bytes: float, documents: int = 0, tokens: int = 0, text_bytes: int = 0) -> None: ...


class _Record(NamedTuple):
    """A shard, and the place in the part where it ends."""

    shard: Shard
    end: Position
    source_bytes: float
    """Of the sources, read for this part by then."""


class PartWriter:
    """Writes `{part}-00000.bin` and so on into `out`, and a record of each into its progress folder.

    A part without text has no shards.
    """

    def __init__(
        self,
        out: Path,
        part: Part,
        sources: Sequence[Source],
        rule: HeldOutRule,
        tokenizer: Tokenizer,
        shard_tokens: int,
    ) -> None:
        self.out, self.part, self.sources, self.rule = out, part, sources, rule
        self.tokenizer, self.shard_tokens = tokenizer, shard_tokens
        self.dtype = dtype_for(tokenizer.vocab_size)
        self.token_bytes: NDArray[np.int64] = tokenizer.token_bytes.numpy()
        self.shards: list[Shard] = []
        self.writer: ShardWriter | None = None
        self.end = START
        self.source_bytes = 0.0

    def run(self, progress: Progress) -> list[Shard]:
        """Write the shards that are missing; returns all.

        Raises:
            ValueError: a shard of an earlier run is damaged, or the text is.
            KeyboardInterrupt: Ctrl-C, after the shard that was begun has been saved.
        """
        self._load()
        progress.stage(self.part, self._total_bytes(), self.source_bytes)
        try:
            with delayed_interrupt() as interrupted:
                for piece, tokens in self._tokens():
                    place = (piece.source, piece.row, piece.offset)
                    skip = self.end.tokens if place == self.end[:3] else 0
                    for stop in self._cuts(skip, len(tokens)):
                        self._open().write(tokens[skip:stop])
                        skip, self.end = stop, Position(*place, stop)
                        if self._open().tokens == self.shard_tokens:
                            self._close()
                    self.source_bytes += piece.source_bytes
                    progress.advance(
                        source_bytes=piece.source_bytes,
                        documents=int(piece.first),
                        tokens=len(tokens),
                        text_bytes=len(piece.text),
                    )
                    if interrupted():
                        self._save_begun()
                        raise KeyboardInterrupt(
                            f"{self.out}: what is done is saved; the same command goes on from there"
                        )
            if self.writer is not None:
                self._close()
        finally:
            if self.writer is not None:
                self.writer.discard()
        return self.shards

    def _tokens(self) -> Iterator[tuple[Piece, NDArray[Any]]]:
        """Pieces with their tokens, an end-of-text token before each document's first."""
        batch: list[Piece] = []
        size = 0
        for piece in pieces(self.sources, self.rule, self.part, self.end):
            batch.append(piece)
            size += len(piece.text)
            if size >= BATCH_BYTES:
                yield from self._encode(batch)
                batch, size = [], 0
        yield from self._encode(batch)

    def _encode(self, batch: list[Piece]) -> Iterator[tuple[Piece, NDArray[Any]]]:
        mark = np.array([self.tokenizer.end_of_text], dtype=np.uint32)
        try:
            encoded = self.tokenizer.encode_batch([piece.text for piece in batch])
        except ValueError as error:
            names = sorted({str(self.sources[piece.source].path) for piece in batch})
            raise ValueError(f"data: in {', '.join(names[:3])}: {error}") from error
        for piece, tokens in zip(batch, encoded, strict=True):
            yield piece, np.concatenate([mark[: piece.first], tokens], dtype=np.uint32)

    def _cuts(self, start: int, stop: int) -> Iterator[int]:
        """Ends of the stretches of start..stop that go into one shard each."""
        while start < stop:
            written = self.writer.tokens if self.writer is not None else 0
            start = min(stop, start + self.shard_tokens - written)
            yield start

    def _open(self) -> ShardWriter:
        if self.writer is None:
            path = self.out / f"{self.part}-{len(self.shards):05d}.bin"
            self.writer = ShardWriter(path, self.dtype, self.token_bytes, self.tokenizer.end_of_text)
        return self.writer

    def _close(self) -> None:
        """The shard is whole: name it, and record it."""
        assert self.writer is not None
        shard = self.writer.close()
        sync_folder(self.out)
        self.writer = None
        self._write_record(self._record_path(len(self.shards)), shard)
        self.shards.append(shard)
        self._begun_record.unlink(missing_ok=True)
        self._begun_shard.unlink(missing_ok=True)

    def _save_begun(self) -> None:
        """Keep a shard that is not full for the next run."""
        if self.writer is not None:
            self.writer.path = self._begun_shard
            shard = self.writer.close()
            self.writer = None
            self._write_record(self._begun_record, shard)

    def _load(self) -> None:
        """Take over the shards of earlier runs, and where to go on."""
        while (path := self._record_path(len(self.shards))).is_file():
            record = self._read_record(path)
            self.shards.append(record.shard)
            self.end, self.source_bytes = record.end, record.source_bytes
        if self._begun_record.is_file():
            begun = self._read_record(self._begun_record)
            if begun.end > self.end:  # else the shard has been finished since
                writer = self._open()
                writer.write(np.fromfile(self._begun_shard, dtype=writer.code))
                self.end, self.source_bytes = begun.end, begun.source_bytes

    def _total_bytes(self) -> float:
        """About what the part takes of its sources."""
        share = {"train": 1 - self.rule.share, "held_out": self.rule.share, "out_of_domain": 1.0}[self.part]
        return sum(
            (source.size if source.part == self.part else 0) if source.part else source.size * share
            for source in self.sources
        )

    @property
    def _begun_shard(self) -> Path:
        return self.out / PROGRESS_FOLDER / f"{self.part}.begun.bin"

    @property
    def _begun_record(self) -> Path:
        return self.out / PROGRESS_FOLDER / f"{self.part}.begun.json"

    def _record_path(self, index: int) -> Path:
        return self.out / PROGRESS_FOLDER / f"{self.part}-{index:05d}.json"

    def _write_record(self, path: Path, shard: Shard) -> None:
        document = {"shard": asdict(shard), "end": self.end, "source_bytes": self.source_bytes}
        write_atomically(path, json.dumps(document).encode())
        sync_folder(path.parent)

    def _read_record(self, path: Path) -> _Record:
        try:
            document = json.loads(path.read_text())
            shard = from_dict(Shard, document["shard"])
            record = _Record(shard, Position(*document["end"]), document["source_bytes"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"data: the record {path} is damaged ({error}); delete {self.out} and start again"
            ) from error
        folder = path.parent if path == self._begun_record else self.out
        check_shard(folder, record.shard, self.dtype)
        return record
