"""Comparison with a baseline, and the Chrome trace: the rule, the refusals, the exit codes."""

from __future__ import annotations

import copy
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from profile_cases import make_profile
from rich.console import Console

from ultramem.cli import main
from ultramem.runtime.profile import to_json
from ultramem.runtime.profile.baseline import Limit, change_table, compare, parse_limits, read_profile
from ultramem.runtime.profile.chrome_trace import chrome_trace


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return to_json(make_profile())


@pytest.fixture
def document(measured: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(measured)


def with_rounds(document: dict[str, Any], kind: str, metric: str, value_us: float, rounds_us: list[float]) -> Any:
    changed = copy.deepcopy(document)
    changed[kind][0] |= {f"{metric}_us": value_us, f"round_{metric}_us": rounds_us}
    return changed


def test_limits_are_parsed() -> None:
    assert parse_limits("p50>+5%, ttft>+12.5%") == (Limit("p50", 0.05), Limit("ttft", 0.125))


@pytest.mark.parametrize(
    "text", ["", "p50", "p50>5%", "p50>+5", "p50<+5%", "p42>+5%", "p50>+-5%", "p50>+5%,", "p50>+5%,p50>+6%", "p50>+5%%"]
)
def test_bad_limits_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="fail_if must"):
        parse_limits(text)


@pytest.mark.parametrize(
    ("kind", "metric"), [("latency", "p50"), ("latency", "p99"), ("requests", "ttft"), ("requests", "tpot")]
)
@pytest.mark.parametrize(
    ("now_us", "rounds_us", "fails"),
    [
        (106.0, [104.0, 106.0, 107.0], True),
        (106.0, [103.0, 106.0, 107.0], False),  # the intervals touch
        (106.0, [90.0, 106.0, 140.0], False),
        (105.0, [104.0, 105.0, 106.0], False),  # no more than the limit
        (60.0, [59.0, 60.0, 61.0], False),  # better
    ],
)
def test_a_change_fails_beyond_limit_and_spread(
    document: dict[str, Any], kind: str, metric: str, now_us: float, rounds_us: list[float], fails: bool
) -> None:
    before = with_rounds(document, kind, metric, 100.0, [98.0, 100.0, 103.0])
    now = with_rounds(document, kind, metric, now_us, rounds_us)
    changes = compare(before, now, (Limit(metric, 0.05),))
    (changed,) = [each for each in changes if each.metric == metric and each.before_us == 100.0]
    assert changed.fails == fails
    assert changed.growth == pytest.approx(now_us / 100 - 1)
    assert (changed.before_low_us, changed.before_high_us) == (98.0, 103.0)
    assert [each for each in changes if each.fails and each != changed] == []
    assert not any(each.fails for each in compare(before, now))


def test_every_metric_of_every_row_is_compared(document: dict[str, Any]) -> None:
    changes = compare(document, document)
    assert len(changes) == 3 * len(document["latency"]) + 2 * len(document["requests"])
    assert {each.growth for each in changes} == {0.0}
    written = io.StringIO()
    console = Console(width=200, file=written)
    console.print(change_table(compare(document, document, (Limit("p50", 0.05),))))
    text = written.getvalue()
    assert "p50" in text
    assert "p90" not in text
    assert "lies above the baseline's" in " ".join(text.split())


