"""An export folder: written whole or not at all, checked against eager before it exists, verified when it is loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ultramem.export import aot_inductor, huggingface, manifest, onnx
from ultramem.export.huggingface import RunFacts
from ultramem.export.manifest import Manifest
from ultramem.export.parity import Run, measure_parity
from ultramem.export.program import PassRecord, Program, capture
from ultramem.graph.transformer import Transformer

ENGINES = ("onnx", "aoti", "huggingface")

_HOW_TO_LOAD = {
    "onnx": (
        "import onnxruntime",
        'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])',
        "feeds = {...}  # the inputs that manifest.json lists, by name, as numpy arrays; cached keys may have length 0",
        "logits, *present = session.run(None, feeds)",
    ),
    "aoti": (
        "import torch",
        'model = torch._inductor.aoti_load_package("model.pt2")',
        "inputs = [...]  # what manifest.json lists as inputs, in order, contiguous; cached keys may have length 0",
        "logits, *present = model(*inputs)",
    ),
    "huggingface": huggingface.HOW_TO_LOAD,
}


@dataclass(frozen=True, slots=True)
class Artifact:
    """A loaded export: its manifest, and the model as a function of its inputs in order."""

    folder: Path
    manifest: Manifest
    run: Run

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.run(inputs)


def export_model(
    model: Transformer,
    to: str,
    out_dir: str | os.PathLike[str],
    *,
    run: RunFacts | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Manifest:
    """Export `model` to a folder for another engine, run it there, and compare it with eager.

    Args:
        model: a `Transformer` in eval mode, float32, on the CPU.
        to: "onnx" (model.onnx), "aoti" (model.pt2, native code for this kind of machine) or "huggingface" (a folder
            for transformers).
        out_dir: the folder to make, beside which a temporary one stands until all is done.
        run: what a model card and tokenizer files are made from, where the export has them (see
            `ultramem.runtime.run_facts`).
        overwrite: replace an earlier export there.
        progress: called with a line before each step.

    Returns:
        The manifest, which stands in the folder as manifest.json.

    Raises:
        ValueError: `to` is unknown, the model cannot be exported, or the exported model does not compute what eager
            does. Nothing is left behind.
        FileExistsError: out_dir exists, and is not an earlier export or `overwrite` is False.
        ImportError: the libraries of that engine are missing.
    """
    check_engine(to)
    target = Path(out_dir)
    _check_target(target, overwrite)
    tell = progress or (lambda line: None)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        passes = _export_huggingface(model, run, temporary, tell) if to == "huggingface" else _lower(
            model, to, temporary, tell
        )  # fmt: skip
        tell("comparing with eager")
        written = _manifest(model, to, temporary, passes)
        manifest.write_manifest(temporary, written)
        _move(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return written


def load_artifact(folder: str | os.PathLike[str], *, engine: str | None = None) -> Artifact:
    """Load an export after comparing every file with the manifest.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: a file is missing, truncated or altered, or the export is for another engine than `engine`.
        ImportError: the libraries of that engine are missing.
    """
    path = Path(folder)
    found = manifest.read_manifest(path)
    check_engine(found.engine)
    if engine is not None and found.engine != engine:
        raise ValueError(f"{path} is an export for {found.engine}, not for {engine}")
    for name, expected in found.files.items():
        if not (path / name).is_file():
            raise ValueError(f"{path / name} is missing: the export is not whole (export it again)")
        size = (path / name).stat().st_size
        if size != expected.bytes:
            raise ValueError(f"{path / name} has {size} bytes, the manifest says {expected.bytes} (export it again)")
        if manifest.file_record(path / name) != expected:
            raise ValueError(f"{path / name} was altered after the export: its sha256 differs (export it again)")
    return Artifact(path, found, _load(found.engine, path))


def check_engine(name: str) -> None:
    if name not in ENGINES:
        raise ValueError(
            f"an export must be to one of {', '.join(ENGINES)}, got {name!r} "
            "(tensorrt is not available in this version)"
        )


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not (target / manifest.FILE).is_file():
        raise FileExistsError(f"{target} exists and is not an export: choose another folder")
    if not overwrite:
        raise FileExistsError(f"{target} already holds an export: choose another folder, or overwrite it")


def _export_huggingface(
    model: Transformer, run: RunFacts | None, folder: Path, tell: Callable[[str], None]
) -> tuple[PassRecord, ...]:
    tell("writing huggingface")
    huggingface.export_huggingface(model, run, folder)
    return ()


def _lower(model: Transformer, to: str, folder: Path, tell: Callable[[str], None]) -> tuple[PassRecord, ...]:
    tell("capturing the graph")
    program = capture(model)
    tell(f"writing {to}")
    program = _write(program, model, to, folder)
    inputs, outputs = manifest.tensor_specs(model.config)
    assert tuple(each.name for each in inputs) == program.input_names
    assert tuple(each.name for each in outputs) == program.output_names
    return program.passes


def _write(program: Program, model: Transformer, to: str, folder: Path) -> Program:
    if to == "aoti":
        return aot_inductor.export_aoti(program, folder)
    memory = model.config.memory
    return onnx.export_onnx(program, folder, candidates=memory.candidates if memory else "one_tailed")


def _load(engine: str, folder: Path) -> Run:
    if engine == "huggingface":
        return huggingface.load_huggingface(folder)
    return aot_inductor.load_aoti(folder) if engine == "aoti" else onnx.load_onnx(folder)


def _manifest(model: Transformer, to: str, folder: Path, passes: tuple[PassRecord, ...]) -> Manifest:
    inputs, outputs = manifest.tensor_specs(model.config)
    return Manifest(
        engine=to,
        model=model.config,
        weights_sha256=manifest.weights_sha256(model),
        inputs=inputs,
        outputs=outputs,
        files={path.name: manifest.file_record(path) for path in sorted(folder.iterdir())},
        passes=passes,
        parity=measure_parity(model, _load(to, folder)),
        how_to_load=_HOW_TO_LOAD[to],
        versions=manifest.versions(),
        source_commit=manifest.source_commit(),
    )


def _move(temporary: Path, target: Path) -> None:
    """Put the finished folder in its place; an earlier export goes only once the new one is complete."""
    if target.exists():
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old)
    else:
        temporary.rename(target)
