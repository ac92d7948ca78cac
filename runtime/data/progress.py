"""Progress of a preparation on stderr: a bar where it is a terminal, a line now and then where it is not."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 15.0


class PrepareProgress:
    """Shows documents, tokens, MB of text per second and the time that is left of each stage."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task: Any = None
        self.name = ""

    def __enter__(self) -> PrepareProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def stage(self, name: str, total_bytes: float, done_bytes: float = 0.0) -> None:
        self.name, self.total_bytes = name, total_bytes
        self.done_bytes = self.done_before = done_bytes
        self.documents = self.tokens = self.text_bytes = 0
        self.began = self.last_line = time.monotonic()
        self.task = self.bar.add_task(name, total=total_bytes, completed=int(done_bytes), counts="")

    def advance(self, *, source_bytes: float, documents: int = 0, tokens: int = 0, text_bytes: int = 0) -> None:
        self.documents += documents
        self.tokens += tokens
        self.text_bytes += text_bytes
        self.done_bytes += source_bytes
        now = time.monotonic()
        self.bar.update(self.task, completed=self.done_bytes, counts=self._counts(now))
        if not self.console.is_terminal and now - self.last_line > LINE_EVERY_S:
            self.last_line = now
            left = (self.total_bytes - self.done_bytes) / self._rate(now)
            self.console.print(
                f"{self.name} {self.done_bytes / max(1, self.total_bytes):.0%} {self._counts(now)}  {left:,.0f} s left",
                highlight=False,
                soft_wrap=True,
            )

    def _counts(self, now: float) -> str:
        return f"{self.documents:,} documents  {self.tokens:,} tokens  {self._rate(now) / 1e6:,.1f} MB/s"

    def _rate(self, now: float) -> float:
        """Bytes of the sources per second in this run."""
        return max(1.0, self.done_bytes - self.done_before) / max(1e-3, now - self.began)
