"""`ultramem data`, and runs whose tokens are not bytes: results, and bad input as one line with exit code 2."""

import json
import math

import pytest

from ultramem import ModelConfig, TrainConfig
from ultramem.cli import main
from ultramem.graph.weights import read_model_config
from ultramem.runtime.data import load_corpus
from ultramem.runtime.train import train

TEXT = "She was the youngest of the two daughters of a most affectionate, indulgent father. "


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 40)
    return path


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys, *words):
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("ultramem data")
    return line


def test_prepare_says_what_it_made(text, tmp_path, capsys):
    command = ["data", "prepare", str(text), "--out", str(tmp_path / "out"), "--shard-tokens", "1000"]
    assert main([*command, "--json"]) == 0
    result = last_json(capsys)
    assert result["train"]["bytes"] + result["held_out"]["bytes"] == len(TEXT) * 40
    assert result["train"] == {"documents": 1, "tokens": 3193, "bytes": 3192, "shards": 4}
    assert (tmp_path / "out/manifest.json").is_file()
    assert main(command) == 0
    assert f"use it with --data {tmp_path / 'out'}" in capsys.readouterr().out


def test_train_on_prepared_bytes_is_training_on_the_text(text, tmp_path, capsys):
    assert main(["data", "prepare", str(text), "--out", str(tmp_path / "data")]) == 0
    options = ["--steps", "2", "--batch-size", "2", "--sequence-length", "16", "--no-compile", "--eval-every", "0"]
    results = []
    for name, data in (("text", text), ("prepared", tmp_path / "data")):
        run = ["--preset", "dense-tiny", "--data", str(data), "--out", str(tmp_path / name)]
        assert main(["train", *run, *options, "--json"]) == 0
        result = last_json(capsys)
        results.append((result["train_loss"], result["held_out"]))
    assert results[0] == results[1]


@pytest.fixture
def bpe_run(text, tmp_path, capsys):
    words = ["--out", str(tmp_path / "data"), "--tokenizer", "bpe", "--vocab-size", "280"]
    assert main(["data", "prepare", str(text), *words]) == 0
    model = ModelConfig(vocab_size=280, hidden_size=16, inner_size=16, num_heads=2, num_layers=1)
    config = TrainConfig(steps=2, batch_size=2, sequence_length=16, compile=False, eval_every=0)
    train(model, config, load_corpus(str(tmp_path / "data")), tmp_path / "run")
    capsys.readouterr()
    return tmp_path / "run"


def test_a_run_uses_its_own_tokenizer(bpe_run, text, tmp_path, capsys):
    assert json.loads((bpe_run / "tokenizer.json").read_text())["kind"] == "hugging_face"
    assert main(["generate", str(bpe_run), "--prompt", "She was", "--max-new-tokens", "5", "--json"]) == 0
    generated = last_json(capsys)
    tokenizer = load_corpus(str(tmp_path / "data")).tokenizer
    assert generated["text"] == tokenizer.decode(generated["tokens"])
    assert main(["eval", str(bpe_run), "--json"]) == 0
    held_out = last_json(capsys)["held_out"]
    assert held_out["text_bytes"] == math.ceil(len(TEXT) * 40 * 0.05)
    assert held_out["tokens"] < held_out["text_bytes"]
    bits = held_out["loss"] * held_out["tokens"] / math.log(2)
    assert held_out["bits_per_byte"] == pytest.approx(bits / held_out["text_bytes"], rel=1e-12)
    assert main(["eval", str(bpe_run), "--data", str(text)]) == 0
    assert f"tokens, {len(TEXT) * 40:,} bytes" in capsys.readouterr().out


def test_a_few_rows_can_be_evaluated_on_but_not_trained_on(bpe_run, tmp_path, capsys):
    rows = tmp_path / "few.jsonl"
    rows.write_text(json.dumps({"text": "one of the two daughters"}) + "\n")
    assert main(["eval", str(bpe_run), "--data", str(rows), "--json"]) == 0
    assert last_json(capsys)["all"]["text_bytes"] == len("one of the two daughters")
    train_words = ["--preset", "dense-tiny", "--data", str(rows), "--out", str(tmp_path / "new")]
    assert main(["train", *train_words, "--steps", "1", "--sequence-length", "8", "--no-compile"]) == 2
    assert "few.jsonl has too little text for a" in capsys.readouterr().err
    out = ["--out", tmp_path / "prepared"]
    assert "there is too little text for a" in refused(capsys, "data", "prepare", rows, *out)


def test_a_models_vocabulary_follows_the_tokenizer(bpe_run, tmp_path):
    config = TrainConfig(steps=2, batch_size=2, sequence_length=16, compile=False)
    model = ModelConfig(vocab_size=257, hidden_size=16, inner_size=16, num_heads=2, num_layers=1)
    train(model, config, load_corpus(str(tmp_path / "data")), tmp_path / "other")
    assert read_model_config(tmp_path / "other").vocab_size == 280


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data"], "required: ACTION"),
        (["data", "get", "everything"], "invalid choice: 'everything'"),
        (["data", "get", "gutenberg", "--out", "TEXT"], "exists and is not a folder of these books"),
        (["data", "prepare", "nowhere", "--out", "out"], "got 'nowhere'"),
        (["data", "prepare", "TEXT"], "required: --out"),
        (["data", "prepare", "TEXT", "--out", "TEXT"], "exists and is not a folder"),
        (["data", "prepare", "gutenberg", "--out", "out"], "run `ultramem data get gutenberg` first"),
        (["data", "prepare", "TEXT", "--out", "out", "--held-out", "0.9"], "at most 0.5, got 0.9"),
        (["data", "prepare", "TEXT", "--out", "out", "--held-out", "x"], "invalid float value: 'x'"),
        (["data", "prepare", "TEXT", "--out", "out", "--shard-tokens", "0"], "shard_tokens must be at least 1, got 0"),
        (["data", "prepare", "TEXT", "--out", "out", "--vocab-size", "300"], "unless tokenizer is bpe, got 300"),
        (["data", "prepare", "TEXT", "--out", "out", "--tokenizer", "none.json"], "there is no file none.json"),
        (["data", "prepare", "TEXT", "--out", "out", "--tokenizer", "TEXT"], "is not valid JSON"),
        (["data", "prepare", "TEXT", "--out", "out", "--out-of-domain", "gone.txt"], "got 'gone.txt'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(words, said, text, tmp_path, capsys, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert said in refused(capsys, *[text if word == "TEXT" else word for word in words])
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("size", ["256", "99999"])
def test_a_bpe_of_an_impossible_size(size, text, tmp_path, capsys):
    words = ["--out", tmp_path / "out", "--tokenizer", "bpe", "--vocab-size", size]
    assert "vocab_size must be at" in refused(capsys, "data", "prepare", text, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["data", "data get", "data prepare"])
def test_help(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: ultramem {command}")
