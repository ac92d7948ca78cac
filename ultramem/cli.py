"""The `ultramem` command: it parses, calls and prints; what it calls says what is wrong with bad input.

Exit codes: 0 done, 1 a profile that --fail-if or --check-sums fails, 2 bad input (one line on stderr), 130 stopped by
Ctrl-C with the work saved, 141 where whoever read the output has gone.
"""

from __future__ import annotations

import argparse
import contextlib
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
from ultramem.device_cli import EXPORTS
from ultramem.generate_cli import add_generate_command, add_placement_option
from ultramem.input_errors import INPUT_ERRORS, one_line
from ultramem.plan_cli import add_plan_command
from ultramem.profile_cli import add_profile_command
from ultramem.train_cli import add_train_commands

if TYPE_CHECKING:
    from ultramem.graph import Transformer

HELD_OUT_TOKENS = 16384  # for what rounding costs: an export should not take an evaluation's time


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
    except INPUT_ERRORS as error:
        if args.traceback:
            raise
        print(f"{prefix}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"{prefix}: {one_line(stop) or 'stopped'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter flushes at its end
        return 128 + signal.SIGPIPE
    return int(args.exit_code)


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
    help_text = "choose candidates by coarse keys (default: in graphs of one token, where keys are large)"
    sub.add_argument("--coarse-keys", action=argparse.BooleanOptionalAction, help=help_text)
    sub.add_argument("--profiled", action="store_true", help="compiled so that a profile tells its stages apart (aoti)")
    add_placement_option(sub)

    add_profile_command(command)

    add_plan_command(command)

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
    from ultramem.runtime.run import corpus_of_run
    from ultramem.runtime.tokenizer import load_tokenizer

    model = load(args.run_folder)
    config = from_dict(TrainConfig, read_config(args.run_folder)["train"])
    length = config.sequence_length if args.sequence_length is None else args.sequence_length
    if not 1 <= length <= model.config.max_positions:
        raise ValueError(f"sequence_length must be in 1..{model.config.max_positions}, got {length}")
    tokenizer = load_tokenizer(args.run_folder)
    corpus = load_corpus(args.data, tokenizer=tokenizer) if args.data else corpus_of_run(args.run_folder)
    parts: dict[str, tuple[Documents, ...]]
    if args.data:
        parts = {"all": (corpus.train, corpus.held_out)}
    else:
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
    from ultramem.runtime.profile import profiled_compilation
    from ultramem.runtime.run_facts import run_facts

    if args.profiled and args.to != "aoti":
        raise ValueError(f"profiled is for aoti, whose kernels are compiled, got to {args.to!r}")
    options = ExportOptions(
        dtype=args.dtype,
        table=args.table,
        static=None if args.static is None else parse_static(args.static),
        decode=args.decode,
        device=args.device,
        coarse_keys=args.coarse_keys,
        sizes=args.sizes,
        kernels=args.kernels,
    )
    if args.table_placement is not None or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from ultramem.export_parts_cli import export_parts_of

        return export_parts_of(args, options)
    model = load(args.run_folder)
    rounds = (options.dtype, options.table) != ("fp32", None)
    bits_per_byte = _held_out_bits(args.run_folder) if rounds else None
    run = run_facts(args.run_folder) if args.to == "huggingface" else None
    with profiled_compilation() if args.profiled else contextlib.nullcontext():
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
        print(f"bits per byte are not measured: no held-out text of the run ({one_line(error)})", file=sys.stderr)
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