@pytest.mark.parametrize(
    ("place", "value", "field"),
    [
        (("machine", "device"), "another", "machine.device"),
        (("machine", "threads"), 77, "machine.threads"),
        (("model", "dtype"), "bfloat16", "model.dtype"),
        (("model", "config", "memory", "top_m"), 5, "model.config.memory.top_m"),
        (("settings", "new_tokens"), 5, "settings.new_tokens"),
        (("settings", "batches"), [1], "settings.batches"),
        (("engines",), [], "engines"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    document: dict[str, Any], place: tuple[str, ...], value: Any, field: str
) -> None:
    other: Any = copy.deepcopy(document)
    *path, last = place
    inner = other
    for name in path:
        inner = inner[name]
    inner[last] = value
    with pytest.raises(ValueError, match=f"^{field} must be that of the baseline, .*, got "):
        compare(other, document)


def test_other_versions_can_be_compared(document: dict[str, Any]) -> None:
    other = copy.deepcopy(document)
    other["machine"]["versions"]["torch"] = "9.9"
    other["model"]["name"] = "another folder"
    assert compare(other, document)


def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, document: dict[str, Any]) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(
        FileNotFoundError, match=r"baseline must be a profile\.json, got .*profile\.json, which is not a file"
    ):
        read_profile(path, "baseline")
    for text in ("{", json.dumps({"kind": "other"}), json.dumps({**document, "format_version": 1})):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not a profile"):
            read_profile(path, "baseline")
    path.write_text(json.dumps(document))
    assert read_profile(path, "baseline") == document


# The Trace Event Format


def test_trace_events_have_the_form_of_the_format(document: dict[str, Any]) -> None:
    trace = json.loads(json.dumps(chrome_trace(document)))
    assert trace["displayTimeUnit"] == "ms"
    names = {(each["pid"], each["tid"]): each["args"]["name"] for each in trace["traceEvents"] if each["ph"] == "M"}
    assert names == {
        (1, 0): "eager",
        **{(1, n): what for n, what in enumerate(
            ("prefill, batch 1", "decode, batch 1", "prefill, batch 3", "decode, batch 3"), start=1
        )},
    }  # fmt: skip
    complete = [each for each in trace["traceEvents"] if each["ph"] == "X"]
    assert len(trace["traceEvents"]) == len(names) + len(complete)
    for event in complete:
        assert (event["pid"], event["tid"]) in names
        assert event["ts"] >= 0
        assert event["dur"] > 0
        assert isinstance(event["name"], str)
        assert isinstance(event["cat"], str)
    for thread, times in enumerate(document["stages"], start=1):
        whole, *nodes = [each for each in complete if each["tid"] == thread]
        assert (whole["name"], whole["ts"], whole["dur"]) == (names[1, thread], 0, times["fastest_us"])
        assert len(nodes) == len([node for node in times["nodes"] if node["fastest_span_us"] > 0]) > 30
        assert all(each["ts"] + each["dur"] <= whole["dur"] + 1e-6 for each in nodes)
        operators = sorted((each["ts"], each["ts"] + each["dur"]) for each in nodes if each["args"]["kind"] != "module")
        assert all(end <= start + 1e-6 for (_, end), (start, _) in itertools.pairwise(operators))


# The command


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profile")
    assert main([*COMMAND, "--out", str(out)]) == 0
    return out


COMMAND = ["profile", "dense-tiny", "--batch", "1", "--prompt-tokens", "4", "--new-tokens", "3", "--seconds", "0.1"]


def test_a_profile_folder_has_its_three_files(profiled: Path) -> None:
    assert sorted(each.name for each in profiled.iterdir()) == ["profile.json", "report.html", "trace.json"]
    document = json.loads((profiled / "profile.json").read_text())
    assert json.loads((profiled / "trace.json").read_text()) == chrome_trace(document)


def test_exit_codes_of_a_comparison(profiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads((profiled / "profile.json").read_text())
    quick, slow = copy.deepcopy(document), copy.deepcopy(document)
    for made, factor in ((quick, 1e-3), (slow, 1e3)):
        for row in made["requests"]:
            row["tpot_us"] *= factor
            row["round_tpot_us"] = [value * factor for value in row["round_tpot_us"]]
    for made, code in ((quick, 1), (slow, 0)):
        baseline = tmp_path / "old.json"
        baseline.write_text(json.dumps(made))
        out = tmp_path / str(code)
        words = [*COMMAND, "--out", str(out), "--baseline", str(baseline), "--fail-if", "tpot>+5%", "--json"]
        assert main(words) == code
        changes = json.loads(capsys.readouterr().out.splitlines()[-1])["changes"]
        assert [each["fails"] for each in changes if each["metric"] == "tpot"] == [code == 1]
        assert (out / "profile.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fail-if", "p50>+5%"], "fail_if needs a baseline"),
        (["--baseline", "BASELINE", "--fail-if", "p50>5%"], "fail_if must be METRIC>+N%"),
        (["--baseline", "nowhere.json"], "baseline must be a profile.json, got nowhere.json, which is not a file"),
        (["--baseline", "BASELINE", "--new-tokens", "9"], "settings.new_tokens must be that of the baseline, 3, got 9"),
        (["--baseline", "BASELINE", "--engine", "eager,compile"], "engines must be that of the baseline, ['eager']"),
        (["--beside", "BASELINE", "--batch", "2"], "settings.batches must be that of"),
    ],
)
def test_bad_input_of_a_comparison(
    words: list[str], said: str, profiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    given = [str(profiled / "profile.json") if word == "BASELINE" else word for word in words]
    assert main([*COMMAND, "--out", str(tmp_path / "out"), *given]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert said in line
    assert captured.out == ""
    assert not (tmp_path / "out").exists()
