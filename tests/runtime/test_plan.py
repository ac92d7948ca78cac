"""`ultramem plan`: the document, the table, the figure, the advice and bad input."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from ultramem import preset
from ultramem.cli import main
from ultramem.plan_cli import DEVICES, with_rows
from ultramem.runtime.plan import lookup_shape
from ultramem.runtime.plan.figure_9 import crossing_ranks, figure_9
from ultramem.runtime.plan.options import PlanOptions
from ultramem.runtime.plan.plan import make_plan
from ultramem.runtime.plan.plan_devices import PLAN_DEVICES, plan_device
from ultramem.runtime.plan.volumes import columns, rows_at_home

ROOT = Path(__file__).parents[2]
LARGE = ["plan", "--preset", "ultramem-1.6b-x12"]


def planned(name="ultramem-1.6b-x12", device="h100", **changes):
    options = PlanOptions(**({"ranks": 64} | changes))
    return make_plan(name, preset(name), options, plan_device(device, options))


def document(capsys, *words):
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys, *words):
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("ultramem plan: error: ")
    return line.removeprefix("ultramem plan: error: ")


def test_the_document_adds_up(capsys):
    found = document(capsys, *LARGE, "--ranks", "64")
    assert (found["placement"], found["tables"], found["table_rows"]) == ("columns", 6, 1792**2)
    labels = [(each["placement"], each["pooling"]) for each in found["placements"]]
    assert labels == [("replicate", None), ("columns", None), ("rows", "home"), ("rows", "owner")]
    for each in found["placements"]:
        by_pass = {"forward": 0, "backward": 0}
        for collective in each["collectives"]:
            by_pass[collective["phase"]] += collective["sent_bytes"]
        assert by_pass == {"forward": each["lookup_forward_bytes"], "backward": each["lookup_backward_bytes"]}
        assert each["step_bytes"] == 6 * sum(by_pass.values())
        assert each["total_memory_bytes"] == sum(each["memory_bytes"].values())
        assert each["fits"] == (each["total_memory_bytes"] <= 80e9)
    replicas = found["placements"][0]
    assert replicas["refused"].startswith("Replicating is not possible")


def test_the_table_names_what_is_chosen(capsys):
    assert main([*LARGE, "--ranks", "64"]) == 0
    out = capsys.readouterr().out
    chosen = [line for line in out.splitlines() if "│ * │" in line]
    assert len(chosen) == 1
    assert "columns" in chosen[0]
    assert "173,408,256" in out  # 4 * 8192 * 84 * 63, the indices of columns
    assert "So: columns; rows, pooled at home would send" in out
    assert "Times are floors" in out


def test_more_ranks_more_rows_other_types(capsys):
    assert document(capsys, *LARGE, "--ranks", "1024")["placement"] == "rows"
    wide = document(capsys, *LARGE, "--ranks", "64", "--rows", "1e9")
    assert wide["table_rows"] == 31623**2
    indices = {each["payload"]: each["sent_bytes"] for each in wide["placements"][1]["collectives"]}["indices"]
    assert indices == 8 * 8192 * 84 * 63  # 4 * 10^9 virtual rows need 8 bytes
    single = document(capsys, *LARGE, "--ranks", "64", "--dtype", "fp32")
    scores = {each["payload"]: each["sent_bytes"] for each in single["placements"][1]["collectives"]}["scores"]
    assert scores == 4 * 2 * 8192 * 84 * 63
    forced = document(capsys, *LARGE, "--ranks", "64", "--placement", "rows", "--no-deduplicate")
    assert (forced["placement"], forced["pooling"], forced["distinct_rows"]) == ("rows", "home", None)
    assert document(capsys, *LARGE, "--ranks", "64", "--distinct-rows", "5000")["placement"] == "rows"


def test_the_devices_of_the_command_are_those_that_are_planned_for(capsys):
    assert DEVICES == PLAN_DEVICES
    here = document(
        capsys, "plan", "--preset", "ultramem-tiny", "--ranks", "2", "--device", "cpu", "--network-gbit", "10",
        "--sequence-length", "64", "--tokens-per-rank", "256", "--dtype", "fp32",
    )  # fmt: skip
    assert here["options"]["ranks_per_node"] == 1
    assert here["placement"] in ("rows", "columns", "replicate")


@pytest.mark.parametrize("name", ["pkm-tiny", "memory-plus-tiny", "peer-tiny", "ultramem-v2-tiny"])
def test_every_family_is_planned(name):
    plan = planned(name, ranks=8)
    assert [each.volume.label for each in plan.placements if each is plan.chosen] == [plan.choice.volume.label]
    assert plan.chosen.refused is None
    payloads = {each.payload for each in plan.placements[2].volume.collectives}
    assert ("input rows" in payloads) == (preset(name).memory.expert_dim > 0)


def test_a_shared_table_is_reduced_once():
    """Memory+'s two layers read one table: replicas send its gradient once, an exchange is made twice."""
    plan = planned("memory-plus-tiny", ranks=8)
    by_label = {each.volume.label: each for each in plan.placements}
    assert by_label["replicate"].step_bytes == by_label["replicate"].volume.total_bytes
    assert by_label["columns"].step_bytes == 2 * by_label["columns"].volume.total_bytes


