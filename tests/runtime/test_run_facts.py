"""What the Hugging Face export reads in a run folder."""

import json
from dataclasses import replace

import pytest

from ultramem.export.huggingface.card import model_card
from ultramem.runtime.data import load_corpus
from ultramem.runtime.run_facts import run_facts
from ultramem.runtime.train import train


@pytest.fixture
def run(small_model, small_train, text, tmp_path):
    folder = tmp_path / "a-run"
    train(small_model, replace(small_train, save="best"), load_corpus(text), folder)
    return folder


def test_a_run_and_its_best_weights(run, small_model):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    facts = run_facts(run)
    assert (facts.name, facts.tokenizer, facts.end_of_text, facts.vocab_size) == ("a-run", None, 256, 257)
    final = [row for row in rows if row.get("split") == "held_out"][-1]
    assert facts.evaluations["held_out"] == final
    assert facts.config["train"]["steps"] == 6
    assert "| held-out text |" in model_card(small_model, facts)

    best = run_facts(run / "best")
    step = json.loads((run / "best/best.json").read_text())["step"]
    assert best.name == "a-run, best weights"
    assert best.evaluations
    assert all(row["step"] == step for row in best.evaluations.values())


def test_an_unfinished_run_has_what_it_has(run):
    (run / "metrics.jsonl").unlink()
    assert run_facts(run).evaluations == {}


def test_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        run_facts(tmp_path)
