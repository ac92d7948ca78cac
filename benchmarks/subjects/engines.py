"""A decode step of the tiny models on every engine of a CPU.

Rows of one family share an export, which lies under `runs/benchmarks/exports` by a digest of what it is made from.

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

from benchmarks.harness.contender import Case, Contender, Role, UnavailableError, WrongResultError
from benchmarks.harness.row import Row, Suite
from benchmarks.harness.source import ROOT
from ultramem import build_model, preset

FAMILIES = ("dense", "moe", "pkm", "ultramem")
PROMPT = 64
EXPORTS = ROOT / "runs" / "benchmarks" / "exports"
DRAWS = 3  # of tokens: the first must agree with eager, or all others


def rows(suite: Suite) -> list[Row]:
    if suite == "gpu":  # where that suite runs there is neither ONNX Runtime for CUDA nor a package of AOTInductor
        return []
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
    from ultramem.runtime.engine import AotEngine, CompiledEngine, EagerEngine, Engine, OnnxEngine
    from ultramem.runtime.profile.measure import Inputs, WrongLogitsError, check_agreement, draw_inputs

    config = preset(f"{row.variant}-tiny")
    torch.manual_seed(0)
    model = build_model(config).eval().requires_grad_(False)
    seeds = itertools.count()

    def drawn() -> Inputs:
        return draw_inputs(config.vocab_size, batch=row.tokens, prompt_tokens=PROMPT, seed=next(seeds))

    def contender(role: Role, settings: str, engine: Engine) -> Contender:
        def prepare() -> Step:
            inputs = drawn()
            return Step(inputs.next_B1, engine.prefill(inputs.prompt_BS)[1])

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

    contenders = {
        "eager": lambda: contender("ours", "the model, constants folded", EagerEngine(model)),
        "compile": lambda: contender("ours", "torch.compile, constants folded", CompiledEngine(model)),
        "AOTInductor": lambda: exported("aoti", AotEngine, "model.pt2"),
        "ONNX Runtime": lambda: exported("onnx", lambda each: OnnxEngine(each, plugin=False), "standard operators"),
        "ONNX Runtime, plugin": lambda: exported("onnx", plugin, "the plugin library's kernels"),
    }
    return Case(contenders=contenders, shape={"batch": row.tokens, "cached_tokens": PROMPT})


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