def test_checkpointing_sends_nothing_more():
    """Rows are not fetched again; what a lookup keeps stays."""
    plain, again = (planned(activation_checkpointing=each).chosen for each in (False, True))
    assert again.step_bytes == plain.step_bytes
    assert again.time.dense_us > plain.time.dense_us
    assert again.time.memory_us == plain.time.memory_us
    assert again.memory_bytes < plain.memory_bytes


def test_what_is_short_is_said_with_what_would_do():
    plan = planned(ranks=16, tokens_per_rank=12288)
    said = next(each for each in plan.advice if each.startswith("A rank's memory does not suffice"))
    named = re.findall(r"(activation checkpointing|row_adagrad|bfloat16 tables|half the tokens per rank) \(", said)
    assert named == ["activation checkpointing", "half the tokens per rank"]
    better = planned(ranks=16, tokens_per_rank=12288, activation_checkpointing=True)
    assert any(each.startswith("A rank's memory suffices") for each in better.advice)
    hopeless = planned(ranks=2, tokens_per_rank=65536)
    assert any("No one change is enough." in each for each in hopeless.advice)


def test_advice_is_given_where_it_applies():
    wide, narrow = planned(ranks=64), planned(ranks=256)
    assert not any("read in pieces" in each for each in wide.advice)
    assert any("A rank's part of a row is 16 bytes" in each for each in narrow.advice)
    by_rows = planned(placement="rows")
    assert any("columns would be faster" in each for each in by_rows.advice)
    assert any("in the open" in each for each in by_rows.advice)
    assert any(each.startswith("Deduplication saves") for each in by_rows.advice)
    assert not any("in the open" in each for each in planned(ranks=8).advice)
    assert any(each.startswith("Around forward and backward a rank waits") for each in planned(ranks=1024).advice)
    assert any(each.startswith("FSDP pads the dense weights to ") for each in planned(ranks=1024).advice)
    assert not any("pads" in each for each in planned(ranks=64).advice)
    assert not any("pads" in each for each in planned(ranks=1024, dense="replicate").advice)


def test_an_accumulator_a_row_keeps_columns_together():
    plan = planned(table_optimizer="row_adagrad")
    assert plan.chosen.volume.placement == "rows"
    assert any(reason.startswith("Columns are not possible: row_adagrad") for reason in plan.choice.reasons)
    with pytest.raises(ValueError, match=r"placement must not be 'columns' here\. Columns are not possible: row"):
        planned(table_optimizer="row_adagrad", placement="columns")


