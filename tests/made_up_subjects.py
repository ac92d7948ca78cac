"""Rows for tests of the benchmark runner: one that is right, and every way in which one goes wrong."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.harness.check import require_as_exact_as_eager
from benchmarks.harness.contender import Case, Contender, Floor, UnavailableError
from benchmarks.harness.row import Goal, Row

TWICE = Goal(text="twice as fast as adding", quantity="speedup", bound=2.0, against="add")


def rows(suite: str, *, rehearse: bool = False) -> list[Row]:
    def row(subject: str, limit_s: float = 400.0) -> Row:
        return Row(
            subject=subject, size="small", tokens=4, dtype="float32", goals=(TWICE,), limit_s=limit_s, quick=True
        )

    found = [row("right"), row("wrong"), row("crash"), row("hang", limit_s=0.5), row("last")]
    return found if rehearse else [*found, row("sleep"), row("slow"), row("killed")]


def name_of(subject: str) -> str:
    return f"{subject}/small/T=4/float32"


def build(row: Row, device: torch.device) -> Case:
    if row.subject == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if row.subject in ("hang", "sleep"):
        time.sleep(600)
    doubled = partial(_double, row.subject, itertools.count())
    contenders = {
        "double": lambda: contender("ours", doubled),
        "add": lambda: contender("peer", lambda x: x + x + (row.subject == "wrong")),
        "absent": absent,
        "broken": absent if row.subject == "right" else broken,
    }
    return Case(contenders=contenders, floor=Floor(read_bytes=400, write_bytes=400), shape={"numbers": 100})


def _double(subject: str, calls: Iterator[int], x: torch.Tensor) -> torch.Tensor:
    timed = next(calls) >= 2  # one call is checked, one is the clock's first
    if timed and subject == "slow":
        time.sleep(0.1)
    if timed and subject == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return x * 2


def contender(role: str, run) -> Contender:
    def check() -> None:
        x = torch.randn(100)
        require_as_exact_as_eager("twice x", run(x), x * 2, x.double() * 2)

    return Contender(role=role, settings="float32", draw=lambda: torch.randn(100), run=run, check=check)


def absent() -> Contender:
    raise UnavailableError("it is not installed")


def broken() -> Contender:
    raise MemoryError("the table does not fit")


@contextlib.contextmanager
def setting(*, rehearse: bool) -> Iterator[None]:
    yield
