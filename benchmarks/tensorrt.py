"""Engines of TensorRT, with our plugins and by bodies alone: built, held against eager, timed beside other engines.

    python -m benchmarks.tensorrt            (or: make tensorrt) on a machine with TensorRT and a GPU
    python -m benchmarks.tensorrt --dry-run  the same steps anywhere, with a stand-in for TensorRT and tiny models

An export is only timed once it computes what eager does: `export_model` refuses it otherwise. Prints a table, writes
benchmarks/results/tensorrt-<device>.json (a rehearsal: only what --out says), and one JSON line last. Ends 1 if an
engine was refused. The peers run where they run here: ONNX Runtime on the GPU if it has its provider, AOTInductor's
package on the CPU; the table says which.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ultramem
from ultramem.config import ModelConfig
from ultramem.export import ExportOptions, export_model, load_artifact
from ultramem.export.manifest import source_commit, versions
from ultramem.export.program import empty_state, flat_inputs
from ultramem.export.tensorrt_run import TensorrtModel
from ultramem.graph.transformer import Transformer
from ultramem.presets import preset

RESULTS = Path(__file__).parent / "results"
PROMPT = 128
ROUNDS, WARM_UP = 30, 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model, and the types that it is exported in."""

    name: str
    config: ModelConfig
    dtypes: tuple[str, ...]
    tables: tuple[str | None, ...] = (None,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One engine of one subject."""

    subject: str
    dtype: str
    table: str | None
    engine: str
    device: str
    build_s: float
    max_error: float | None = None
    allowed: float | None = None
    greedy_equal: str = ""
    prefill_ms: float | None = None
    decode_ms: float | None = None
    refused: str = ""


def subjects(*, dry_run: bool) -> tuple[Subject, ...]:
    """One memory layer of two sizes (its block is small), and a whole small model."""
    tiny = preset("ultramem-tiny")
    assert tiny.memory is not None
    layer = replace(tiny, num_layers=1, insertions="1:1", memory=replace(tiny.memory, num_layers=1), max_positions=512)
    if dry_run:
        small = replace(tiny.memory, num_layers=1, knum=16, value_dim=32, key_dim=16, top_m=4)
        small_layer = replace(layer, memory=small, hidden_size=192, inner_size=64, vocab_size=64, max_positions=256)
        return (Subject(name="layer, tiny", config=small_layer, dtypes=("fp32",), tables=(None, "int8")),)
    paper = preset("ultramem-151m-x12")
    assert paper.memory is not None
    big = replace(paper, num_layers=1, insertions="1:1", memory=replace(paper.memory, num_layers=1), max_positions=512)
    every = ("fp32", "fp16", "bf16")
    return (
        Subject(name="layer, tiny", config=layer, dtypes=every, tables=(None, "int8")),
        Subject(name="layer, 151M row of the paper", config=big, dtypes=("fp16", "bf16"), tables=(None, "int8")),
        Subject(name="model, ultramem-tiny", config=replace(tiny, max_positions=512), dtypes=every),
    )


class Timed:
    """A loaded engine with the inputs of a prefill and of one step after it."""

    def __init__(self, run: Callable[[Sequence[Tensor]], Sequence[Tensor]], config: ModelConfig, dtype: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (1, PROMPT + 1), generator=generator)
        mask = torch.ones_like(ids)
        self._run = run
        self._prefill = flat_inputs(ids[:, :PROMPT].contiguous(), mask[:, :PROMPT], empty_state(config, 1, dtype))
        _, *state = run(self._prefill)
        self._decode = flat_inputs(ids[:, PROMPT:].contiguous(), mask, tuple(state))

    def prefill(self) -> None:
        self._run(self._prefill)

    def decode(self) -> None:
        self._run(self._decode)


def interleaved(contenders: Sequence[Callable[[], None]], rounds: int) -> list[float]:
    """Median milliseconds of each, taken in turns, so that a drift of the machine meets all of them."""
    times: list[list[float]] = [[] for _ in contenders]
    for turn in range(WARM_UP + rounds):
        for index, contender in enumerate(contenders):
            start = time.perf_counter()
            contender()
            if turn >= WARM_UP:
                times[index].append(1e3 * (time.perf_counter() - start))
    return [statistics.median(each) for each in times]


def measure(
    subject: Subject, dtype: str, table: str | None, folder: Path, *, peers: Sequence[str], rounds: int, device: str
) -> list[Row]:
    """Rows of one subject in one type: each engine exported and checked, then all timed in turns."""
    torch.manual_seed(0)
    model = ultramem.build_model(subject.config).eval()
    options = ExportOptions(dtype=dtype, table=table)  # type: ignore[arg-type]  # names of the table above
    wanted = [("tensorrt, plugin", "tensorrt", replace(options, kernels="plugin", sizes="batch=1:1:3"))]
    wanted += [("tensorrt, body", "tensorrt", replace(options, kernels="body", sizes="batch=1:1:3"))]
    wanted += [(each, each, options) for each in peers]
    rows, timed = [], {}
    for index, (label, engine, each) in enumerate(wanted):
        row, run = _exported(subject, model, label, engine, each, folder / str(index), device)
        if run is not None:
            timed[len(rows)] = Timed(run, subject.config, each.torch_dtype)
        rows.append(row)
    prefill = interleaved([each.prefill for each in timed.values()], rounds)
    decode = interleaved([each.decode for each in timed.values()], rounds)
    for index, first, second in zip(timed, prefill, decode, strict=True):
        rows[index] = replace(rows[index], prefill_ms=first, decode_ms=second)
    return rows


def _exported(
    subject: Subject,
    model: Transformer,
    label: str,
    engine: str,
    options: ExportOptions,
    folder: Path,
    device: str,
) -> tuple[Row, Callable[[Sequence[Tensor]], Sequence[Tensor]] | None]:
    start = time.perf_counter()
    row = Row(
        subject=subject.name, dtype=options.dtype, table=options.table, engine=label, device="", build_s=0.0
    )  # fmt: skip
    try:
        manifest = export_model(model, engine, folder, options=options)
    except (ValueError, RuntimeError) as error:
        return replace(row, build_s=time.perf_counter() - start, refused=" ".join(str(error).split())), None
    artifact = load_artifact(folder)
    run = artifact.run.step if isinstance(artifact.run, TensorrtModel) else artifact.run
    parity = manifest.parity
    row = replace(
        row,
        build_s=time.perf_counter() - start,
        device=device if engine == "tensorrt" else "cpu",
        max_error=parity.max_error,
        allowed=parity.allowed,
        greedy_equal=f"{parity.greedy_equal}/{parity.greedy_tokens}",
    )
    if engine == "onnx" and torch.cuda.is_available():
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CUDAExecutionProvider"])
            names = [each.name for each in session.get_inputs()]
            row = replace(row, device=device)

            def on_gpu(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
                feeds = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
                return [torch.from_numpy(each) for each in session.run(None, feeds)]

            return row, on_gpu
    return row, run


def table(rows: Sequence[Row]) -> str:
    def text(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    lines = [
        f"{'subject':28} {'type':10} {'engine':17} {'device':22} {'build s':>7} {'error':>8} {'allowed':>8} "
        f"{'greedy':>7} {'prefill ms':>10} {'decode ms':>9}"
    ]
    for row in rows:
        types = "/".join(filter(None, (row.dtype, row.table)))
        lines.append(
            f"{row.subject:28} {types:10} {row.engine:17} {row.device:22} {row.build_s:7.1f} "
            f"{text(row.max_error, '8.1e'):>8} {text(row.allowed, '8.1e'):>8} {row.greedy_equal:>7} "
            f"{text(row.prefill_ms, '.3f'):>10} {text(row.decode_ms, '.3f'):>9}"
            + (f"  {row.refused}" if row.refused else "")
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="with a stand-in for TensorRT, on tiny models")
    parser.add_argument("--peers", default="onnx,aoti", help="other engines to time (default: onnx,aoti)")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, help="file for the JSON (default: benchmarks/results, unless rehearsed)")
    options = parser.parse_args(arguments)
    peers = tuple(filter(None, options.peers.split(",")))
    with contextlib.ExitStack() as stack:
        device = "stand-in on a CPU"
        if options.dry_run:
            from benchmarks.tensorrt_stand_in.rehearsal import rehearsal

            stack.enter_context(rehearsal())
        else:
            from ultramem.export.tensorrt_library import require_gpu, require_tensorrt

            try:
                require_tensorrt()
                require_gpu()
            except (ImportError, ValueError) as error:
                print(f"benchmarks.tensorrt: {error}", file=sys.stderr)
                return 2
            device = torch.cuda.get_device_name()
        rows: list[Row] = []
        for subject in subjects(dry_run=options.dry_run):
            for dtype in subject.dtypes:
                for each in subject.tables:
                    able = [peer for peer in peers if not (peer == "onnx" and dtype == "bf16")]
                    with tempfile.TemporaryDirectory() as folder:
                        rows += measure(
                            subject, dtype, each, Path(folder), peers=able, rounds=options.rounds, device=device
                        )
    print(table(rows))
    document = {
        "rehearsed": options.dry_run,
        "device": device,
        "commit": source_commit(),
        "versions": versions(),
        "prompt": PROMPT,
        "rows": [asdict(row) for row in rows],
    }
    name = "-".join(device.lower().split())
    target = options.out or (None if options.dry_run else RESULTS / f"tensorrt-{name}.json")
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(document, indent=1) + "\n")
    print(
        json.dumps({"rehearsed": options.dry_run, "rows": len(rows), "refused": sum(bool(row.refused) for row in rows)})
    )
    return int(any(row.refused for row in rows))


if __name__ == "__main__":
    sys.exit(main())
