"""The check of the static table: what fails it, and what does not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import static_page, static_table
from benchmarks.static_table import PAGE, Section, check, compare, read, write

SECTION = Section(
    name="kernels",
    key=("kernel", "arch"),
    at_most={"spills": 1.0, "instructions": 1.05},
    at_least=("occupancy",),
    libraries=("torch",),
)
ROW = {"kernel": "forward", "arch": "sm_90a", "spills": 0, "instructions": 600, "occupancy": 0.5, "registers": 64}


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    path = tmp_path / "static.json"
    write(SECTION, [ROW], path)
    return path


@pytest.mark.parametrize(
    "change", [{"spills": 2}, {"instructions": 631}, {"occupancy": 0.438}, {"kernel": "backward"}], ids=str
)
def test_a_worse_row_fails(committed: Path, change: dict, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(SECTION, [ROW | change], path=committed) == 1
    assert "worse than committed" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{}, {"instructions": 630}, {"registers": 72}, {"occupancy": 0.6}], ids=str)
def test_a_row_that_is_not_worse_passes(committed: Path, change: dict) -> None:
    assert check(SECTION, [ROW | change], path=committed) == 0


def test_missing_and_extra_rows_fail(committed: Path) -> None:
    assert check(SECTION, [], path=committed) == 1
    assert check(SECTION, [ROW, ROW | {"arch": "sm_80"}], path=committed) == 1
    assert check(SECTION, [], within=lambda row: row["arch"] != "sm_90a", path=committed) == 0


def test_without_a_table_every_row_fails(tmp_path: Path) -> None:
    assert check(SECTION, [ROW], path=tmp_path / "none.json") == 1


def test_another_version_is_reported_and_does_not_bind(committed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(committed.read_text())
    content["kernels"]["versions"]["torch"] = "1.0"
    committed.write_text(json.dumps(content))
    assert check(SECTION, [ROW | {"spills": 2}], path=committed) == 0
    printed = capsys.readouterr().out
    assert "spills 0 -> 2" in printed
    assert "not binding" in printed


def test_better_figures_are_named(committed: Path) -> None:
    worse, better = compare(SECTION, [ROW], [ROW | {"instructions": 500, "occupancy": 0.6}])
    assert worse == []
    assert better == ["forward sm_90a: instructions 600 -> 500", "forward sm_90a: occupancy 0.5 -> 0.6"]


def test_writing_a_section_keeps_the_others(committed: Path) -> None:
    other = dataclasses.replace(SECTION, name="launches", libraries=())
    write(other, [{"launches": 3}], committed)
    assert read(committed)["kernels"]["rows"] == [ROW]
    assert read(committed)["launches"] == {"versions": {}, "rows": [{"launches": 3}]}


def test_the_page_shows_the_committed_table() -> None:
    assert static_page.render(read()) == PAGE.read_text()


def test_no_committed_kernel_spills_or_adds_atomically() -> None:
    rows = static_table.read()["kernels"]["rows"]
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90a", "sm_100a"}
    assert all(row["spills"] == row["local_bytes"] == row["stack_bytes"] == row["atomics"] == 0 for row in rows)
