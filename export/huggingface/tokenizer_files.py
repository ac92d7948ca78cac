"""`tokenizer.json` and `tokenizer_config.json`: the run's tokens, for AutoTokenizer, without a network."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from ultramem.export.run_facts import RunFacts

END_OF_BYTES = "<|endoftext|>"


def write_tokenizer(run: RunFacts, folder: Path, *, max_positions: int) -> None:
    """Write the files. As in training, the end-of-text token goes before a text and none is recognised inside of it."""
    document = copy.deepcopy(run.tokenizer) if run.tokenizer is not None else byte_tokenizer(run.end_of_text)
    name = next(token["content"] for token in document["added_tokens"] if token["id"] == run.end_of_text)
    document["post_processor"] = _end_of_text_first(name, run.end_of_text)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name,
        "eos_token": name,
        "pad_token": name,
        "padding_side": "left",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    _write_json(folder / "tokenizer.json", document)
    _write_json(folder / "tokenizer_config.json", settings)


def byte_tokenizer(end_of_text: int) -> dict[str, Any]:
    """Bytes as tokens in the format of the library `tokenizers`: a byte-level BPE of 256 characters and no merges."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": end_of_text, "content": END_OF_BYTES, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {char: byte for byte, char in enumerate(byte_characters())},
            "merges": [],
        },
    }  # fmt: skip


def byte_characters() -> list[str]:
    """The character that byte-level tokenizers write each byte as: printable ones as themselves, others from U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _end_of_text_first(name: str, token: int) -> dict[str, Any]:
    special, text = {"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, special, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
