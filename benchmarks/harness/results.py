"""The results file: one record a row, written whole after each."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.source import Source

Record = dict[str, Any]


class Results:
    """Records by row name, in the order of the suite."""

    def __init__(self, path: Path, suite: str, order: Sequence[str]) -> None:
        self.path = path
        self.suite = suite
        self._order = list(order)
        self.rows: dict[str, Record] = {}
        self.tests: list[Record] = []
        if path.exists():
            document = json.loads(path.read_text())
            if document.get("suite") != suite:
                raise ValueError(f"{path} must hold results of suite {suite!r}, got {document.get('suite')!r}")
            self.rows = {record["row"]: record for record in document["rows"]}
            self.tests = document.get("tests", [])

    def is_done(self, row: str, source: Source, setting: Mapping[str, Any]) -> bool:
        """Was the row measured at this very source, in this setting?"""
        record = self.rows.get(row)
        return (
            record is not None
            and record["status"] == "measured"
            and not (source.dirty or record["dirty"])
            and record["commit"] == source.commit
            and all(record.get(name) == value for name, value in setting.items())
        )

    def add(self, record: Record) -> None:
        self.rows[record["row"]] = record
        self.write()

    def write(self) -> None:
        """Beside its place, then renamed: a reader sees the old file or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        beside.write_text(json.dumps(self.document(), indent=1) + "\n")
        beside.replace(self.path)

    def document(self) -> Record:
        known = [self.rows[name] for name in self._order if name in self.rows]
        others = [record for name, record in self.rows.items() if name not in self._order]
        document: Record = {"benchmark": "ultramem", "suite": self.suite, "rows": known + others}
        return document | ({"tests": self.tests} if self.tests else {})
