"""Text as tokens and back, without loss: every token stands for a fixed run of bytes.

That is what makes bits per byte comparable between tokenizers: the tokens of a text hold exactly its UTF-8 bytes.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ultramem.graph.weights import write_atomically

END_OF_TEXT = 256
"""Of the byte tokenizer."""
TOKENIZER_FILE = "tokenizer.json"
FORMAT_VERSION = 1


class Tokenizer(ABC):
    """Maps text to token ids, each of which stands for fixed bytes; the end-of-text token goes before each document.

    Args:
        pieces: the bytes of each token id; empty for special tokens.
        end_of_text: id of the end-of-text token.
    """

    kind: ClassVar[str]

    def __init__(self, pieces: Sequence[bytes], end_of_text: int) -> None:
        self.pieces = tuple(pieces)
        self.end_of_text = end_of_text
        self.token_bytes = torch.tensor([len(piece) for piece in self.pieces])
        """Bytes per token id, int64 [vocab_size]."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this; the end-of-text token is one of them."""
        return len(self.pieces)

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides which tokens a text becomes."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    @abstractmethod
    def encode_batch(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        """Tokens of each text, as unsigned integers, without end-of-text tokens.

        Raises:
            ValueError: a text is not UTF-8, or its tokens would not hold its bytes.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The JSON document of tokenizer.json, without its version."""

    def encode(self, text: str) -> list[int]:
        """Tokens of `text`, without an end-of-text token."""
        tokens: list[int] = self.encode_batch([text.encode()])[0].tolist()
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens; special tokens are left out, and bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.pieces[token] for token in tokens).decode(errors="replace")

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Text piece by piece, never a part of a character."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            if piece := decoder.decode(self.pieces[token]):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def save(self, folder: Path) -> None:
        """Write tokenizer.json."""
        document = {"format_version": FORMAT_VERSION, **self.to_dict()}
        write_atomically(folder / TOKENIZER_FILE, json.dumps(document, ensure_ascii=False).encode() + b"\n")


class ByteTokenizer(Tokenizer):
    """Bytes as tokens, end-of-text 256: nothing to train, nothing unknown, not even text that is not UTF-8."""

    kind = "bytes"

    def __init__(self) -> None:
        super().__init__([*(bytes([byte]) for byte in range(256)), b""], END_OF_TEXT)

    def encode_batch(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind}


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a run or of prepared data; bytes if the folder has no tokenizer.json.

    Raises:
        ValueError: the file is damaged or of another version.
        ImportError: the tokenizer needs the library `tokenizers`, which is not installed.
    """
    path = folder / TOKENIZER_FILE
    return read_tokenizer(path) if path.exists() else ByteTokenizer()


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json, our own or one of Hugging Face.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a tokenizer, not one that keeps all text, or of another version.
        ImportError: it needs the library `tokenizers`, which is not installed.
    """
    from ultramem.runtime.hugging_face_tokenizer import HuggingFaceTokenizer

    if not path.is_file():
        raise FileNotFoundError(f"tokenizer: there is no file {path}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"tokenizer: {path} is not valid JSON: {error}") from error
    if not isinstance(document, dict) or not {"kind", "model"} & document.keys():
        raise ValueError(f"tokenizer: {path} must hold an object with 'kind' (ultramem) or 'model' (Hugging Face)")
    if "kind" not in document:
        return HuggingFaceTokenizer(document, name=str(path))
    if document.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"tokenizer: {path} must have format_version {FORMAT_VERSION}, got {document.get('format_version')!r}"
        )
    if document["kind"] == ByteTokenizer.kind:
        return ByteTokenizer()
    if document["kind"] == HuggingFaceTokenizer.kind:
        return HuggingFaceTokenizer(document.get("tokenizer"), name=str(path))
    raise ValueError(
        f"tokenizer: {path} must be of kind {ByteTokenizer.kind} or {HuggingFaceTokenizer.kind}, "
        f"got {document['kind']!r}"
    )
