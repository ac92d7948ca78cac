"""A decode step on every engine: of the tiny models on a CPU, of those of the paper's 151M rows on a GPU.

On a CPU, rows of one family share an export, which lies under `runs/benchmarks/exports` by a digest of what it is made
from.

Shapes: B batch, S prompt, V vocabulary.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.contender import Case, Contender, Floor, Role, UnavailableError, WrongResultError
from benchmarks.harness.row import Row, Suite
from benchmarks.harness.source import ROOT
from benchmarks.subjects.shapes import REHEARSAL, dtype_of
from ultramem import ModelConfig, build_model, preset
from ultramem.graph import Transformer
from ultramem.graph.pinned_tables import pin_tables

FAMILIES = ("dense", "moe", "pkm", "ultramem")
PRESETS = {
    ("dense", "151m"): "dense-151m",
    ("moe", "151m"): "moe-151m-2in32",
    ("pkm", "151m"): "pkm-151m-x12",
    ("ultramem", "151m"): "ultramem-151m-x12",
}
PROMPT = 64
EXPORTS = ROOT / "runs" / "benchmarks" / "exports"
DRAWS = 3  # of tokens: the first must agree with eager, or all others


def rows(suite: Suite) -> list[Row]:
    if suite == "gpu":
        return [
            Row(
                subject="engines",
                variant=family,
                size="151m",
                tokens=batch,
                dtype="bfloat16",
                limit_s=150,
                wall=True,
                priority=6 if family == "pkm" else 1,
                device_gb=45.0 if family == "moe" else 22.0,  # a mixture's experts in float64, to compare with
            )
            for family in ("ultramem", "dense", "moe", "pkm")
            for batch in (1, 64)
        ]
    return [
        Row(
            subject="engines",
            variant=family,
            size="tiny",
            tokens=batch,
            dtype="float32",
            limit_s=600,
            quick=(family, batch) == ("ultramem", 1),
        )
        for family in FAMILIES
        for batch in (1, 8, 64)
    ]


class Step(NamedTuple):
    """The next token of each sequence, and the cache of its prompt."""

    next_B1: Tensor
    cache: Any


def build(row: Row, device: torch.device) -> Case:
    try:
        return _build(row, device)
    except ImportError as error:  # the engines need more than torch, Triton and pytest
        problem = str(error)

    def unavailable() -> Contender:
        raise UnavailableError(problem)

    return Case(contenders={"eager": unavailable})


def _build(row: Row, device: torch.device) -> Case:
    from ultramem.runtime.decode_replay import PLAIN_RUNS
    from ultramem.runtime.engine import AotEngine, CompiledEngine, EagerEngine, Engine, OnnxEngine
    from ultramem.runtime.profile.measure import Inputs, WrongLogitsError, check_agreement, draw_inputs

    config = preset(PRESETS.get((row.variant, row.size), f"{row.variant}-tiny"))
    torch.manual_seed(0)
    model = build_model(config, device=device, dtype=dtype_of(row)).eval().requires_grad_(False)
    seeds = itertools.count()
    prompt = 2 if row.size == REHEARSAL else PROMPT
    shape = {"batch": row.tokens, "cached_tokens": prompt}
    floor = _floor(config, row.tokens, prompt, model.embedding.weight.element_size())

    def drawn() -> Inputs:
        return draw_inputs(config.vocab_size, batch=row.tokens, prompt_tokens=prompt, seed=next(seeds))

    def contender(role: Role, settings: str, engine: Engine) -> Contender:
        def prepare() -> Step:
            inputs = drawn()
            step = Step(inputs.next_B1, engine.prefill(inputs.prompt_BS)[1])
            if row.wall:
                for _ in range(PLAIN_RUNS + 1):  # what is recorded for this cache is recorded here
                    engine.decode(*step)
            return step

        def check() -> None:
            try:
                check_agreement(model, [engine], [[drawn()] for _ in range(DRAWS)])
            except WrongLogitsError as error:
                raise WrongResultError(str(error)) from error

        return Contender(
            role=role, settings=settings, draw=prepare, run=lambda step: engine.decode(*step)[0], check=check
        )

    def exported(name: str, opened: Callable[[Path], Engine], settings: str) -> Contender:
        return contender("ours", settings, opened(_export(model, row.variant, name)))

    def plugin(folder: Path) -> Engine:
        from ultramem.export.onnx_plugin import find_plugin

        if problem := find_plugin().problem:
            raise UnavailableError(problem)
        return OnnxEngine(folder, plugin=True)

    eager = {"eager": lambda: contender("ours", "the model, constants folded", EagerEngine(model))}
    if row.size == REHEARSAL:  # the interpreter's kernels cannot be traced
        return Case(contenders=eager, shape=shape, floor=floor)
    if row.wall:
        contenders = {
            **eager,
            "eager, side stream": lambda: contender(
                "ours", "memory layers on a stream of their own", EagerEngine(_with_tables(model), beside=True)
            ),
            "compile": lambda: contender("ours", "torch.compile", CompiledEngine(model, replay=False)),
            "compile, CUDA graph": lambda: contender("ours", "steps recorded", CompiledEngine(model, replay=True)),
            "compile, CUDA graph, pinned tables": lambda: contender(
                "ours",
                "rows in the host's memory",
                CompiledEngine(pin_tables(_with_tables(model), device), replay=True),
            ),
        }
        return Case(contenders=contenders, shape=shape, floor=floor)
    contenders = {
        **eager,
        "compile": lambda: contender("ours", "torch.compile, constants folded", CompiledEngine(model)),
        "AOTInductor": lambda: exported("aoti", AotEngine, "model.pt2"),
        "ONNX Runtime": lambda: exported("onnx", lambda each: OnnxEngine(each, plugin=False), "standard operators"),
        "ONNX Runtime, plugin": lambda: exported("onnx", plugin, "the plugin library's kernels"),
    }
    return Case(contenders=contenders, shape=shape, floor=floor)


def _floor(config: ModelConfig, batch: int, prompt: int, element_bytes: int) -> Floor:
    """What the step must move and compute, by arithmetic."""
    from ultramem.runtime.profile.arithmetic import stage_costs

    costs = stage_costs(config, batch=batch, new_tokens=1, cached_tokens=prompt, element_bytes=element_bytes)
    return Floor(
        read_bytes=sum(each.total_bytes for each in costs), write_bytes=0, flops=sum(each.flops for each in costs)
    )


def _with_tables(model: Transformer) -> Transformer:
    if model.config.memory is None:
        raise UnavailableError("the model has no memory layers")
    return model


def _export(model: Any, family: str, engine: str) -> Path:
    """The export of a family, made if this source has not made it yet."""
    from ultramem.export import export_model

    digest = hashlib.blake2b(digest_size=8)
    for package in ("ultramem", "export"):
        for file in sorted((ROOT / package).rglob("*.py")):
            digest.update(file.read_bytes())
    folder = EXPORTS / f"{family}-{engine}-{digest.hexdigest()}"
    if not folder.exists():
        export_model(model, engine, folder)
    return folder
