"""Tokenizers: whatever the kind, tokens hold exactly the bytes of the text."""

import json
import sys

import pytest

from ultramem.runtime.hugging_face_tokenizer import HuggingFaceTokenizer, train_bpe
from ultramem.runtime.tokenizer import ByteTokenizer, load_tokenizer, read_tokenizer

TEXTS = ["", "plain", " two  spaces\n\n\tand a tab ", "naïve café ☕ 🜁", "<|endoftext|> is text here", "\r\n\x00\x7f"]
SAMPLE = "It is a truth universally acknowledged, that a single man must be in want of a wife. naïve ☕ "


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([SAMPLE.encode()] * 3, 320)


def sentencepiece_like():
    """As Llama's: spaces become U+2581, one is put before each text, unknown characters fall back to bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {piece: 300 + index for index, piece in enumerate(["th", "the", *"▁theplain"])}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": vocab[name], "content": name, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for name in ("<unk>", "<s>", "</s>")
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": 0.5,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": ["t h", "th e"],
        },
    }


def lower_casing():
    document = sentencepiece_like()
    document["normalizer"] = {"type": "Lowercase"}
    return document


@pytest.mark.parametrize("kind", ["bytes", "bpe", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_every_byte_is_kept_and_counted(kind, text, bpe):
    tokenizer = {
        "bytes": ByteTokenizer,
        "bpe": lambda: bpe,
        "sentencepiece": lambda: HuggingFaceTokenizer(sentencepiece_like()),
    }[kind]()
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert int(tokenizer.token_bytes[tokens].sum()) == len(text.encode())
    assert tokenizer.end_of_text not in tokens
    assert int(tokenizer.token_bytes[tokenizer.end_of_text]) == 0
    assert max(tokens, default=0) < tokenizer.vocab_size
    pieces = list(tokenizer.decode_stream([tokenizer.end_of_text, *tokens]))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert tokenizer.encode(text) == tokens


def test_half_a_character_is_shown_as_such():
    assert ByteTokenizer().decode([0xE2, 0x98]) == "\ufffd"


def test_bpe_is_shorter_than_bytes_and_as_large_as_asked(bpe):
    assert bpe.vocab_size == 320
    assert len(bpe.encode(SAMPLE)) < len(SAMPLE.encode()) / 1.5
    again = train_bpe([SAMPLE.encode()] * 3, 320)
    assert again.fingerprint == bpe.fingerprint


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_saved_and_loaded(kind, bpe, tmp_path):
    tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["kind"] == tokenizer.kind
    assert (type(loaded), loaded.fingerprint) == (type(tokenizer), tokenizer.fingerprint)
    assert loaded.encode(SAMPLE) == tokenizer.encode(SAMPLE)


def test_a_folder_without_tokenizer_is_bytes(tmp_path):
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)


def test_a_hugging_face_file_is_read(bpe, tmp_path):
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(bpe.to_dict()["tokenizer"]))
    assert read_tokenizer(path).fingerprint == bpe.fingerprint


def test_a_tokenizer_that_changes_text_is_refused():
    tokenizer = HuggingFaceTokenizer(lower_casing(), name="lower.json")
    assert tokenizer.decode(tokenizer.encode("plain")) == "plain"
    with pytest.raises(ValueError, match=r"lower.json must keep every byte .* b'The' became b'the'"):
        tokenizer.encode("The")


def test_latin_1_is_refused_by_all_but_bytes(bpe):
    text = "café".encode("latin-1")
    assert ByteTokenizer().encode_batch([text])[0].tolist() == list(text)
    with pytest.raises(ValueError, match=r"must be UTF-8"):
        bpe.encode_batch([text])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold an object"),
        ('{"kind": "bytes"}', "format_version 1, got None"),
        ('{"kind": "words", "format_version": 1}', "must be of kind bytes or hugging_face, got 'words'"),
        ('{"model": {"type": "Magic"}}', "not a Hugging Face tokenizer.json"),
    ],
)
def test_damaged_files_are_named(content, said, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        load_tokenizer(tmp_path)


def test_a_tokenizer_needs_an_end_of_text():
    document = sentencepiece_like()
    document["added_tokens"] = document["added_tokens"][:2]
    with pytest.raises(ValueError, match=r"must have a special token of <\|endoftext\|>"):
        HuggingFaceTokenizer(document)


def test_vocab_size_has_two_ends():
    with pytest.raises(ValueError, match=r"vocab_size must be at least 257 .* got 256"):
        train_bpe([SAMPLE.encode()], 256)
    with pytest.raises(ValueError, match=r"vocab_size must be at most \d+, for which the text gives merges, got 99999"):
        train_bpe([SAMPLE.encode()], 99999)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"tokenizers is not installed \(pip install ultramem\[data\]\)"):
        train_bpe([SAMPLE.encode()], 300)
