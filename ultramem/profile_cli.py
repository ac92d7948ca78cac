"""`ultramem profile`: latency by engine, batch, request, stage and node; or a figure of the paper."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultramem.device_cli import add_pinned_option, inference_device, load_there
from ultramem.figure_cli import add_figure_options, make_figure_of, refuse_without_figure
from ultramem.generate_cli import ENGINES, add_placement_option

if TYPE_CHECKING:
    from ultramem.config import ModelConfig
    from ultramem.graph import Transformer
    from ultramem.graph.table_shard import TableShard
    from ultramem.machine import Machine
    from ultramem.runtime.distributed import Ranks

FAIL_IF = (
    "limits of growth since the baseline, as p50>+5%%,ttft>+10%% (of p50, p90, p99, ttft, tpot): exit code 1 where a "
    "metric exceeds its limit and the interval of its values in the rounds, lowest to highest, lies above that of the "
    "baseline"
)


def add_profile_command(command: Callable[[str, Any, str], argparse.ArgumentParser]) -> None:
    """Add it; `command(name, run, help)` makes its parser."""
    sub = command("profile", _profile, "Latency of a run or preset by engine, batch, request, stage and graph node.")
    sub.add_argument("target", metavar="RUN|PRESET", nargs="?")
    add_figure_options(sub)
    sub.add_argument("--engine", default="eager", metavar="E[,E...]", help=f"of {', '.join(ENGINES)} (default: eager)")
    sub.add_argument("--batch", default="1,8", metavar="B[,B...]", help="(default: 1,8)")
    sub.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="length of the prefill (default: 128)")
    sub.add_argument("--new-tokens", type=int, default=32, metavar="N", help="that a request generates (default: 32)")
    sub.add_argument(
        "--seconds", type=float, default=1.0, metavar="S", help="for each engine, batch and phase (default: 1)"
    )
    add_pinned_option(sub)
    sub.add_argument("--mmap", action="store_true", help="map the weights of a RUN from their file")
    sub.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder for profile.json, trace.json and report.html"
    )
    sub.add_argument(
        "--beside",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="profile.json of another model, for the report",
    )
    sub.add_argument("--baseline", type=Path, metavar="FILE", help="earlier profile.json of this model and machine")
    sub.add_argument("--fail-if", metavar="LIMITS", help=FAIL_IF)
    sub.add_argument(
        "--check-sums",
        action="store_true",
        help="exit code 1 where the stages of an engine, batch and phase, and what is outside of them, are more than "
        "10%% off the forward without instruments, over all and in every turn",
    )
    add_placement_option(sub)


def _profile(args: argparse.Namespace) -> dict[str, Any]:
    if args.figure is not None:
        return make_figure_of(args)
    refuse_without_figure(args)
    engines = _choices("engine", args.engine, ENGINES)
    batches = _positive_ints("batch", args.batch)
    from ultramem.runtime.distributed import LostRankError, require_agreement
    from ultramem.runtime.distributed.inference import inference_ranks, require_model_engine
    from ultramem.runtime.profile.in_step import in_step

    try:
        with inference_ranks(_config_of(args.target), args.table_placement) as (ranks, shard, reason), in_step(ranks):
            if ranks.size > 1:
                for engine in engines:
                    require_model_engine(ranks, engine, exports=False)
                require_agreement(ranks, {"arguments": str({**vars(args), "run": None})})
            if reason and ranks.is_main:
                print(reason, file=sys.stderr)
            device = inference_device(
                args.device or "auto", engines, mmap=args.mmap, pinned_tables=args.pinned_tables, ranks=ranks.size
            )
            document = _profile_on(ranks, shard, engines, batches, device, args)
    except LostRankError as error:
        print(f"ultramem profile: lost another rank ({error})", file=sys.stderr)
        sys.exit(1)
    if document is None:
        sys.exit(0)
    return document


def _profile_on(
    ranks: Ranks,
    shard: TableShard | None,
    engines: list[str],
    batches: list[int],
    device: str,
    args: argparse.Namespace,
) -> dict[str, Any] | None:
    """The document, on the main rank, which writes and prints it; all ranks measure."""
    from ultramem.graph.weights import write_atomically
    from ultramem.runtime.profile import print_profile, profile, to_json
    from ultramem.runtime.profile.baseline import change_table, compare, parse_limits
    from ultramem.runtime.profile.chrome_trace import chrome_trace
    from ultramem.runtime.profile.sums import check_sums
    from ultramem.runtime.profile.table import wide_console
    from ultramem.runtime.report import render_profile, write_report

    limits = () if args.fail_if is None else parse_limits(args.fail_if)
    if limits and args.baseline is None:
        raise ValueError(
            f"fail_if needs a baseline to compare with (--baseline FILE), got {args.fail_if!r} without one"
        )
    model, exports = _model_to_profile(args, device, shard)
    if args.out.exists() and not args.out.is_dir():
        raise FileExistsError(f"out: {args.out} exists and is not a folder")
    baseline, beside = _check_earlier(args, model, engines, batches)
    measured = profile(
        model,
        engines,
        name=Path(args.target).name,
        batches=batches,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        seconds_per_cell=args.seconds,
        artifact_folder=exports,
        machine=_machine_of_main(ranks),
        progress=lambda message: print(message, file=sys.stderr, flush=True) if ranks.is_main else None,
    )
    if not ranks.is_main:
        return None
    document = to_json(measured)
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out / "profile.json", json.dumps(document, indent=1).encode() + b"\n")
    write_atomically(args.out / "trace.json", json.dumps(chrome_trace(document)).encode() + b"\n")
    write_report(args.out / "report.html", render_profile(document, *beside))
    if not args.json:
        print_profile(measured)
        print(f"{args.out / 'profile.json'}, {args.out / 'trace.json'} and {args.out / 'report.html'}")
    args.exit_code = 0
    if args.check_sums:
        for line in (wrong := check_sums(document)):
            print(line, file=sys.stderr)
        args.exit_code = 1 if wrong else 0
    if baseline is None:
        return document
    changes = compare(baseline, document, limits)
    if not args.json:
        wide_console().print(change_table(changes))
    args.exit_code = 1 if args.exit_code or any(change.fails for change in changes) else 0
    return {**document, "changes": [dataclasses.asdict(change) for change in changes]}


def _check_earlier(
    args: argparse.Namespace, model: Transformer, engines: list[str], batches: list[int]
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The baseline and the profiles to show beside, refused before anything is measured where they do not compare."""
    import torch

    from ultramem.machine import device_name
    from ultramem.runtime.profile.baseline import check_comparable, read_profile
    from ultramem.runtime.profile.profiler import describe_model, make_settings
    from ultramem.runtime.versioned_document import plain

    settings = make_settings(
        batches=batches,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        seconds_per_cell=args.seconds,
    )
    machine = {"device": device_name(model.embedding.weight.device), "threads": torch.get_num_threads()}
    planned = plain(dataclasses.asdict(settings))
    baseline = None if args.baseline is None else read_profile(args.baseline, "baseline")
    beside = [read_profile(path, "beside") for path in args.beside]
    for path, document in zip(args.beside, beside, strict=True):
        check_comparable(document, machine=machine, settings=planned, called=str(path))
    if baseline is not None:
        described = plain(dataclasses.asdict(describe_model(model, args.target)))
        check_comparable(baseline, machine=machine, settings=planned, model=described, engines=engines)
    return baseline, beside


