"""The benchmark of selection: its figures against brute force on a tiny grid, and its result file."""

import itertools
import json

import pytest
import torch

import ultramem
from benchmarks import selection_quality
from benchmarks.selection_quality import Rule, Scores, WrongSelectionError, exact_top, quality
from benchmarks.selection_recall import main
from ultramem import MemoryConfig, ModelConfig
from ultramem.graph.singular import leading_singular_pair
from ultramem.graph.weights import save_weights, write_config
from ultramem.ops.tucker_topk import tail_length

T, H, R, N, C, M = 5, 2, 2, 9, 2, 3


@pytest.fixture
def scores():
    return Scores(torch.randn(T, H, R, N), torch.randn(T, H, R, N), torch.rand(H, C, R, R))


def by_hand(scores, rule, m):
    """(recall, score share, sign overlap) by sets and loops."""
    u, t = leading_singular_pair(scores.cores_HCRR.sum(1))
    k, tail, total, exact_total = rule.k(m), tail_length(rule.k(m)), 0.0, 0.0
    recalls, overlaps = [], []
    for token, head in itertools.product(range(T), range(H)):
        row, col, core = scores.row_THRN[token, head], scores.col_THRN[token, head], scores.cores_HCRR[head].sum(0)
        cell = {(i, j): float(row[:, i] @ core @ col[:, j]) for i in range(N) for j in range(N)}
        by_row, by_col = (u[head] @ row).argsort().tolist(), (t[head] @ col).argsort().tolist()  # ascending
        high, low = set(itertools.product(by_row[-k:], by_col[-k:])), set(itertools.product(by_row[:k], by_col[:k]))
        if rule.candidates == "two_tailed":
            high = low = {
                *itertools.product(by_row[-tail:], by_col[-tail:]),
                *itertools.product(by_row[:tail], by_col[:tail]),
            }
        best, kept, turned = (set(sorted(among, key=cell.get)[-m:]) for among in (cell, high, low))
        recalls.append(len(best & kept) / m)
        overlaps.append(len(kept & turned) / m)
        total += sum(map(cell.get, kept))
        exact_total += sum(map(cell.get, best))
    return sum(recalls) / len(recalls), total / exact_total, sum(overlaps) / len(overlaps)


@pytest.mark.parametrize("candidates", ["one_tailed", "two_tailed"])
@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0])
def test_figures_are_those_of_a_search_by_hand(scores, candidates, factor):
    rule = Rule(candidates, factor)
    (figures,) = quality(scores, M, [rule])
    assert figures == pytest.approx(by_hand(scores, rule, M), abs=1e-6)


def test_with_every_row_and_column_a_candidate_nothing_is_missed(scores):
    (figures,) = quality(scores, M, [Rule("one_tailed", N / M)])
    assert figures == pytest.approx((1, 1, 1), abs=1e-6)


def test_the_exact_search_does_not_depend_on_how_many_grids_it_holds(scores):
    one_by_one, at_once = exact_top(scores, M, grid_bytes=1), exact_top(scores, M)
    assert torch.equal(one_by_one.addresses_THM, at_once.addresses_THM)


def test_a_wrong_selection_is_not_reported(scores, monkeypatch):
    right = selection_quality.tucker_topk

    def elsewhere(*args, **options):
        top = right(*args, **options)
        return top._replace(addresses=top.addresses.flip(-1))

    monkeypatch.setattr(selection_quality, "tucker_topk", elsewhere)
    with pytest.raises(WrongSelectionError, match="a score is not that of its cell"):
        quality(scores, M)


def test_runs_are_merged_into_the_file_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("It is a truth universally acknowledged. " * 100)
    (tmp_path / "out.json").write_text(json.dumps({"benchmark": "selection_recall", "init": ["as it was"]}))
    memory = MemoryConfig(hidden_size=32, num_layers=2, value_dim=16, key_dim=8, knum=8, top_m=4)
    config = ModelConfig(
        vocab_size=257, hidden_size=32, inner_size=48, num_heads=2, num_layers=2, memory=memory, insertions="1:2"
    )
    (tmp_path / "run").mkdir()
    write_config(tmp_path / "run", config, data={"name": "text.txt"}, train={"sequence_length": 16})
    save_weights(ultramem.build_model(config), tmp_path / "run")
    for _ in range(2):  # the second measures the run again
        assert main(["--run", "missing", "--run", "run", "--out", "out.json"]) == 2
    output = capsys.readouterr()
    assert "missing is not a run folder" in output.err
    document = json.loads((tmp_path / "out.json").read_text())
    assert document == json.loads(output.out.splitlines()[-1])
    assert document["init"] == ["as it was"]
    (record,) = document["trained"]
    assert (record["run"], record["stage"], record["side"]) == ("run", "memories.0.select", 16)
    rules = {(row["candidates"], row["k"]): row for row in record["rules"]}
    assert len(rules) == 8
    assert rules["one_tailed", 16]["recall"] == [1.0]  # of a side of 16
    assert rules["two_tailed", 4]["sign_overlap"] == [1.0]
