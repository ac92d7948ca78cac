"""The README is true: its Python runs, its commands parse, its figures are those of the committed result."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from ultramem.cli import _build_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_commands_parse():
    lines = README.replace("\\\n", " ")  # commands of several lines
    commands = re.findall(r"^(?:torchrun .* -m )?(ultramem .*)$", lines, re.MULTILINE)
    assert len(commands) >= 6
    for command in commands:
        _build_parser().parse_args(shlex.split(command, comments=True)[1:])


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_tables_are_the_committed_results():
    update = runpy.run_path(str(ROOT / "docs/update_readme.py"))
    summary = json.loads((ROOT / "docs/demo/summary.json").read_text())
    assert update["updated"](README, summary, json.loads(update["GPU_RESULTS"].read_text())) == README


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
