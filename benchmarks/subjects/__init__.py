"""What is measured: one file a subject, each with the rows that it has and how to build one.

A subject's `rows(suite)` are data; `build(row, device)` makes a case of one. `rehearsal` shrinks a row to what Triton's
interpreter runs in seconds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.harness.contender import Case
from benchmarks.harness.row import Row, Suite
from benchmarks.subjects import (
    backward,
    engines,
    layer,
    lookup,
    model_step,
    onnx_lookup,
    quantised,
    select,
    train_step,
    update,
)
from benchmarks.subjects.shapes import REHEARSAL
from ultramem.ops import Implementation, use_implementation

_SUBJECTS = {
    "lookup": lookup,
    "backward": backward,
    "quantised": quantised,
    "onnx_lookup": onnx_lookup,
    "select": select,
    "update": update,
    "layer": layer,
    "model_step": model_step,
    "train_step": train_step,
    "engines": engines,
}


def rows(suite: Suite, *, rehearse: bool = False) -> list[Row]:
    """The rows of a suite, the most important first on a GPU. Rehearsed, there is one for each way to be built."""
    found = [row for subject in _SUBJECTS.values() for row in subject.rows(suite)]
    if suite == "gpu":
        found.sort(key=lambda row: row.priority)
    if not rehearse:
        return found
    return list({row.name: row for row in map(_rehearsed, found)}.values())


def _rehearsed(row: Row) -> Row:
    indices = "zipf" if row.indices else ""
    variant = "memory-lazy_adamw" if row.variant.startswith("memory-") else row.variant
    if row.subject == "engines":  # all are built in one way, and a whole model in the interpreter takes minutes
        variant = "dense"
    return replace(row, size=REHEARSAL, tokens=2, dtype="float32", indices=indices, variant=variant, limit_s=150.0)


def build(row: Row, device: torch.device) -> Case:
    """The case of a row."""
    return _SUBJECTS[row.subject].build(row, device)


@contextlib.contextmanager
def setting(*, rehearse: bool) -> Iterator[None]:
    """How ops run inside: as AUTO picks, or (rehearsed) the Triton kernels, which the interpreter runs."""
    with use_implementation(Implementation.TRITON if rehearse else Implementation.AUTO):
        yield
