"""Where the figures of a run go: metrics.jsonl always, TensorBoard if asked for."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from ultramem.runtime.run import RunFolder


class MetricsLog:
    """Appends rows to a run's metrics; each row is on its way to disk when the call returns."""

    def __init__(self, folder: RunFolder, *, after_step: int, tensorboard: bool) -> None:
        self.file = folder.metrics.open("a")
        self.writer: Any = None
        if tensorboard:
            require_tensorboard()
            from torch.utils.tensorboard import SummaryWriter

            # Points of steps that are done again, after a kill, are not shown twice.
            self.writer = SummaryWriter(str(folder.tensorboard), purge_step=after_step + 1)

    def __call__(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row, allow_nan=False) + "\n")
        self.file.flush()
        if self.writer is not None:
            for name, value in scalars(row):
                self.writer.add_scalar(name, value, row["step"])

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if self.writer is not None:
            self.writer.close()


def scalars(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a row under TensorBoard's names: train/loss, held_out/bits_per_byte, memories.0/score_mean."""
    group = row.get("name") or row.get("split") or "train"
    for name, value in row.items():
        if name not in ("step", "seconds", "kind", "name", "split"):
            yield from _flatten(f"{group}/{name}", value)


def _flatten(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _flatten(f"{name}/{index}", item)
    elif value is not None:
        yield name, float(value)


def require_tensorboard() -> None:
    """Raises ImportError if TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError("tensorboard is not installed: pip install 'ultramem[tensorboard]'")
