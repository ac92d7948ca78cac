"""Documents one by one from files that people have: text, JSONL, Parquet, Hugging Face datasets on disk."""

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ultramem.export.extras import require

SUFFIXES = (".txt", ".jsonl", ".parquet")
ROWS_AT_A_TIME = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document: a row's text in memory, or a file that is read piece by piece."""

    row: int
    """Its number within the source."""
    size: int
    """UTF-8 bytes of text."""
    source_bytes: float
    """Bytes of the source that it takes, for progress."""
    text: bytes | Path

    def open(self) -> io.BufferedReader | io.BytesIO:
        return self.text.open("rb") if isinstance(self.text, Path) else io.BytesIO(self.text)

    def digest(self) -> bytes:
        """sha256 of the text."""
        with self.open() as file:
            return hashlib.file_digest(file, "sha256").digest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Source(ABC):
    """Where documents come from."""

    name: str
    """As the manifest calls it: the path within what was given."""
    path: Path
    part: Literal["train", "held_out", ""] = ""
    """What its documents are for, where the source itself says so."""
    text_field: str = "text"
    max_bytes: int | None = None
    """Of a text file only so many first bytes are read."""

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.files)

    @abstractmethod
    def documents(self, start: int = 0) -> Iterator[Document]:
        """The documents from row `start` on; empty ones are left out.

        Raises:
            ValueError: a row is damaged or has no text; the message names the file, the row and the field.
        """

    def sha256(self) -> str:
        """Of all its files, in order."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _document(self, row: int, text: Any, source_bytes: float) -> Document | None:
        if not isinstance(text, str):
            raise ValueError(f"data: {self.path}, row {row}: {self.text_field!r} must be text, got {text!r:.60}")
        try:
            data = text.encode()
        except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair
            raise ValueError(
                f"data: {self.path}, row {row}: {self.text_field!r} is not Unicode text: {error}"
            ) from error
        return Document(row=row, size=len(data), source_bytes=source_bytes, text=data) if data else None


class TextSource(Source):
    """A text file: one document."""

    __slots__ = ()

    def documents(self, start: int = 0) -> Iterator[Document]:
        size = self.size if self.max_bytes is None else min(self.size, self.max_bytes)
        if start == 0 and size:
            yield Document(row=0, size=size, source_bytes=size, text=self.path)


class JsonlSource(Source):
    """A JSON object a line: one document each."""

    __slots__ = ()

    def documents(self, start: int = 0) -> Iterator[Document]:
        with self.path.open("rb") as file:
            for row, line in enumerate(file):
                if row < start or not line.strip():
                    continue
                try:
                    fields = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"data: {self.path}, row {row} is not valid JSON: {error}") from error
                if not isinstance(fields, dict) or self.text_field not in fields:
                    raise ValueError(f"data: {self.path}, row {row} must have the field {self.text_field!r}")
                if document := self._document(row, fields[self.text_field], len(line)):
                    yield document


class ParquetSource(Source):
    """A Parquet file: one document a row, from a text column."""

    __slots__ = ()

    def documents(self, start: int = 0) -> Iterator[Document]:
        parquet = require("pyarrow.parquet", "data")
        arrow = require("pyarrow", "data")
        try:
            file = parquet.ParquetFile(self.path)
        except arrow.ArrowException as error:
            raise ValueError(f"data: {self.path} is not a Parquet file: {error}") from error
        with file:
            if self.text_field not in file.schema_arrow.names:
                raise ValueError(
                    f"data: {self.path} must have the column {self.text_field!r}, it has "
                    + ", ".join(file.schema_arrow.names)
                )
            each = self.size / max(1, file.metadata.num_rows)
            row = group = 0
            while group < file.num_row_groups and row + file.metadata.row_group(group).num_rows <= start:
                row += file.metadata.row_group(group).num_rows
                group += 1
            groups = range(group, file.num_row_groups)
            for batch in file.iter_batches(ROWS_AT_A_TIME, row_groups=groups, columns=[self.text_field]):
                for text in batch.column(0).to_pylist():
                    if row >= start and (document := self._document(row, text, each)):
                        yield document
                    row += 1


class DatasetSource(Source):
    """A folder written by `datasets.Dataset.save_to_disk`: one document a row, from a text column."""

    __slots__ = ()

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted(path for path in self.path.iterdir() if path.is_file()))

    def documents(self, start: int = 0) -> Iterator[Document]:
        dataset = require("datasets", "data").Dataset.load_from_disk(str(self.path))
        if self.text_field not in dataset.column_names:
            raise ValueError(
                f"data: {self.path} must have the column {self.text_field!r}, it has {', '.join(dataset.column_names)}"
            )
        each, row = self.size / max(1, len(dataset)), start
        for first in range(start, len(dataset), ROWS_AT_A_TIME):
            for text in dataset[first : first + ROWS_AT_A_TIME][self.text_field]:
                if document := self._document(row, text, each):
                    yield document
                row += 1


def open_sources(path: Path, *, text_field: str = "text") -> list[Source]:
    """What a file or folder holds, in a fixed order: a dataset on disk, or text, JSONL and Parquet files at any depth.

    Raises:
        FileNotFoundError: no such file or folder, or nothing in it to read.
        ValueError: a file of another kind, or a dataset without training documents.
    """
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            return _dataset_splits(path, text_field)
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            return [DatasetSource(name=path.name, path=path, text_field=text_field)]
        files = sorted(
            file
            for file in path.rglob("*")
            if file.suffix in SUFFIXES
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not files:
            raise FileNotFoundError(f"data: the folder {path} holds no *.txt, *.jsonl or *.parquet file")
        return [_file_source(file, file.relative_to(path).as_posix(), text_field) for file in files]
    if not path.is_file():
        raise FileNotFoundError(f"data: there is no file or folder {path}")
    return [_file_source(path, path.name, text_field)]


def _file_source(path: Path, name: str, text_field: str) -> Source:
    if path.suffix == ".jsonl":
        return JsonlSource(name=name, path=path, text_field=text_field)
    if path.suffix == ".parquet":
        return ParquetSource(name=name, path=path, text_field=text_field)
    return TextSource(name=name, path=path)


def _dataset_splits(path: Path, text_field: str) -> list[Source]:
    """Split train to train on; validation, or without one test, is held out. Other splits are not read."""
    try:
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data: {path / 'dataset_dict.json'} is damaged: {error}") from error
    if "train" not in splits:
        raise ValueError(f"data: {path} must have a split 'train', it has {', '.join(splits)}")
    held_out = next((name for name in ("validation", "test") if name in splits), None)
    if held_out is None:
        return [DatasetSource(name="train", path=path / "train", text_field=text_field)]
    return [
        DatasetSource(name="train", path=path / "train", part="train", text_field=text_field),
        DatasetSource(name=held_out, path=path / held_out, part="held_out", text_field=text_field),
    ]
