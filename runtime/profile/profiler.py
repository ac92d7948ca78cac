"""A whole profile: machine, agreement, requests, latency, stages and arithmetic of a model on several engines."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ultramem.config import to_dict
from ultramem.counts import count
from ultramem.graph import Transformer
from ultramem.graph.sharded_table import shard_of
from ultramem.machine import Machine, measure_machine
from ultramem.runtime.profile.arithmetic import modules_of_stages
from ultramem.runtime.profile.measure import (
    Engine,
    Inputs,
    check_agreement,
    draw_inputs,
    make_cells,
    measure_cells,
)
from ultramem.runtime.profile.opening import Opened, open_ready
from ultramem.runtime.profile.request_schema import Request, RowUse
from ultramem.runtime.profile.requests import measure_requests, request_record
from ultramem.runtime.profile.roofs import latency_of, stage_arithmetic, with_roofs
from ultramem.runtime.profile.rows_touched import rows_touched
from ultramem.runtime.profile.schema import (
    DECODE,
    PREFILL,
    Latency,
    Profile,
    ProfiledModel,
    Settings,
    StageTimes,
)
from ultramem.runtime.profile.stage_timer import StageTimer

ROUNDS = 5
CHECK_DRAWS = 3


def profile(
    model: Transformer,
    engines: Sequence[str | Engine],
    *,
    name: str = "model",
    batches: Sequence[int] = (1, 8),
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    decode_steps: int = 200,
    seconds_per_cell: float = 1.0,
    seed: int = 0,
    artifact_folder: Path | None = None,
    machine: Machine | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Profile:
    """Measure `model` on `engines`, which take turns; with the defaults, about 6 seconds an engine and batch.

    Compiling and exporting come before that and are reported as `prepare_seconds`.

    Args:
        model: in eval mode.
        engines: names for `ultramem.runtime.engine.open_engine`, or open engines. Stages of an engine that compiles
            are told apart only if it is opened here, or was compiled with `COMPILE_OPTIONS`.
        name: of the model, for the report.
        batches: sequences at a time.
        prompt_tokens: tokens of a prefill, and in the cache before each decode step.
        new_tokens: that a request generates.
        decode_steps: most samples per engine, batch and phase; fewer where `seconds_per_cell` ends them.
        seconds_per_cell: time for the samples of one engine, batch and phase, and for the requests of one engine and
            batch; one request a round runs in any case.
        seed: of the tokens.
        artifact_folder: has a folder for each exported engine ("onnx", "aoti", "tensorrt"); one that is missing is
            exported there, compiled so that its stages can be told apart. Needed for these engines alone.
        machine: measured before; None measures it now.
        progress: called with a line on what is being done.

    Raises:
        ValueError: an argument is out of range.
        WrongLogitsError: an engine's logits are not eager's.
    """
    settings = make_settings(
        batches=batches,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        decode_steps=decode_steps,
        seconds_per_cell=seconds_per_cell,
        seed=seed,
    )
    _check_arguments(model, engines, settings)
    device = model.embedding.weight.device
    draws = [
        [
            draw_inputs(model.config.vocab_size, batch=batch, prompt_tokens=prompt_tokens, seed=seed + draw)
            for batch in batches
        ]
        for draw in range(CHECK_DRAWS)
    ]
    latency: list[Latency] = []
    stages: list[StageTimes] = []
    requests: list[Request] = []
    row_use: list[RowUse] = []
    with torch.no_grad():
        opened = [open_ready(engine, model, artifact_folder, draws[0], progress) for engine in engines]
        timers = [StageTimer(model, each) for each in opened]
        progress("comparing logits with eager and float64")
        agreements = check_agreement(model, [each.engine for each in opened], draws)
        progress("measuring memory bandwidth and GEMM rate")
        machine = machine or measure_machine(device)
        arithmetic = stage_arithmetic(model, machine, settings)
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
                latency += [
                    latency_of(
                        cell,
                        arithmetic,
                        machine,
                        settings,
                        max_abs_difference=agreements[cell.engine].max_abs_difference,
                    )
                    for cell in turn
                ]
                for timer, cell in zip(timers, turn, strict=True):
                    times = timer.stages(cell)
                    difference = agreements[cell.engine].max_abs_difference
                    stages.append(
                        with_roofs(
                            times,
                            arithmetic,
                            machine,
                            modules_of_stages=modules_of_stages(model.config),
                            max_abs_difference=difference,
                        )
                    )
            progress(f"timing requests at batch {batch}")
            requests += _requests(opened, inputs, settings, stages[-len(opened) :], device)
            row_use += rows_touched(model, inputs)
    return Profile(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=describe_model(model, name),
        machine=machine,
        settings=settings,
        engines=tuple(each.record(agreements[each.engine.name]) for each in opened),
        requests=tuple(requests),
        latency=tuple(latency),
        stages=tuple(stages),
        arithmetic=arithmetic,
        row_use=tuple(row_use),
    )


def make_settings(
    *,
    batches: Sequence[int] = (1, 8),
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    decode_steps: int = 200,
    seconds_per_cell: float = 1.0,
    seed: int = 0,
) -> Settings:
    """The settings of a profile with these arguments."""
    return Settings(
        batches=tuple(batches),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        seconds_per_cell=seconds_per_cell,
        max_samples=decode_steps,
        rounds=ROUNDS,
        seed=seed,
    )


def describe_model(model: Transformer, name: str) -> ProfiledModel:
    """Names and counts of the model."""
    counts = count(model.config)
    weight, shard = model.embedding.weight, shard_of(model)
    return ProfiledModel(
        name=name,
        parameters=counts.total_with_embeddings,
        flops_per_token=counts.flops_per_token,
        weight_bytes=counts.total_with_embeddings * weight.element_size(),
        dtype=str(weight.dtype).removeprefix("torch."),
        config=to_dict(model.config),
        ranks=1 if shard is None else shard.ranks,
        table_placement="whole" if shard is None else shard.placement,
    )


def _requests(
    opened: Sequence[Opened],
    inputs: Inputs,
    settings: Settings,
    decode_times: Sequence[StageTimes],
    device: torch.device,
) -> list[Request]:
    found = measure_requests(
        [each.engine for each in opened],
        inputs.prompt_BS,
        new_tokens=settings.new_tokens,
        rounds=settings.rounds,
        seconds_per_cell=settings.seconds_per_cell,
        device=device,
    )
    return [
        request_record(
            each.engine.name,
            inputs.prompt_BS,
            samples,
            launches_per_step=times.launches or None,
            max_abs_difference=times.max_abs_difference,
        )
        for each, samples, times in zip(opened, found, decode_times, strict=True)
    ]


def _check_arguments(model: Transformer, engines: Sequence[str | Engine], settings: Settings) -> None:
    if model.training:
        raise ValueError("the model must be in eval mode to be profiled (call model.eval())")
    if not engines:
        raise ValueError("engines must name at least one engine, got none")
    names = [engine if isinstance(engine, str) else engine.name for engine in engines]
    if len(set(names)) != len(names):
        raise ValueError(f"engines must each be named once, got {', '.join(names)}")
    batches, longest = settings.batches, model.config.max_positions
    if not batches or min(batches) < 1 or len(set(batches)) != len(batches):
        raise ValueError(f"batches must be different sizes of at least 1, got {batches}")
    if not 1 <= settings.prompt_tokens < longest:
        raise ValueError(f"prompt_tokens must be in 1..{longest - 1}, got {settings.prompt_tokens}")
    if not 2 <= settings.new_tokens <= longest - settings.prompt_tokens:
        raise ValueError(
            f"new_tokens must be in 2..{longest - settings.prompt_tokens} after {settings.prompt_tokens} tokens of "
            f"{longest} positions, got {settings.new_tokens}"
        )
    if settings.max_samples < 1:
        raise ValueError(f"decode_steps must be at least 1, got {settings.max_samples}")
    if not settings.seconds_per_cell > 0:
        raise ValueError(f"seconds_per_cell must be positive, got {settings.seconds_per_cell}")
