"""Hugging Face fast tokenizers, from a tokenizer.json or trained on the spot as byte-level BPE."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ultramem.export.extras import require
from ultramem.runtime.tokenizer import Tokenizer

END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
"""The first of these that is a special token of the tokenizer goes before each document."""
MIN_VOCAB_SIZE = 257
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`, used so that no byte is added or lost.

    Spaces put before a text, truncation, padding, BPE dropout and added special tokens are turned off, and special
    tokens are not recognised in text. A tokenizer that still changes a text (one that lower-cases, or has an unknown
    token) raises when it meets such a text: bits per byte of it would mean nothing.

    Args:
        document: the contents of a tokenizer.json.
        name: what errors call it.
    """

    kind = "hugging_face"

    def __init__(self, document: Any, *, name: str = "tokenizer.json") -> None:
        tokenizers = require("tokenizers", "data")
        self._name = name
        try:
            self._document = _without_additions(document)
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(self._document))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer: {name} is not a Hugging Face tokenizer.json: {error}") from error
        self._tokenizer.encode_special_tokens = True
        special = {token["content"]: token["id"] for token in self._document["added_tokens"] if token["special"]}
        end_of_text = next((special[each] for each in END_OF_TEXT_NAMES if each in special), None)
        if end_of_text is None:
            raise ValueError(f"tokenizer: {name} must have a special token of {', '.join(END_OF_TEXT_NAMES)}")
        super().__init__(_pieces(self._tokenizer.get_vocab(), self._document), end_of_text)

    def encode_batch(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        try:
            strings = [text.decode() for text in texts]
        except UnicodeDecodeError as error:
            raise ValueError(f"text must be UTF-8 for any tokenizer but bytes: {error}") from error
        encodings = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        tokens = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        for text, encoding in zip(texts, encodings, strict=True):
            if (kept := b"".join([self.pieces[token] for token in encoding.ids])) != text:
                raise ValueError(_difference(self._name, text, kept))
        return tokens

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "tokenizer": self._document}


def train_bpe(texts: Iterable[bytes], vocab_size: int) -> HuggingFaceTokenizer:
    """Train a byte-level BPE: 256 bytes, an end-of-text token and merges.

    Raises:
        ValueError: `vocab_size` is too small, more than the text gives merges for, or a text is not UTF-8.
        ImportError: the library `tokenizers` is not installed.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size must be at least {MIN_VOCAB_SIZE} for a byte-level BPE, got {vocab_size}")
    require("tokenizers", "data")
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = Library(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT_NAMES[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_as_strings(texts), trainer)
    trained = HuggingFaceTokenizer(json.loads(tokenizer.to_str()), name="bpe")
    if trained.vocab_size < vocab_size:
        raise ValueError(
            f"vocab_size must be at most {trained.vocab_size}, for which the text gives merges, got {vocab_size}"
        )
    return trained


def _as_strings(texts: Iterable[bytes]) -> Iterable[str]:
    for text in texts:
        try:
            yield text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"text must be UTF-8 for any tokenizer but bytes: {error}") from error


def _without_additions(document: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer's document with all that adds to a text or cuts it turned off."""
    document = copy.deepcopy(document) | {"truncation": None, "padding": None, "post_processor": None}
    document.setdefault("added_tokens", [])
    if "dropout" in document["model"]:
        document["model"]["dropout"] = None  # another tokenisation each time
    normalizer = document.get("normalizer")
    if normalizer and normalizer["type"] == "Prepend":
        document["normalizer"] = None
    elif normalizer and normalizer["type"] == "Sequence":
        normalizer["normalizers"] = [each for each in normalizer["normalizers"] if each["type"] != "Prepend"]
    for part in _parts(document.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
        elif part["type"] == "Metaspace":
            part |= {"prepend_scheme": "never"}
            part.pop("add_prefix_space", None)  # the older spelling
    return document


def _parts(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A component itself, or the members of a sequence of them."""
    if component is None:
        return []
    return list(component[key]) if component["type"] == "Sequence" else [component]


def _pieces(vocab: dict[str, int], document: dict[str, Any]) -> list[bytes]:
    """The bytes of each token id; ids that no token has are empty."""
    decoders = {part["type"] for part in _parts(document.get("decoder"), "decoders")}
    pre_tokenizers = {part["type"] for part in _parts(document.get("pre_tokenizer"), "pretokenizers")}
    byte_of = _byte_level_alphabet() if "ByteLevel" in decoders | pre_tokenizers else None
    fallback = bool(document["model"].get("byte_fallback"))
    added = {token["content"]: token["special"] for token in document["added_tokens"]}
    pieces = [b""] * (max(vocab.values()) + 1)
    for token, index in vocab.items():
        if token in added:
            pieces[index] = b"" if added[token] else token.encode()
        elif byte_of is not None:
            pieces[index] = bytes(byte_of[char] for char in token if char in byte_of)
        elif fallback and (match := _BYTE_FALLBACK.fullmatch(token)):
            pieces[index] = bytes.fromhex(match[1])
        else:
            pieces[index] = token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
    return pieces


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes as: printable ones as themselves, others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


def _difference(name: str, text: bytes, kept: bytes) -> str:
    at = next((i for i, (a, b) in enumerate(zip(text, kept, strict=False)) if a != b), min(len(text), len(kept)))
    return (
        f"tokenizer: {name} must keep every byte of a text, "
        f"but {text[max(0, at - 10) : at + 20]!r} became {kept[max(0, at - 10) : at + 20]!r}"
    )
