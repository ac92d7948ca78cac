"""An export folder: written whole or not at all, checked against eager before it exists, verified when it is loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ultramem.export import aot_inductor, huggingface, manifest, onnx, tensorrt
from ultramem.export.backend import Run
from ultramem.export.manifest import Manifest
from ultramem.export.options import ExportOptions
from ultramem.export.parity import BitsPerByte, measure_parity
from ultramem.export.program import PassRecord
from ultramem.export.rounding import rounded
from ultramem.export.run_facts import RunFacts
from ultramem.export.shard_record import require_rank
from ultramem.export.signature import check_inputs, tensor_specs
from ultramem.graph.transformer import Transformer

BACKENDS = {each.name: each for each in (onnx.BACKEND, aot_inductor.BACKEND, tensorrt.BACKEND, huggingface.BACKEND)}
ENGINES = tuple(BACKENDS)


@dataclass(frozen=True, slots=True)
class Artifact:
    """A loaded export: its manifest, and the model as a function of its inputs in order.

    A call checks the inputs first; `run` does not, for callers who made them by the manifest.
    """

    folder: Path
    manifest: Manifest
    run: Run

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs that the manifest lists.

        Raises:
            ValueError: an input has another shape or type than the manifest says, or a token is not in the vocabulary.
        """
        check_inputs(self.manifest.inputs, inputs, self.manifest.model.vocab_size)
        return self.run(inputs)


def export_model(
    model: Transformer,
    to: str,
    out_dir: str | os.PathLike[str],
    *,
    options: ExportOptions | None = None,
    bits_per_byte: BitsPerByte | None = None,
    run: RunFacts | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Manifest:
    """Export `model` to a folder for another engine, run it there, and compare it with eager.

    Args:
        model: a `Transformer` in eval mode, float32, on the CPU.
        to: "onnx" (model.onnx), "aoti" (model.pt2, native code for this kind of machine), "tensorrt" (model.plan, for
            this very GPU) or "huggingface" (a folder for transformers).
        out_dir: the folder to make, beside which a temporary one stands until all is done.
        options: types and sizes; None: float32, any sizes.
        bits_per_byte: of a model on held-out text, to record what rounding costs.
        run: what a model card and tokenizer files are made from, where the engine has them (see
            `ultramem.runtime.run_facts`).
        overwrite: replace an earlier export there.
        progress: called with a line before each step.

    Returns:
        The manifest, which stands in the folder as manifest.json.

    Raises:
        ValueError: `to` is unknown, the engine lacks what the options ask for, the model cannot be exported, or the
            exported model does not compute what eager does. Nothing is left behind.
        FileExistsError: out_dir exists, and is not an earlier export or `overwrite` is False.
        ImportError: the libraries of that engine are missing.
    """
    check_engine(to)
    options = options or ExportOptions()
    backend = BACKENDS[to]
    backend.check(options)
    target = Path(out_dir)
    _check_target(target, overwrite)
    tell = progress or (lambda line: None)
    tell("rounding the weights")
    weights = rounded(model, options)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        tell(f"writing {to}")
        passes = backend.write(weights, options, temporary)
        if backend.describe is not None:
            backend.describe(temporary, model.config, options, run)
        tell("comparing with eager")
        written = _manifest(model, weights, to, options, temporary, passes, bits_per_byte)
        manifest.write_manifest(temporary, written)
        _move(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return written


def load_artifact(
    folder: str | os.PathLike[str], *, engine: str | None = None, plugin: bool | None = False
) -> Artifact:
    """Load an export after comparing every file with the manifest; `plugin` as in `load_onnx`.

    Hashes find damage, not malice: who can change a file can change the manifest too. Nothing is unpickled, whatever
    the files hold; an AOTInductor package is native code, to be trusted like any program.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: a file is missing, truncated, altered or not of this engine, the export is for another engine
            than `engine`, or is that of another rank.
        ImportError: the libraries of that engine are missing.
    """
    path = Path(folder)
    found = manifest.read_manifest(path)
    check_engine(found.engine)
    if engine is not None and found.engine != engine:
        raise ValueError(f"{path} is an export for {found.engine}, not for {engine}")
    require_rank(path, found.shard)
    backend = BACKENDS[found.engine]
    if backend.files[0] not in found.files or not set(backend.files).issuperset(found.files):
        raise ValueError(
            f"{path / manifest.FILE} is damaged: files must be of {', '.join(backend.files)}, the first always, "
            f"got {', '.join(found.files)}"
        )
    for name in backend.files:
        if name in found.files:
            _check_file(path / name, found.files[name])
        elif (path / name).exists():
            raise ValueError(f"{path / name} is not in the manifest: the export is not whole (export it again)")
    return Artifact(path, found, backend.load(path, found.model, found.options, plugin))


def _check_file(path: Path, expected: manifest.FileRecord) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the export is not whole (export it again)")
    size = path.stat().st_size
    if size != expected.bytes:
        raise ValueError(f"{path} has {size} bytes, the manifest says {expected.bytes} (export it again)")
    if manifest.file_record(path) != expected:
        raise ValueError(f"{path} was altered after the export: its sha256 differs (export it again)")


def check_engine(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"an export must be to one of {', '.join(ENGINES)}, got {name!r}")


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not (target / manifest.FILE).is_file():
        raise FileExistsError(f"{target} exists and is not an export: choose another folder")
    if not overwrite:
        raise FileExistsError(f"{target} already holds an export: choose another folder, or overwrite it")


def _manifest(
    model: Transformer,
    weights: Transformer,
    to: str,
    options: ExportOptions,
    folder: Path,
    passes: tuple[PassRecord, ...],
    bits_per_byte: BitsPerByte | None,
) -> Manifest:
    backend = BACKENDS[to]
    seq = backend.seq(options)
    inputs, outputs = tensor_specs(model.config, options, seq=seq)
    files = {path.name: manifest.file_record(path) for path in sorted(folder.iterdir())}
    assert set(backend.files).issuperset(files), files
    run = backend.load(folder, model.config, options, False)
    return Manifest(
        engine=to,
        options=options,
        model=model.config,
        weights_sha256=manifest.weights_sha256(model),
        inputs=inputs,
        outputs=outputs,
        files=files,
        passes=passes,
        parity=measure_parity(model, weights, options, run, seq=seq, bits_per_byte=bits_per_byte),
        how_to_load=backend.how_to_load(options, frozenset(files)),
        versions=manifest.versions(options.device),
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
