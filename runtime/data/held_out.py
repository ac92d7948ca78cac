"""Which text is held out, and the pieces in which a part of a corpus is read."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ultramem.runtime.data.sources import Document, Source, TextSource

Part = Literal["train", "held_out", "out_of_domain"]
HELD_OUT_SHARE = 0.05
MANY_FILES = 1000
PIECE_BYTES = 1 << 18
"""A document is tokenised in pieces of at most this, so that no document needs memory of its size."""


class Position(NamedTuple):
    """A place in a part of a corpus: so many tokens after the start of a piece."""

    source: int
    row: int
    offset: int
    """Byte of the document where the piece starts."""
    tokens: int


START = Position(0, 0, 0, 0)


class Piece(NamedTuple):
    """Text of a document's share of a part, and its place."""

    source: int
    row: int
    offset: int
    first: bool
    """It begins its document's share of the part."""
    text: bytes
    source_bytes: float


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutRule:
    """What is held out: the end of each text file, or whole documents where there are many.

    Raises:
        ValueError: `share` is out of range.
    """

    share: float
    whole_files: bool
    """Text files, too, are held out as a whole: there are more than MANY_FILES of them."""
    whole_characters: bool
    """A text file is cut before a UTF-8 character; byte tokens can do without."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 0.5:
            raise ValueError(f"held_out must be above 0 and at most 0.5, got {self.share}")

    @classmethod
    def of(cls, sources: Sequence[Source], share: float, *, whole_characters: bool) -> HeldOutRule:
        files = sum(isinstance(each, TextSource) for each in sources)
        return cls(share=share, whole_files=files > MANY_FILES, whole_characters=whole_characters)

    @property
    def every(self) -> int:
        """One document in so many is held out."""
        return max(2, round(1 / self.share))

    def describe(self, sources: Sequence[Source]) -> str:
        """The rule in words, for the manifest."""
        if any(source.part for source in sources):
            return "the dataset's own split"
        tail = f"the last {self.share:.3g} of the bytes of each text file" + (
            ", before a character" if self.whole_characters else ""
        )
        whole = f"documents whose sha256 (its first 8 bytes, big-endian) is a multiple of {self.every}"
        rows = self.whole_files or not all(isinstance(source, TextSource) for source in sources)
        texts = not self.whole_files and any(isinstance(source, TextSource) for source in sources)
        return " and, of rows, ".join([tail] * texts + [whole] * rows)

    def range(self, source: Source, document: Document, part: Part) -> tuple[int, int]:
        """The bytes of a document that belong to `part`, as (start, stop)."""
        whole, nothing = (0, document.size), (0, 0)
        if part == "out_of_domain":
            return whole
        if source.part:
            return whole if source.part == part else nothing
        if isinstance(source, TextSource) and not self.whole_files:
            cut = document.size - max(1, int(document.size * self.share))
            if self.whole_characters:
                with document.open() as file:
                    cut += _to_character_start(file, cut)
            return (0, cut) if part == "train" else (cut, document.size)
        held_out = int.from_bytes(document.digest()[:8], "big") % self.every == 0
        return whole if held_out == (part == "held_out") else nothing


def pieces(sources: Sequence[Source], rule: HeldOutRule, part: Part, start: Position = START) -> Iterator[Piece]:
    """The text of a part in order, from the piece at `start` on; where pieces end does not depend on `start`."""
    for index in range(start.source, len(sources)):
        source = sources[index]
        here = start if index == start.source else Position(index, 0, 0, 0)
        if source.part not in ("", part):
            continue
        for document in source.documents(here.row):
            begin, end = rule.range(source, document, part)
            if begin == end:
                continue
            offset = here.offset if here.row == document.row and here.offset > begin else begin
            with document.open() as file:
                while offset < end:
                    text = _read_piece(file, offset, end)
                    share = document.source_bytes * len(text) / document.size
                    yield Piece(index, document.row, offset, offset == begin, text, share)
                    offset += len(text)


def _read_piece(file: io.BufferedReader | io.BytesIO, start: int, stop: int) -> bytes:
    """Up to PIECE_BYTES, ending after a line, or after a character where there is no line's end."""
    file.seek(start)
    text = file.read(min(PIECE_BYTES, stop - start))
    if not text:
        raise ValueError(f"data: a file became shorter than {stop} bytes while it was read")
    if start + len(text) == stop:
        return text
    end = text.rfind(b"\n") + 1
    if not end:
        end = len(text) - next((back for back in range(1, 5) if text[-back] & 0xC0 != 0x80), 0)
    return text[:end]


def _to_character_start(file: io.BufferedReader | io.BytesIO, at: int) -> int:
    """How many bytes after `at` a UTF-8 character begins; 0 in text that is not UTF-8."""
    file.seek(at)
    return next((index for index, byte in enumerate(file.read(4)) if byte & 0xC0 != 0x80), 0)
