"""The committed figures of the kernels that need no GPU, and the comparison that keeps them from getting worse.

benchmarks/results/static.json holds one section per tool; docs/static.md is rendered from it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "static.json"
PAGE = ROOT / "docs" / "static.md"


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One table, and what makes a row of it worse than the committed one."""

    name: str
    key: tuple[str, ...]
    """Fields that name a row."""
    at_most: Mapping[str, float]
    """Figures that may not grow by more than this factor."""
    at_least: tuple[str, ...] = ()
    """Figures that may not shrink."""
    libraries: tuple[str, ...] = ()
    """Whose versions decide the figures: of other versions the comparison is shown, but does not fail."""


def versions(section: Section) -> dict[str, str]:
    return {name: importlib.metadata.version(name).split("+")[0] for name in section.libraries}


def read(path: Path = RESULTS) -> dict[str, Any]:
    if not path.exists():
        return {}
    sections: dict[str, Any] = json.loads(path.read_text())
    return sections


def write(section: Section, rows: Iterable[Row], path: Path = RESULTS) -> None:
    """Replace one section; a row is a line, so that a change of the file reads as a change of rows."""
    sections = {**read(path), section.name: {"versions": versions(section), "rows": list(rows)}}
    parts = []
    for name, content in sorted(sections.items()):
        lines = ",\n".join(f"      {json.dumps(row)}" for row in content["rows"])
        parts.append(
            f'  "{name}": {{\n    "versions": {json.dumps(content["versions"])},\n    "rows": [\n{lines}\n    ]\n  }}'
        )
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def compare(section: Section, committed: Iterable[Row], fresh: Iterable[Row]) -> tuple[list[str], list[str]]:
    """(what is worse, what is better), one line a figure. Rows that only one side has are worse."""
    old_rows, new_rows = ({row_name(section, row): row for row in rows} for rows in (committed, fresh))
    worse = [f"{name}: not in the committed table" for name in new_rows.keys() - old_rows.keys()]
    worse += [f"{name}: in the committed table only" for name in old_rows.keys() - new_rows.keys()]
    better = []
    for name in (name for name in new_rows if name in old_rows):
        old, new = old_rows[name], new_rows[name]
        for field, factor in section.at_most.items():
            if new[field] > old[field] * factor:
                worse.append(f"{name}: {field} {old[field]} -> {new[field]}")
            elif new[field] < old[field]:
                better.append(f"{name}: {field} {old[field]} -> {new[field]}")
        for field in section.at_least:
            if new[field] != old[field]:
                (worse if new[field] < old[field] else better).append(f"{name}: {field} {old[field]} -> {new[field]}")
    return sorted(worse), sorted(better)


def row_name(section: Section, row: Row) -> str:
    return " ".join(str(row[field]) for field in section.key)


def check(
    section: Section, fresh: list[Row], *, within: Callable[[Row], bool] = lambda row: True, path: Path = RESULTS
) -> int:
    """Print what became worse and better than the committed rows `within`; 1 if something that binds did."""
    content = read(path).get(section.name, {"versions": versions(section), "rows": []})
    worse, better = compare(section, filter(within, content["rows"]), fresh)
    binding = content["versions"] == versions(section)
    for heading, lines in (("worse than committed", worse), ("better than committed: `make static` keeps it", better)):
        if lines:
            print(f"{section.name}: {heading}", *lines, sep="\n  ")
    if not binding:
        print(f"{section.name}: not binding, made with {content['versions']}, here is {versions(section)}")
    print(f"{section.name}: {len(fresh)} rows, {len(worse)} worse, {len(better)} better")
    return 1 if worse and binding else 0


def add_modes(parser: argparse.ArgumentParser) -> None:
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="end 1 if a row is worse than the committed one")
    mode.add_argument("--update", action="store_true", help="write the committed table")


def conclude(section: Section, rows: list[Row], options: argparse.Namespace) -> int:
    """Do as `add_modes` says with all rows of a section; returns the exit status."""
    if options.update:
        write(section, rows)
    return check(section, rows) if options.check else 0
