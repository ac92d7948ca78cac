"""What a user sees while a model trains."""

import io

import pytest
from rich.console import Console

from ultramem.runtime import progress as module
from ultramem.runtime.progress import TrainingProgress, duration


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        seconds = 1000.0

        def monotonic(self):
            return self.seconds

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def row(step):
    return {"step": step, "loss": 5.4321 - step / 100, "tokens_per_second": 12345.6, "mfu": 0.4567}


def run_steps(progress, clock, steps, *, total):
    with progress:
        for step in steps:
            clock.seconds += 60 if step == 1 else 2  # the first step compiles
            progress.step(row(step), total)
            if step == 10:
                progress.evaluation({"step": step, "eval_loss": 4.2, "bits_per_byte": 6.059})


def test_lines_where_stderr_is_no_terminal(clock):
    out = io.StringIO()
    run_steps(TrainingProgress(Console(file=out, width=200)), clock, range(1, 21), total=20)
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 1/20  loss 5.4221  12,346 tok/s  MFU 45.7%"
    assert lines[1] == "step 9/20  loss 5.3421  12,346 tok/s  MFU 45.7%  ETA 22 s"
    assert lines[2] == "step 10: 4.2000 nats per token, 6.059 bits per byte on held-out text"
    assert lines[3] == "step 17/20  loss 5.2621  held-out 4.2000  12,346 tok/s  MFU 45.7%  ETA 6 s"
    assert lines[4].startswith("step 20/20  loss 5.2321")
    assert len(lines) == 5


def test_a_bar_where_it_is_one(clock):
    out = io.StringIO()
    console = Console(file=out, width=160, force_terminal=True)
    run_steps(TrainingProgress(console), clock, range(15, 18), total=20)  # resumed
    shown = out.getvalue()
    assert "17/20" in shown
    assert "loss 5.2621  12,346 tok/s  MFU 45.7%  ETA 6 s" in shown
    assert "step 17/20" not in shown


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.7, "1:00"), (187, "3:07"), (7509, "2:05:09")])
def test_durations(seconds, text):
    assert duration(seconds) == text
