"""Bytes as tokens: nothing to train, nothing unknown."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

from ultramem.runtime.data import END_OF_TEXT


def encode(text: str) -> list[int]:
    """UTF-8 bytes of `text`, after an end-of-text token."""
    return [END_OF_TEXT, *text.encode()]


def decode(tokens: Iterable[int]) -> str:
    """Text of byte tokens; end-of-text tokens are left out, and bytes that are not UTF-8 become U+FFFD."""
    return bytes(token for token in tokens if token != END_OF_TEXT).decode(errors="replace")


def decode_stream(tokens: Iterable[int]) -> Iterator[str]:
    """Text piece by piece, never a part of a character."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if token != END_OF_TEXT and (piece := decoder.decode(bytes([token]))):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest
