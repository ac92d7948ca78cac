"""The `ultramem` command: it parses, calls and prints; what it calls says what is wrong with bad input.

Exit codes: 0 done, 1 a profile beyond the limits of --fail-if, 2 bad input (one line on stderr), 130 stopped by Ctrl-C
with the work saved, 141 where whoever read the output has gone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import typing
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ultramem.config import TrainConfig, from_dict
from ultramem.data_cli import add_data_commands
from ultramem.figure_cli import add_figure_options, make_figure_of, refuse_without_figure
from ultramem.generate_cli import ENGINES, EXPORTS, add_generate_command
from ultramem.train_cli import add_train_commands

if TYPE_CHECKING:
    from ultramem.graph import Transformer

HELD_OUT_TOKENS = 16384  # for what rounding costs: an export should not take an evaluation's time
FAIL_IF = (
    "limits of growth since the baseline, as p50>+5%%,ttft>+10%% (of p50, p90, p99, ttft, tpot): exit code 1 where a "
    "metric exceeds its limit and the interval of its values in the rounds, lowest to highest, lies above that of the "
    "baseline"
)


class _Parser(argparse.ArgumentParser):
    """Errors as one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _build_parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # --help (0) or a usage error (2)
        return int(stop.code or 0)
    prefix = f"ultramem {args.command}"
    try:
        result = args.run(args)
        if args.json:
            print(json.dumps(result))
        sys.stdout.flush()
    except (ValueError, FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, ImportError) as error:
        if args.traceback:
            raise
        print(f"{prefix}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"{prefix}: {_one_line(stop) or 'stopped'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter flushes at its end
        return 128 + signal.SIGPIPE
    return int(args.exit_code)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _build_parser() -> _Parser:
    parser = _Parser(prog="ultramem", description="Train, export and profile transformers with memory layers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def finish(sub: argparse.ArgumentParser, run: Any) -> None:
        sub.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
        sub.add_argument("--traceback", action="store_true", help="show where bad input was noticed")
        sub.set_defaults(run=run, exit_code=0)

    def command(name: str, run: Any, help_text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_text, description=help_text)
        finish(sub, run)
        return sub

    sub = command("params", _params, "Count the parameters and FLOPs of a preset, by arithmetic.")
    sub.add_argument("preset", metavar="PRESET")

    add_train_commands(command)

    sub = command("eval", _eval, "Loss and bits per byte of a run on held-out text.")
    sub.add_argument("run_folder", type=Path, metavar="RUN")
    sub.add_argument("--data", metavar="D", help="other text than the run's: all of it is evaluated on")
    sub.add_argument("--sequence-length", type=int, metavar="N", help="tokens per window (default: as trained)")
    sub.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="compile first")

    add_generate_command(command)

    sub = command("export", _export, "Lower a run to another engine, run the artefact and record its parity.")
    sub.add_argument("run_folder", type=Path, metavar="RUN")
    sub.add_argument("--to", required=True, choices=(*EXPORTS, "huggingface"))
    sub.add_argument("--out", required=True, type=Path, metavar="DIR", help="export folder to write")
    sub.add_argument("--dtype", default="fp32", metavar="T", help="of weights: fp32, fp16 or bf16 (default: fp32)")
    sub.add_argument("--table", metavar="T", help="rows of the value tables: int8 or int4 (default: as --dtype)")
    sub.add_argument("--static", metavar="B,S", help="fix the batch and the number of new tokens (default: any)")
    sub.add_argument("--sizes", metavar="R", help="batch=1:4:8,seq=...,past=..., min:opt:max (tensorrt)")
    sub.add_argument("--kernels", metavar="K", help="of our nodes: plugin (default) or body (tensorrt)")
    sub.add_argument("--device", default="cpu", metavar="D", help="of native code: cpu (default) or cuda (aoti)")
    sub.add_argument("--decode", action="store_true", help="a graph of one new token; in AOTInductor beside the other")

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

    help_text = "Download text, or tokenise it once into shards."
    add_data_commands(commands.add_parser("data", help=help_text, description=help_text), finish)
    return parser


def _params(args: argparse.Namespace) -> dict[str, Any]:
    from ultramem.counts import count
    from ultramem.presets import preset

    counts = count(preset(args.preset))
    result = {"preset": args.preset, **counts._asdict()}
    result["bytes"] = {
        name: size * counts.total_with_embeddings for name, size in (("float32", 4), ("bfloat16", 2), ("int8", 1))
    }
    if not args.json:
        print(f"{args.preset}: {counts.total / 1e9:.3f} B parameters without embedding and head")
        for name, value in counts._asdict().items():
            print(f"  {name:<22}{value:>18,}")
        for name, value in result["bytes"].items():
            print(f"  {'bytes in ' + name:<22}{value:>18,}")
    return result


def _eval(args: argparse.Namespace) -> dict[str, Any]:
    from ultramem.graph.weights import load, read_config
    from ultramem.runtime.data import Documents, evaluation_batches, load_corpus
    from ultramem.runtime.evaluate import evaluate, make_summed_loss
    from ultramem.runtime.tokenizer import load_tokenizer

    model = load(args.run_folder)
    document = read_config(args.run_folder)
    config = from_dict(TrainConfig, document["train"])
    length = config.sequence_length if args.sequence_length is None else args.sequence_length
    if not 1 <= length <= model.config.max_positions:
        raise ValueError(f"sequence_length must be in 1..{model.config.max_positions}, got {length}")
    tokenizer = load_tokenizer(args.run_folder)
    corpus = load_corpus(args.data or document["data"]["name"], tokenizer=tokenizer)
    parts: dict[str, tuple[Documents, ...]]
    if args.data:
        parts = {"all": (corpus.train, corpus.held_out)}
    else:
        if corpus.sha256 != document["data"]["sha256"]:
            raise ValueError(
                f"data: {corpus.name} is not the text that {args.run_folder} was trained on (sha256 differs)"
            )
        parts = {"held_out": (corpus.held_out,), "out_of_domain": (corpus.out_of_domain,)}
    loss = make_summed_loss(model, compiled=args.compile)
    result: dict[str, Any] = {"run": str(args.run_folder), "data": corpus.name, "sequence_length": length}
    for name, part in parts.items():
        if any(part):
            batches = chain.from_iterable(
                evaluation_batches(documents, batch_size=config.batch_size, sequence_length=length)
                for documents in part
            )
            result[name] = evaluate(model, loss, batches, token_bytes=tokenizer.token_bytes)._asdict()
    main_part = result[next(iter(parts))]
    result |= {name: main_part[name] for name in ("loss", "bits_per_byte", "perplexity")}
    if not args.json:
        for name in parts:
            if name in result:
                means = result[name]
                over = f"{means['text_bytes']:,} bytes"
                if means["tokens"] != means["text_bytes"]:
                    over = f"{means['tokens']:,} tokens, {over}"
                print(
                    f"{name}: {means['bits_per_byte']:.4f} bits per byte, loss {means['loss']:.4f} nats, "
                    f"perplexity {means['perplexity']:.3f} over {over}"
                )
    return result


def _export(args: argparse.Namespace) -> dict[str, Any]:
    from ultramem.export import ExportOptions, export_model
    from ultramem.export.options import parse_static
    from ultramem.graph.weights import load
    from ultramem.runtime.run_facts import run_facts

    options = ExportOptions(
        dtype=args.dtype,
        table=args.table,
        static=None if args.static is None else parse_static(args.static),
        decode=args.decode,
        device=args.device,
        sizes=args.sizes,
        kernels=args.kernels,
    )
    model = load(args.run_folder)
    rounds = (options.dtype, options.table) != ("fp32", None)
    bits_per_byte = _held_out_bits(args.run_folder) if rounds else None
    run = run_facts(args.run_folder) if args.to == "huggingface" else None
    manifest = export_model(model, args.to, args.out, options=options, bits_per_byte=bits_per_byte, run=run)
    document: dict[str, Any] = json.loads((args.out / "manifest.json").read_text())
    if not args.json:
        print(f"{args.out}: {manifest}")
        if "trtexec.txt" in manifest.files:
            print((args.out / "trtexec.txt").read_text(), end="")
    return document


def _held_out_bits(run_folder: Path) -> typing.Callable[[Transformer], float] | None:
    """Bits per byte of a model on some of a run's held-out text; None, with a line that says so, if it has none."""
    from ultramem.graph.weights import read_config
    from ultramem.runtime.data import evaluation_batches, load_corpus
    from ultramem.runtime.evaluate import evaluate, make_summed_loss
    from ultramem.runtime.tokenizer import load_tokenizer

    try:
        document = read_config(run_folder)
        config = from_dict(TrainConfig, document["train"])
        tokenizer = load_tokenizer(run_folder)
        text = load_corpus(document["data"]["name"], tokenizer=tokenizer).held_out
    except (KeyError, ValueError, FileNotFoundError, ImportError) as error:
        print(f"bits per byte are not measured: no held-out text of the run ({_one_line(error)})", file=sys.stderr)
        return None
    if not text:
        return None

    def bits_per_byte(model: Transformer) -> float:
        batches = evaluation_batches(
            text, batch_size=config.batch_size, sequence_length=config.sequence_length, max_tokens=HELD_OUT_TOKENS
        )
        loss = make_summed_loss(model, compiled=False)
        return evaluate(model, loss, batches, token_bytes=tokenizer.token_bytes).bits_per_byte

    return bits_per_byte


def _profile(args: argparse.Namespace) -> dict[str, Any]:
    if args.figure is not None:
        return make_figure_of(args)
    refuse_without_figure(args)
    engines = _choices("engine", args.engine, ENGINES)
    batches = _positive_ints("batch", args.batch)
    from ultramem.graph.weights import write_atomically
    from ultramem.runtime.profile import print_profile, profile, to_json
    from ultramem.runtime.profile.baseline import change_table, compare, parse_limits
    from ultramem.runtime.profile.chrome_trace import chrome_trace
    from ultramem.runtime.profile.table import wide_console
    from ultramem.runtime.report import render_profile, write_report

    limits = () if args.fail_if is None else parse_limits(args.fail_if)
    if limits and args.baseline is None:
        raise ValueError(
            f"fail_if needs a baseline to compare with (--baseline FILE), got {args.fail_if!r} without one"
        )
    model, exports = _model_to_profile(args.target, args.out, mmap=args.mmap)
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
        progress=lambda message: print(message, file=sys.stderr, flush=True),
    )
    document = to_json(measured)
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out / "profile.json", json.dumps(document, indent=1).encode() + b"\n")
    write_atomically(args.out / "trace.json", json.dumps(chrome_trace(document)).encode() + b"\n")
    write_report(args.out / "report.html", render_profile(document, *beside))
    if not args.json:
        print_profile(measured)
        print(f"{args.out / 'profile.json'}, {args.out / 'trace.json'} and {args.out / 'report.html'}")
    if baseline is None:
        return document
    changes = compare(baseline, document, limits)
    if not args.json:
        wide_console().print(change_table(changes))
    args.exit_code = 1 if any(change.fails for change in changes) else 0
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
    machine = {"device": device_name(torch.device("cpu")), "threads": torch.get_num_threads()}
    planned = plain(dataclasses.asdict(settings))
    baseline = None if args.baseline is None else read_profile(args.baseline)
    beside = [read_profile(path) for path in args.beside]
    for path, document in zip(args.beside, beside, strict=True):
        check_comparable(document, machine=machine, settings=planned, called=str(path))
    if baseline is not None:
        described = plain(dataclasses.asdict(describe_model(model, args.target)))
        check_comparable(baseline, machine=machine, settings=planned, model=described, engines=engines)
    return baseline, beside


def _model_to_profile(target: str, out: Path, *, mmap: bool = False) -> tuple[Transformer, Path]:
    """The model of a run folder, or a preset's with fresh weights; and where its exported engines belong."""
    import torch

    from ultramem.graph.transformer import build_model
    from ultramem.graph.weights import load
    from ultramem.presets import preset, presets

    if Path(target).is_dir():
        return load(target, mmap=mmap), Path(target) / "exports"
    if target in presets():
        if mmap:
            raise ValueError(f"mmap maps the weights of a run folder: the preset {target!r} has no file of them")
        torch.manual_seed(0)  # the same weights at every call, so that profiles of a preset can be compared
        return build_model(preset(target)).eval(), out / "exports"
    raise FileNotFoundError(f"target must be a run folder or one of {', '.join(presets())}, got {target!r}")


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
