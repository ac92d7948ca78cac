"""The `ultramem train` and `ultramem report` commands."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import typing
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ultramem
from ultramem.config import ParallelConfig, TrainConfig, to_dict
from ultramem.device_cli import parse_device
from ultramem.input_errors import INPUT_ERRORS
from ultramem.ranks_cli import ending_of_ranks

if TYPE_CHECKING:
    from ultramem.runtime.distributed import Ranks
    from ultramem.runtime.recipe import Recipe
    from ultramem.runtime.train import Result

NONE_MEANS = {"health_every": "with each evaluation", "final_eval_tokens": "all"}


def add_train_commands(command: Callable[[str, Any, str], argparse.ArgumentParser]) -> None:
    """Add both; `command(name, run, help)` makes the parser of one."""
    sub = command("train", _train, "Train a model on text, into a run folder.")
    sub.add_argument("--preset", metavar="P", help="see `ultramem params --help`, or ultramem.presets()")
    sub.add_argument("--data", metavar="D", help="austen, gutenberg, text files, or prepared data")
    sub.add_argument("--out", required=True, type=Path, metavar="RUN", help="run folder to write")
    sub.add_argument("--resume", action="store_true", help="go on from the last checkpoint in RUN, or from step 0")
    sub.add_argument(
        "--config",
        type=Path,
        metavar="F.toml",
        help="preset, data, [train] and [model] as TOML, or the config.json of a run; flags win",
    )
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="model.FIELD=V",
        help="override a field of the model, as model.memory.top_m=8; may be given again",
    )
    sub.add_argument("--tensorboard", action="store_true", help="write RUN/tensorboard too")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    _add_config_flags(sub, TrainConfig, "training options")
    _add_config_flags(sub, ParallelConfig, "over several ranks (torchrun ... -m ultramem train)")

    sub = command(
        "report", _report, "Curves of runs, finished or not, and the health of their memory, as one HTML file."
    )
    sub.add_argument("run_folders", type=Path, nargs="+", metavar="RUN")
    sub.add_argument("--out", required=True, type=Path, metavar="FILE.html", help="file to write")


def _add_config_flags(parser: argparse.ArgumentParser, cls: type[TrainConfig | ParallelConfig], title: str) -> None:
    """A flag per field of the config; unset ones leave the TOML file's value or the default."""
    hints = typing.get_type_hints(cls)
    group = parser.add_argument_group(title)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        flag, hint = f"--{field.name.replace('_', '-')}", hints[field.name]
        help_text = f"(default: {field.default})"
        if hint is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help_text)
        elif hint == int | None:
            group.add_argument(flag, type=int, default=None, metavar="N", help=f"(default: {NONE_MEANS[field.name]})")
        elif typing.get_origin(hint) is typing.Literal:
            group.add_argument(flag, choices=typing.get_args(hint), default=None, help=help_text)
        else:
            group.add_argument(flag, type=hint, default=None, metavar="N" if hint is int else "X", help=help_text)


def _train(args: argparse.Namespace) -> dict[str, Any]:
    from ultramem.runtime.distributed import join_ranks, meet
    from ultramem.runtime.stop_signals import Stopped

    recipe, problem = None, None
    try:
        recipe = _recipe(args)
        timeout_s = recipe.train.parallel.timeout_s
    except INPUT_ERRORS as error:
        problem, timeout_s = error, ParallelConfig().timeout_s
    meeting = meet(timeout_s)
    with ending_of_ranks(meeting, "ultramem train", traceback=args.traceback):
        if meeting is not None:
            meeting.require_agreement(None if recipe is None else _description(recipe, args), problem)
        if recipe is None:
            assert problem is not None
            raise problem
        try:
            with join_ranks(recipe.train.parallel, parse_device(args.device), meeting) as ranks:
                result = _train_on(ranks, recipe, args)
        except Stopped as stop:
            if meeting is not None:
                raise
            if stop.signum == signal.SIGTERM:
                print(f"ultramem train: {stop}", file=sys.stderr)
                sys.exit(128 + signal.SIGTERM)
            raise KeyboardInterrupt(str(stop)) from stop
    if not ranks.is_main:
        sys.exit(0)
    summary: dict[str, Any] = {
        "run": str(args.out),
        "preset": recipe.preset,
        "step": result.step,
        "weights_step": result.weights_step,
        "seed": recipe.train.seed,
        "train_loss": result.train_loss,
        "held_out": result.held_out._asdict(),
        "out_of_domain": result.out_of_domain._asdict() if result.out_of_domain else None,
        "seconds": result.seconds,
    }
    if not args.json:
        print(f"{args.out}: {result.step} steps in {result.seconds:.0f} s, seed {recipe.train.seed}")
        if result.weights_step != result.step:
            print(f"  weights of step {result.weights_step}, the best on held-out text")
        for name, evaluation in (("held-out", result.held_out), ("out-of-domain", result.out_of_domain)):
            if evaluation is not None:
                print(
                    f"  {name} text: {evaluation.loss:.4f} nats per token, {evaluation.bits_per_byte:.4f} bits per byte"
                )
    return summary


def _recipe(args: argparse.Namespace) -> Recipe:
    from ultramem.runtime.recipe import make_recipe

    given = _given(args, TrainConfig)
    if parallel := _given(args, ParallelConfig):
        given["parallel"] = parallel
    return make_recipe(file=args.config, preset=args.preset, data=args.data, train=given, settings=args.set)


def _description(recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """What all ranks must have in common, by the names of the flags where there are some."""
    import torch

    fields = to_dict(recipe.train)
    return {
        "parallel": fields.pop("parallel"),
        "model": to_dict(recipe.model),
        "train": fields,
        "data": recipe.data,
        "out": str(args.out),
        "resume": args.resume,
        "device": torch.device(parse_device(args.device)).type,
        "ultramem": ultramem.__version__,
        "torch": torch.__version__,
    }


def _train_on(ranks: Ranks, recipe: Recipe, args: argparse.Namespace) -> Result:
    from ultramem.runtime.data import load_corpus
    from ultramem.runtime.distributed.placement import choose
    from ultramem.runtime.progress import TrainingProgress
    from ultramem.runtime.train import train

    corpus = ranks.on_main(lambda: load_corpus(recipe.data))  # it may have to be fetched, once
    corpus = corpus or load_corpus(recipe.data)
    if recipe.data_sha256 not in (None, corpus.sha256):
        raise ValueError(f"data: {corpus.name} is not the text that {args.config} names (sha256 differs)")
    ranks, reasons = choose(ranks, recipe.model, recipe.train)
    with TrainingProgress() if ranks.is_main else nullcontext() as progress:
        if progress is not None:
            for reason in reasons:
                progress.message(reason)
        return train(
            recipe.model,
            recipe.train,
            corpus,
            args.out,
            resume=args.resume,
            device=parse_device(args.device) if ranks.device is None else ranks.device,
            tensorboard=args.tensorboard and ranks.is_main,
            progress=progress,
            ranks=ranks,
        )


def _given(args: argparse.Namespace, cls: type[TrainConfig | ParallelConfig]) -> dict[str, Any]:
    """The fields that flags set."""
    values = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if value is not None}


def _report(args: argparse.Namespace) -> dict[str, Any]:
    from ultramem.runtime.report import read_training_run, render_training, write_report

    if args.out.is_dir():
        raise IsADirectoryError(f"out: {args.out} is a folder; name a file in it")
    document = render_training([read_training_run(folder) for folder in args.run_folders])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_report(args.out, document)
    if not args.json:
        print(args.out)
    return {"out": str(args.out), "runs": [str(folder) for folder in args.run_folders]}
