"""`ultramem plan --run`: different rows counted in the run's own text."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from ultramem.cli import main
from ultramem.graph.value_table import ValueTable
from ultramem.runtime.data import load_corpus, training_batch
from ultramem.runtime.plan.exchange import lookup_shape
from ultramem.runtime.plan.measured_rows import open_run
from ultramem.runtime.plan.options import PlanOptions
from ultramem.runtime.plan.volumes import rows_at_home
from ultramem.runtime.train import train


@pytest.fixture
def run(small_model, small_train, text, tmp_path):
    folder = tmp_path / "run"
    train(replace(small_model, dropout=0.0), replace(small_train, steps=2), load_corpus(text), folder)
    return folder


def test_rows_are_those_that_the_tables_count(run):
    trained = open_run(run)
    measured = trained.measure(64, batches=3)
    slots = trained.model.config.memory.num_slots
    assert (measured.tokens, measured.batches, measured.reads) == (64, 3, 64 * slots)
    assert [each.lookup for each in measured.lookups] == ["memories.0.lookup"]
    (table,) = (each for each in trained.model.modules() if isinstance(each, ValueTable))
    counted = []
    for step in range(3):
        table.count_row_use()
        trained.model.train()
        trained.model(training_batch(trained.stream, step=step, seed=1, batch_size=4, sequence_length=16).inputs_BS)
        assert table.row_use_N is not None
        assert table.row_use_N.sum() == 64 * slots
        counted.append(int(torch.count_nonzero(table.row_use_N)))
        table.row_use_N.zero_()
    assert measured.lookups[0].rows == tuple(counted)
    assert measured.distinct_rows == round(sum(counted) / 3)


def test_the_plan_counts_bytes_of_these_rows(run, capsys):
    command = ["plan", "--run", str(run), "--ranks", "4", "--tokens-per-rank", "64", "--placement", "rows"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    measured = open_run(run).measure(64)
    assert found["measured"] == measured.to_json()
    assert found["distinct_rows"] == measured.distinct_rows < measured.reads
    shape = lookup_shape(open_run(run).model.config.memory, 64)
    wire = PlanOptions(ranks=4).wire
    once = rows_at_home(shape, 4, wire, distinct_rows=measured.distinct_rows)
    (home,) = (each for each in found["placements"] if each["pooling"] == "home")
    assert home["lookup_forward_bytes"] + home["lookup_backward_bytes"] == once.total_bytes
    if found["pooling"] == "home":
        assert any(f"{measured.distinct_rows:,} are different" in line for line in found["advice"])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--rows", "1e6"], "rows must be left out with run, which has its own, got '1e6'"),
        (["--distinct-rows", "9"], "distinct_rows must be left out with run, which has its own, got 9"),
        (["--sequence-length", "8"], "sequence_length must be left out with run, which has its own, got 8"),
        (["--tokens-per-rank", "24"], "tokens_per_rank must be a multiple of sequence_length (16), got 24"),
    ],
)
def test_what_a_run_has_is_not_given(run, capsys, words, error):
    assert main(["plan", "--run", str(run), "--ranks", "2", *words]) == 2
    assert capsys.readouterr().err == f"ultramem plan: error: {error}\n"


def test_text_that_changed_is_refused(run, text, capsys):
    with open(text, "a") as file:
        file.write("more")
    assert main(["plan", "--run", str(run), "--ranks", "2"]) == 2
    assert "is not the text that" in capsys.readouterr().err


def test_a_model_without_tables_is_refused(small_model, small_train, text, tmp_path, capsys):
    folder = tmp_path / "dense"
    train(replace(small_model, memory=None, insertions=""), replace(small_train, steps=1), load_corpus(text), folder)
    assert main(["plan", "--run", str(folder), "--ranks", "2", "--tokens-per-rank", "64"]) == 2
    assert (
        capsys.readouterr().err == "ultramem plan: error: run must have a model with memory layers, got one without\n"
    )
