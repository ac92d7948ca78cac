"""Which stage a line of the model's source belongs to, read off the stack traces that compilers keep of operators."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from ultramem.graph import (
    memory_layer,
    memory_output,
    moe,
    same_tokens_table,
    sharded_table,
    transformer,
    value_table,
)
from ultramem.graph.coarse_keys import CoarseScore, CoarseSelect
from ultramem.graph.fold_for_inference import FoldedScore
from ultramem.graph.fold_values import ProjectedOutput
from ultramem.ops import exchange
from ultramem.runtime.profile.modules import in_order

_LINEAR_STAGES = ("head",)
"""Stages that are a plain linear layer: the class does not tell them apart, the line that calls them does."""
_FRAME = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+), in \S+$')


@cache
def sources_tag() -> str:
    """Of the paths and contents of the sources that stages are read from: traces of others say nothing of these."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted({file for file, *_ in _stage_sources()}):
        digest.update(file.encode() + b"\0" + Path(file).read_bytes())
    return digest.hexdigest()


def stages_of_traces(traces: Sequence[str]) -> tuple[str, ...]:
    """The stages of an operator's stack traces; "other" for lines of the model outside the stages."""
    return in_order(_stage_of_trace(trace) for trace in traces) or ("other",)


def _stage_of_trace(trace: str) -> str:
    lines = trace.splitlines()
    below = ""
    for number in range(len(lines) - 1, -1, -1):
        frame = _FRAME.match(lines[number])
        if frame is None:
            continue
        for file, first, last, stage in _stage_sources():
            if frame["file"] == file and first <= int(frame["line"]) <= last:
                return stage
        for stage in _LINEAR_STAGES:
            if _calls(f"self.{stage}(", lines[number + 1 : number + 3], below):
                return stage
        below = frame["file"]
    return "other"


def _calls(call: str, code: Sequence[str], below: str) -> bool:
    """Whether a frame is in the call of a linear layer, given its line of code and the file of the frame below it.

    Traces of `torch.compile` underline the call and end there; those of `torch.export` go on into the layer.
    """
    line, underline = (*code, "", "")[:2]
    if underline.strip(" ") and not underline.strip(" ^~"):
        return line[len(underline) - len(underline.lstrip(" ")) :].startswith(call)
    return call in line and below == inspect.getfile(nn.Linear)


@cache
def _stage_sources() -> list[tuple[str, int, int, str]]:
    """(file, first line, last line, stage) of the classes, and of the file, that are stages."""
    classes: tuple[tuple[Any, str], ...] = (
        (memory_layer.Query, "query"),
        (memory_layer.Score, "score"),
        (FoldedScore, "score"),
        (CoarseScore, "score"),
        (memory_layer.Select, "select"),
        (CoarseSelect, "select"),
        (memory_layer.Lookup, "lookup"),
        (exchange, "exchange"),
        (value_table.ValueTable, "lookup"),
        (sharded_table.ShardedValueTable, "lookup"),
        (same_tokens_table.SameTokensTable, "lookup"),
        (memory_output.Project, "expand"),
        (memory_output.GatedOutput, "expand"),
        (memory_output.NoOutput, "expand"),
        (ProjectedOutput, "expand"),
        (transformer.Attention, "attention"),
        (transformer.MLP, "mlp"),
        (moe.MoE, "mlp"),
    )
    sources = []
    for cls, stage in classes:
        lines, first = inspect.getsourcelines(cls)
        sources.append((inspect.getfile(cls), first, first + len(lines) - 1, stage))
    return sources
