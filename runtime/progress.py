"""Training progress on stderr: a bar where it is a terminal, a line now and then where it is not."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_EVERY_S = 15.0
RECENT_STEPS = 100
"""Whose mean pace tells the time that is left; the first step, which compiles, is soon forgotten."""


class TrainingProgress:
    """Shows steps, loss, held-out loss, tokens per second, model FLOPs utilisation and the time that is left."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr)
        self.bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task: Any = None
        self.held_out = ""
        self.last_line_s = 0.0
        self.recent: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS)

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def message(self, text: str) -> None:
        """Show a line above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def evaluation(self, row: dict[str, Any]) -> None:
        """Show an evaluation on held-out text."""
        self.held_out = f"  held-out {row['eval_loss']:.4f}"
        self.message(
            f"step {row['step']}: {row['eval_loss']:.4f} nats per token, {row['bits_per_byte']:.3f} bits per byte "
            "on held-out text"
        )

    def step(self, row: dict[str, Any], steps: int) -> None:
        """Show a training step."""
        now = time.monotonic()
        self.recent.append((row["step"], now))
        figures = (
            f"loss {row['loss']:.4f}{self.held_out}  {row['tokens_per_second']:,.0f} tok/s  MFU {row['mfu']:.1%}"
            f"{self._time_left(steps)}"
        )
        if self.task is None:
            self.task = self.bar.add_task(figures, total=steps, completed=row["step"] - 1)
        self.bar.update(self.task, completed=row["step"], description=figures)
        if not self.console.is_terminal and (now - self.last_line_s > LINE_EVERY_S or row["step"] == steps):
            self.last_line_s = now
            self.message(f"step {row['step']}/{steps}  {figures}")

    def _time_left(self, steps: int) -> str:
        (first, began_s), (last, now_s) = self.recent[0], self.recent[-1]
        if last in (first, steps):
            return ""
        return f"  ETA {duration((steps - last) * (now_s - began_s) / (last - first))}"


def duration(seconds: float) -> str:
    """Like 42 s, 3:07 or 2:05:09."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
