"""A whole profile: machine, agreement, latency, stages and arithmetic of a model on several engines."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ultramem.config import to_dict
from ultramem.counts import count
from ultramem.graph import Transformer
from ultramem.machine import Machine, measure_machine
from ultramem.runtime.profile.arithmetic import stage_costs
from ultramem.runtime.profile.inductor_stages import Kernel, kernel_stages, packaged_kernels, recorded_compilation
from ultramem.runtime.profile.measure import (
    Cell,
    Engine,
    Inputs,
    check_agreement,
    draw_inputs,
    make_cells,
    measure_cells,
    percentile,
)
from ultramem.runtime.profile.onnx_stages import onnx_stages
from ultramem.runtime.profile.schema import (
    DECODE,
    PREFILL,
    EngineRecord,
    Latency,
    Profile,
    ProfiledModel,
    Settings,
    StageArithmetic,
    StageTimes,
)
from ultramem.runtime.profile.stages import eager_stages, not_separable

ROUNDS = 5
STAGE_REPEATS = 20
STAGE_SECONDS = 1.0
"""Time for the instrumented forwards of one engine, batch and phase; five of them run in any case."""
CHECK_DRAWS = 3
EXPORTED = ("onnx", "aoti", "tensorrt")
"""Engines that are loaded from a folder of their own."""


class _Opened(NamedTuple):
    """An engine that is ready, the kernels of the graphs that it compiled, and the folder it was loaded from."""

    engine: Engine
    prepare_seconds: float
    graphs: list[list[Kernel]]
    folder: Path | None


def profile(
    model: Transformer,
    engines: Sequence[str | Engine],
    *,
    name: str = "model",
    batches: Sequence[int] = (1, 8),
    prompt_tokens: int = 128,
    decode_steps: int = 200,
    seconds_per_cell: float = 1.0,
    seed: int = 0,
    artifact_folder: Path | None = None,
    machine: Machine | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Profile:
    """Measure `model` on `engines`, which take turns; with the defaults, about 5 seconds an engine and batch.

    Compiling and exporting come before that and are reported as `prepare_seconds`.

    Args:
        model: in eval mode.
        engines: names for `ultramem.runtime.engine.open_engine`, or open engines. Stages of an engine that compiles
            are told apart only if it is opened here, or was compiled with `COMPILE_OPTIONS`.
        name: of the model, for the report.
        batches: sequences at a time.
        prompt_tokens: tokens of a prefill, and in the cache before each decode step.
        decode_steps: most samples per engine, batch and phase; fewer where `seconds_per_cell` ends them.
        seconds_per_cell: time for the samples of one engine, batch and phase.
        seed: of the tokens.
        artifact_folder: has a folder for each exported engine ("onnx", "aoti", "tensorrt"); one that is missing is
            exported there, compiled so that its stages can be told apart. Needed for these engines alone.
        machine: measured before; None measures it now.
        progress: called with a line on what is being done.

    Raises:
        ValueError: an argument is out of range.
        WrongLogitsError: an engine's logits are not eager's.
    """
    _check_arguments(model, engines, batches, prompt_tokens, decode_steps, seconds_per_cell)
    device = model.embedding.weight.device
    settings = Settings(
        batches=tuple(batches),
        prompt_tokens=prompt_tokens,
        seconds_per_cell=seconds_per_cell,
        max_samples=decode_steps,
        rounds=ROUNDS,
        seed=seed,
    )
    draws = [
        [
            draw_inputs(model.config.vocab_size, batch=batch, prompt_tokens=prompt_tokens, seed=seed + draw)
            for batch in batches
        ]
        for draw in range(CHECK_DRAWS)
    ]
    with torch.no_grad():
        opened = [_open(engine, model, artifact_folder, draws[0], progress) for engine in engines]
        progress("comparing logits with eager and float64")
        agreements = check_agreement(model, [each.engine for each in opened], draws)
        progress("measuring memory bandwidth and GEMM rate")
        machine = machine or measure_machine(device)
        arithmetic = stage_arithmetic(model, machine, settings)
        latency: list[Latency] = []
        stages: list[StageTimes] = []
        for batch, inputs in zip(batches, draws[0], strict=True):
            cells = [make_cells(each.engine, batch, inputs) for each in opened]
            for index, phase in enumerate((PREFILL, DECODE)):
                progress(f"timing {phase} at batch {batch}")
                turn = [pair[index] for pair in cells]
                measure_cells(
                    turn,
                    rounds=ROUNDS,
                    seconds_per_cell=seconds_per_cell,
                    max_samples=decode_steps,
                    device=device,
                )
                latency += [latency_of(cell, arithmetic, machine, settings) for cell in turn]
                stages += [
                    _stages_of(model, each, cell, inputs, device) for each, cell in zip(opened, turn, strict=True)
                ]
    return Profile(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=describe_model(model, name),
        machine=machine,
        settings=settings,
        engines=tuple(
            EngineRecord(
                name=each.engine.name,
                prepare_seconds=each.prepare_seconds,
                max_abs_difference=agreements[each.engine.name].max_abs_difference,
                tolerance=agreements[each.engine.name].tolerance,
            )
            for each in opened
        ),
        latency=tuple(latency),
        stages=tuple(stages),
        arithmetic=arithmetic,
    )


def stage_arithmetic(model: Transformer, machine: Machine, settings: Settings) -> tuple[StageArithmetic, ...]:
    """Bytes, FLOPs and the shortest possible time of every stage, batch and phase."""
    found = []
    for batch in settings.batches:
        for phase in (PREFILL, DECODE):
            new, cached = (settings.prompt_tokens, 0) if phase == PREFILL else (1, settings.prompt_tokens)
            size = model.embedding.weight.element_size()
            for cost in stage_costs(
                model.config, batch=batch, new_tokens=new, cached_tokens=cached, element_bytes=size
            ):
                memory_s = cost.total_bytes / machine.bytes_per_second
                compute_s = cost.flops / machine.gemm_flops_per_second
                found.append(
                    StageArithmetic(
                        batch=batch,
                        phase=phase,
                        total_bytes=cost.total_bytes,
                        roofline_us=1e6 * max(memory_s, compute_s),
                        **cost._asdict(),
                    )
                )
    return tuple(found)


def latency_of(cell: Cell, arithmetic: Sequence[StageArithmetic], machine: Machine, settings: Settings) -> Latency:
    """Percentiles of a cell, and its shares of the measured roofs."""
    samples = cell.samples_us
    p50_us = percentile(samples, 0.5)
    rounds = [percentile(round_us, 0.5) for round_us in cell.round_us]
    costs = [cost for cost in arithmetic if (cost.batch, cost.phase) == (cell.batch, cell.phase)]
    new, cached = (settings.prompt_tokens, 0) if cell.phase == PREFILL else (1, settings.prompt_tokens)
    return Latency(
        engine=cell.engine,
        batch=cell.batch,
        phase=cell.phase,
        new_tokens=new,
        cached_tokens=cached,
        samples=len(samples),
        p50_us=p50_us,
        p90_us=percentile(samples, 0.9),
        p99_us=percentile(samples, 0.99),
        min_us=min(samples),
        round_p50_low_us=min(rounds),
        round_p50_high_us=max(rounds),
        tokens_per_second=cell.batch * new / p50_us * 1e6,
        bandwidth_share=sum(cost.total_bytes for cost in costs) / p50_us * 1e6 / machine.bytes_per_second,
        compute_share=sum(cost.flops for cost in costs) / p50_us * 1e6 / machine.gemm_flops_per_second,
    )


def describe_model(model: Transformer, name: str) -> ProfiledModel:
    """Names and counts of the model."""
    counts = count(model.config)
    weight = model.embedding.weight
    return ProfiledModel(
        name=name,
        parameters=counts.total_with_embeddings,
        flops_per_token=counts.flops_per_token,
        weight_bytes=counts.total_with_embeddings * weight.element_size(),
        dtype=str(weight.dtype).removeprefix("torch."),
        config=to_dict(model.config),
    )


def _open(
    engine: str | Engine,
    model: Transformer,
    artifact_folder: Path | None,
    inputs: Sequence[Inputs],
    progress: Callable[[str], None],
) -> _Opened:
    """Open an engine and run every shape once, so that all of its compiling is done and recorded."""
    name = engine if isinstance(engine, str) else engine.name
    progress(f"preparing {name}")
    start = time.perf_counter()
    with recorded_compilation() as graphs:
        opened = _open_by_name(engine, model, artifact_folder) if isinstance(engine, str) else engine
        for each in inputs:
            _, cache = opened.prefill(each.prompt_BS)
            opened.decode(each.next_B1, cache)
    return _Opened(opened, time.perf_counter() - start, graphs, getattr(opened, "folder", None))


def _open_by_name(name: str, model: Transformer, artifact_folder: Path | None) -> Engine:
    from ultramem.runtime.engine import open_engine

    if name not in EXPORTED:
        return open_engine(name, model, None)
    if artifact_folder is None:
        raise ValueError(f"artifact_folder must be given for engine {name!r}, got None")
    folder = artifact_folder / name
    if not folder.exists():
        from ultramem.export import export_model

        artifact_folder.mkdir(parents=True, exist_ok=True)
        export_model(model, name, folder)
    return open_engine(name, model, folder)


def _stages_of(model: Transformer, opened: _Opened, cell: Cell, inputs: Inputs, device: torch.device) -> StageTimes:
    name, folder = opened.engine.name, opened.folder
    repeats = max(5, min(STAGE_REPEATS, int(1e6 * STAGE_SECONDS / percentile(cell.samples_us, 0.5))))
    if name == "eager":
        return eager_stages(model, cell, repeats=repeats, device=device)
    if name == "tensorrt":
        return not_separable(cell, "an engine's kernels are TensorRT's own, which cross the stages")
    if device.type != "cpu":
        return not_separable(cell, f"stages of compiled engines are told apart on a CPU only, this is {device}")
    if name == "onnx" and folder is not None:
        return onnx_stages(folder / "model.onnx", cell, inputs, repeats=repeats)
    packages = sorted(folder.glob("*.pt2")) if folder is not None else ()
    graphs = [*opened.graphs, *(graph for package in packages for graph in packaged_kernels(package))]
    return kernel_stages(cell, graphs, repeats=repeats)


def _check_arguments(
    model: Transformer,
    engines: Sequence[str | Engine],
    batches: Sequence[int],
    prompt_tokens: int,
    decode_steps: int,
    seconds_per_cell: float,
) -> None:
    if model.training:
        raise ValueError("the model must be in eval mode to be profiled (call model.eval())")
    if not engines:
        raise ValueError("engines must name at least one engine, got none")
    names = [engine if isinstance(engine, str) else engine.name for engine in engines]
    if len(set(names)) != len(names):
        raise ValueError(f"engines must each be named once, got {', '.join(names)}")
    if not batches or min(batches) < 1 or len(set(batches)) != len(batches):
        raise ValueError(f"batches must be different sizes of at least 1, got {tuple(batches)}")
    if not 1 <= prompt_tokens < model.config.max_positions:
        raise ValueError(f"prompt_tokens must be in 1..{model.config.max_positions - 1}, got {prompt_tokens}")
    if decode_steps < 1:
        raise ValueError(f"decode_steps must be at least 1, got {decode_steps}")
    if not seconds_per_cell > 0:
        raise ValueError(f"seconds_per_cell must be positive, got {seconds_per_cell}")
