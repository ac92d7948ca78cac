"""Training progress on stderr: a bar where it is a terminal, a line now and then where it is not."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 15.0


class TrainingProgress:
    """Shows steps, loss, tokens per second and the time that is left."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr)
        self.bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[rate]:,.0f} tok/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task: Any = None
        self.last_line = 0.0

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def message(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def evaluation(self, row: dict[str, Any]) -> None:
        """Show an evaluation on held-out text."""
        self.message(f"step {row['step']}: {row['bits_per_byte']:.3f} bits per byte on held-out text")

    def step(self, row: dict[str, Any], steps: int) -> None:
        fields = {"loss": row["loss"], "rate": row["tokens_per_second"]}
        if self.task is None:
            self.task = self.bar.add_task("train", total=steps, completed=row["step"] - 1, **fields)
        self.bar.update(self.task, completed=row["step"], **fields)
        if not self.console.is_terminal and (time.monotonic() - self.last_line > LINE_EVERY_S or row["step"] == steps):
            self.last_line = time.monotonic()
            self.message(f"step {row['step']}/{steps}  loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tok/s")