def test_copies_send_less_in_a_lookup_and_their_gradients_besides(capsys):
    one, four = (document(capsys, *LARGE, "--ranks", "64", "--table-copies", copies) for copies in ("1", "4"))
    cut, copied = one["placements"][1], four["placements"][1]
    assert copied["lookup_forward_bytes"] < cut["lookup_forward_bytes"]
    assert cut["copies"] == []
    assert copied["memory_bytes"]["table weights"] == 4 * cut["memory_bytes"]["table weights"]
    lookups = copied["lookup_forward_bytes"] + copied["lookup_backward_bytes"]
    assert copied["step_bytes"] == 6 * (lookups + sum(each["sent_bytes"] for each in copied["copies"]))


def test_the_figure_shows_where_volumes_cross(capsys, tmp_path):
    path = tmp_path / "new" / "figure.svg"
    assert main([*LARGE, "--ranks", "64", "--plot", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    root = ElementTree.fromstring(path.read_text())
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"columns send less", "rows send less", "64 ranks, 1024 wide", "the paper's formulas"} <= set(texts)
    plan = planned()
    shape, wire = lookup_shape(plan.config.memory, 4096), plan.options.wire
    crossing = crossing_ranks(shape, wire, training=True)
    assert f"{crossing} ranks" in texts
    for ranks, rows_win in ((crossing - 1, False), (crossing, True)):
        assert (rows_at_home(shape, ranks, wire).total_bytes < columns(shape, ranks, wire).total_bytes) == rows_win


def test_no_figure_of_what_has_no_columns():
    with pytest.raises(ValueError, match=r"plot must be of a model without experts as slots, got peer-tiny"):
        figure_9(planned("peer-tiny", ranks=8))


def test_the_page_on_scaling_is_what_the_plans_say():
    make = runpy.run_path(str(ROOT / "docs/make_scaling.py"))
    assert (ROOT / "docs/scaling.md").read_text() == make["page"]()
    assert (ROOT / "docs/scaling.svg").read_text() == make["picture"]()


def test_the_readme_shows_what_the_command_prints(capsys):
    """The table of its section on planning, line by line."""
    readme = (ROOT / "README.md").read_text()
    (command, shown) = re.search(r"## Planning\n.*?```bash\n(.*?)\n```.*?```text\n(.*?)```", readme, re.DOTALL).groups()
    words = shlex.split(command.splitlines()[0], comments=True)
    assert main(words[1:]) == 0
    printed = capsys.readouterr().out
    assert shown in printed


def test_rows_are_rounded_up_to_a_square():
    config = preset("ultramem-tiny")
    assert [with_rows(config, text).memory.num_values for text in ("1e4", "10001", "100")] == [10000, 101**2, 100]
    windows = with_rows(preset("ultramem-v2-tiny"), "40000").memory
    assert windows.table_rows == 4 * 100**2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "dense-tiny"], "preset must be a model with memory layers, got 'dense-tiny'"),
        (["--ranks", "0"], "ranks must be at least 1, got 0"),
        (["--device", "tpu"], "device must be one of h100, h200, cpu, got 'tpu'"),
        (["--rows", "many"], "rows must be a number from 1 to 1e15, as 1e9, got 'many'"),
        (["--plot", "a.png"], "plot must be a file name that ends in .svg, got 'a.png'"),
        (["--dtype", "fp8"], "dtype must be one of bf16, fp32, got 'fp8'"),
        (["--device", "cpu"], "network_gbit must be given with device cpu, whose network nobody knows, got None"),
        (["--tokens-per-rank", "100"], "tokens_per_rank must be a multiple of sequence_length (2048), got 100"),
        (["--table-dtype", "int8"], "table_dtype must be one of float32, bfloat16, got 'int8'"),
    ],
)
def test_bad_input_is_one_line(capsys, words, message):
    assert refused(capsys, "plan", "--preset", "ultramem-tiny", "--ranks", "8", *words) == message


def test_a_placement_that_cannot_be_is_refused(capsys):
    words = ["plan", "--preset", "ultramem-tiny", "--ranks", "7", "--placement", "columns"]
    assert refused(capsys, *words).startswith(
        "placement must not be 'columns' here. Columns are not possible: value_dim 96"
    )
    assert "sqrt(expansion) * knum must be at most 65536" in refused(capsys, *LARGE, "--ranks", "64", "--rows", "2e9")
