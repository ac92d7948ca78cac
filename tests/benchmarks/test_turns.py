"""Turns on a device: many prepare, one is alone, and whoever dies is out of the way."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from benchmarks.harness.source import ROOT
from benchmarks.harness.turns import Turns, waited_seconds

SOON_S = 0.2  # a thread that could go on would have done so
LIMIT_S = 60.0


class Taker(threading.Thread):
    """Takes a turn, notes that in `log` and keeps it until told."""

    def __init__(self, folder: Path, kind: str, log: list[str], name: str) -> None:
        super().__init__(daemon=True)
        self.turns = Turns(folder)
        self.kind, self.log, self.label = kind, log, name
        self.has_it, self.may_end = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        with getattr(self.turns, self.kind)():
            self.log.append(self.label)
            self.has_it.set()
            self.may_end.wait(LIMIT_S)

    def end(self) -> None:
        self.may_end.set()
        self.join(LIMIT_S)
        assert not self.is_alive()


def test_many_share_and_one_is_alone_before_those_that_came_later(tmp_path):
    log: list[str] = []
    first, second = (Taker(tmp_path, "shared", log, name) for name in ("first", "second"))
    assert first.has_it.wait(LIMIT_S)
    assert second.has_it.wait(LIMIT_S)
    alone = Taker(tmp_path, "alone", log, "alone")
    assert not alone.has_it.wait(SOON_S)
    late = Taker(tmp_path, "shared", log, "late")
    assert not late.has_it.wait(SOON_S)  # though the device is shared just now
    first.end()
    assert not alone.has_it.wait(SOON_S)
    second.end()
    assert alone.has_it.wait(LIMIT_S)
    assert not late.has_it.wait(SOON_S)
    alone.end()
    assert late.has_it.wait(LIMIT_S)
    late.end()
    assert log[2:] == ["alone", "late"]
    assert alone.turns.waited_s >= 2 * SOON_S
    assert first.turns.waited_s < SOON_S


@pytest.mark.parametrize("kind", ["alone", "shared"])
def test_a_killed_process_loses_its_turn(tmp_path, kind):
    holds = f"""
import sys, time
from pathlib import Path
from benchmarks.harness.turns import Turns
with Turns(Path(sys.argv[1])).{kind}():
    print("has it", flush=True)
    time.sleep(600)
"""
    command = [sys.executable, "-c", holds, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "has it\n"
        next_one = Taker(tmp_path, "alone", [], "")
        assert not next_one.has_it.wait(SOON_S)
        process.send_signal(signal.SIGKILL)
        assert next_one.has_it.wait(LIMIT_S)
        next_one.end()


def test_the_device_is_done_before_a_turn_ends(tmp_path):
    def synchronize():
        assert not other.has_it.is_set()
        raise RuntimeError("an illegal memory access")

    turns = Turns(tmp_path, synchronize=synchronize)
    with pytest.raises(RuntimeError, match="illegal"), turns.alone():
        other = Taker(tmp_path, "shared", [], "")
    assert other.has_it.wait(LIMIT_S)  # whatever the device said
    other.end()


@pytest.mark.parametrize("fails", [False, True])
def test_others_may_be_alone_while_one_compiles(tmp_path, fails):
    turns = Turns(tmp_path)
    turns.let_others_while_compiling()
    seen = []

    def backend(graph, inputs):
        other = Taker(tmp_path, "alone", [], "")
        seen.append(other.has_it.wait(LIMIT_S))
        other.end()
        if fails:
            raise ValueError("does not compile")
        return graph

    try:
        with turns.shared():
            function = torch.compile(lambda x: x + 1, backend=backend, fullgraph=True)
            if fails:
                with pytest.raises(Exception, match="does not compile"):
                    function(torch.ones(3))
            else:
                assert torch.equal(function(torch.ones(3)), torch.full((3,), 2.0))
            other = Taker(tmp_path, "alone", [], "")
            assert not other.has_it.wait(SOON_S)  # it is shared again
        assert seen == [True]
        assert other.has_it.wait(LIMIT_S)
        other.end()
    finally:
        torch._dynamo.callback_handler.clear()
        torch._dynamo.reset()


def test_waiting_is_counted_from_outside(tmp_path):
    waits = tmp_path / "waits"
    assert waited_seconds(waits, 0.0) == 0  # nothing yet
    holder = Taker(tmp_path, "alone", [], "")
    assert holder.has_it.wait(LIMIT_S)
    turns = Turns(tmp_path, waits=waits)

    def wait() -> None:
        with turns.shared():
            pass

    waiter = threading.Thread(target=wait, daemon=True)
    began = time.monotonic()
    waiter.start()
    time.sleep(SOON_S)
    assert waited_seconds(waits, time.monotonic()) == pytest.approx(SOON_S, abs=0.1)  # it goes on
    holder.end()
    waiter.join(LIMIT_S)
    assert waited_seconds(waits, began + 1000) == pytest.approx(turns.waited_s, abs=1e-3)
