"""`offline_gate --quick` compiles what changed: a row is taken as known only if its kernel is the very same."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from benchmarks.harness.source import ROOT

SCRIPT = """
import dataclasses
from benchmarks import offline_gate, static_table

todo = dict(enumerate(offline_gate.cases()))
rows = [
    {**{field.name: 0 for field in dataclasses.fields(offline_gate.Figures)}, **offline_gate.case_key(case)}
    | {"made_of": offline_gate.digest(case)}
    for case in todo.values()
]
changed = dict(rows[0], made_of="another kernel")
static_table.read = lambda: {"kernels": {"rows": [changed, *rows[1:-1]]}}
known = offline_gate.known_figures(todo)
sampled = [i for i, case in todo.items() if (case.size, case.dtype, case.capability) == offline_gate.SAMPLED]
assert len(sampled) > 20
assert todo.keys() - known.keys() == {0, len(todo) - 1, *sampled}

first, other = list(todo.values())[:2]
constants = dict(first.variant.launch, num_warps=2 * first.variant.launch["num_warps"])
wider = dataclasses.replace(first, variant=dataclasses.replace(first.variant, launch=constants))
newer = dataclasses.replace(first, capability=90)
assert len({offline_gate.digest(case) for case in (first, other, wider, newer)}) == 4
"""


def test_known_rows_are_those_of_the_same_kernels():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
