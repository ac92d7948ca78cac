"""Which source was measured."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ("ultramem", "export", "runtime", "benchmarks", "setup.py", "pyproject.toml")
RESULTS = ":(exclude)benchmarks/results"  # what a run writes does not change what it runs


class Source(NamedTuple):
    """`commit` is "unknown" where there is no git; `dirty` if files that matter differ from it, or it is unknown."""

    commit: str
    dirty: bool


def source(root: Path = ROOT) -> Source:
    """The commit checked out at `root`."""
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return Source("unknown", True)
    paths = [path for path in MEASURED if (root / path).exists()]
    return Source(commit.strip(), bool(_git(root, "status", "--porcelain", "--", *paths, RESULTS)))


def without_paths(text: str) -> str:
    """`text` without the folders of this machine: results are published."""
    folders = {str(ROOT), tempfile.gettempdir(), sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()}
    for folder in sorted(folders, key=len, reverse=True):
        text = re.sub(re.escape(folder) + r"(?![\w.-])/?", "", text)
    return text


def _git(root: Path, *arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return run.stdout if run.returncode == 0 else None