def _config_of(target: str) -> ModelConfig:
    from ultramem.graph.weights import read_model_config
    from ultramem.presets import preset, presets

    if Path(target).is_dir():
        return read_model_config(Path(target))
    if target in presets():
        return preset(target)
    raise FileNotFoundError(f"target must be a run folder or one of {', '.join(presets())}, got {target!r}")


def _machine_of_main(ranks: Ranks) -> Machine | None:
    """The roofs of one process, which others do not disturb; None where there is one, which measures them in time."""
    if ranks.size == 1:
        return None
    import torch
    import torch.distributed as dist

    from ultramem.machine import measure_machine

    found = [ranks.on_main(lambda: measure_machine(torch.device("cpu")))]
    dist.broadcast_object_list(found)
    return found[0]


def _model_to_profile(args: argparse.Namespace, device: str, shard: TableShard | None) -> tuple[Transformer, Path]:
    """The model of a run folder, or a preset's with fresh weights; and where its exported engines belong."""
    import torch

    from ultramem.graph.pinned_tables import pin_tables
    from ultramem.graph.transformer import build_model
    from ultramem.graph.weights import load
    from ultramem.presets import preset

    target = Path(args.target)
    if target.is_dir():
        if shard is not None:
            return load(target, mmap=args.mmap, shard=shard), target / "exports"
        return load_there(target, device, mmap=args.mmap, pinned_tables=args.pinned_tables), target / "exports"
    if args.mmap:
        raise ValueError(f"mmap maps the weights of a run folder: the preset {args.target!r} has no file of them")
    torch.manual_seed(0)  # the same weights at every call, so that profiles of a preset can be compared
    model = build_model(preset(args.target), device="cpu" if args.pinned_tables else device, shard=shard).eval()
    return pin_tables(model, device) if args.pinned_tables else model, args.out / "exports"


def _choices(name: str, text: str, accepted: Sequence[str]) -> list[str]:
    words = text.split(",")
    for word in words:
        if word not in accepted:
            raise ValueError(f"{name} must be of {', '.join(accepted)}, separated by commas, got {text!r}")
    if len(set(words)) < len(words):
        raise ValueError(f"{name} must name each once, got {text!r}")
    return words


def _positive_ints(name: str, text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isascii() and word.isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"{name} must be numbers of at least 1, separated by commas, got {text!r}")
    return [int(word) for word in words]
