"""Metrics: JSON that any parser reads, and the same figures in TensorBoard."""

import importlib.util
import json

import pytest

from ultramem.runtime.data import load_corpus
from ultramem.runtime.metrics import scalars
from ultramem.runtime.train import train


def test_names_in_tensorboard():
    assert dict(scalars({"step": 3, "loss": 2.5, "lr": 1e-3, "seconds": 9.0})) == {"train/loss": 2.5, "train/lr": 1e-3}
    assert dict(scalars({"step": 3, "split": "held_out", "eval_loss": 2.5})) == {"held_out/eval_loss": 2.5}
    layer = {"step": 3, "kind": "memory_layer", "name": "memories.0", "singular_values": [[2.0, 0.5]], "kl": None}
    assert dict(scalars(layer)) == {"memories.0/singular_values/0/0": 2.0, "memories.0/singular_values/0/1": 0.5}


def test_every_line_is_strict_json(small_model, small_train, text, tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    train(small_model, small_train, load_corpus(text), tmp_path / "run")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert all("step" in row and "seconds" in row for row in rows)


def test_tensorboard_is_asked_for_where_it_is_missing(small_model, small_train, text, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'ultramem\[tensorboard\]'"):
        train(small_model, small_train, load_corpus(text), tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


class _StopAt:
    def __init__(self, step):
        self.at = step

    def message(self, text):
        pass

    def evaluation(self, row):
        pass

    def step(self, row, steps):
        if row["step"] == self.at:
            raise RuntimeError("pulled the plug")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorBoard's own, at its first import
def test_tensorboard_shows_what_the_json_holds(small_model, small_train, text, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    corpus = load_corpus(text)
    with pytest.raises(RuntimeError, match="plug"):  # step 5 is done, its checkpoint is of step 4
        train(small_model, small_train, corpus, tmp_path / "run", tensorboard=True, progress=_StopAt(5))
    train(small_model, small_train, corpus, tmp_path / "run", tensorboard=True, resume=True)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    shown = events.Scalars("train/loss")
    assert [event.step for event in shown] == [1, 2, 3, 4, 5, 6]
    assert {event.step: event.value for event in shown} == pytest.approx(losses, rel=1e-6)
    assert [event.step for event in events.Scalars("memories.0/output_rms")] == [3, 6]
    assert [event.step for event in events.Scalars("held_out/bits_per_byte")] == [6]
