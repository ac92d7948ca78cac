"""`ultramem generate`: continue prompts on any engine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultramem.device_cli import EXPORTS, add_pinned_option, inference_device, load_there

if TYPE_CHECKING:
    from ultramem.graph.table_shard import TableShard
    from ultramem.runtime.distributed import Ranks
    from ultramem.runtime.engine import Engine
    from ultramem.runtime.generate import Event, Request
    from ultramem.runtime.tokenizer import Tokenizer

ENGINES = ("eager", "compile", *EXPORTS)


def add_generate_command(command: Callable[[str, Any, str], argparse.ArgumentParser]) -> None:
    sub = command("generate", _generate, "Continue prompts.")
    sub.add_argument("run_folder", type=Path, metavar="RUN")
    sub.add_argument("--prompt", required=True, action="append", metavar="TEXT", help="may be given several times")
    sub.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="of each prompt (default: 200)")
    sub.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default: 0)")
    sub.add_argument("--top-p", type=float, default=1.0, metavar="X", help="nucleus of the sampling (default: 1)")
    sub.add_argument("--seed", type=int, default=0, metavar="S", help="of the sampling of each prompt (default: 0)")
    sub.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends a continuation; may be given several times"
    )
    sub.add_argument("--max-batch", type=int, default=8, metavar="N", help="prompts that run at a time (default: 8)")
    sub.add_argument(
        "--max-cache-bytes", type=int, metavar="N", help="of keys and values of those (default: as memory lasts)"
    )
    sub.add_argument("--engine", default="eager", choices=ENGINES, help="(default: eager)")
    sub.add_argument(
        "--device", default="auto", help="of eager and compile: auto, cpu, cuda or cuda:N (default: auto, a GPU if any)"
    )
    add_pinned_option(sub)
    sub.add_argument("--mmap", action="store_true", help="map the weights from their file instead of reading them")
    sub.add_argument("--artifact", type=Path, metavar="DIR", help="export folder (default: RUN/exports/ENGINE)")
    add_placement_option(sub)


def add_placement_option(sub: argparse.ArgumentParser) -> None:
    """How ranks share tables, where there are several."""
    sub.add_argument(
        "--table-placement",
        choices=("rows", "columns", "auto"),
        help="over ranks (torchrun ... -m ultramem): what each has of the value tables (default: auto)",
    )


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    from ultramem.graph.weights import read_model_config
    from ultramem.runtime.distributed import LostRankError, require_agreement
    from ultramem.runtime.distributed.inference import inference_ranks, require_model_engine
    from ultramem.runtime.generate import Request, check_request
    from ultramem.runtime.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.run_folder)
    config = read_model_config(args.run_folder)
    requests = [
        Request(
            prompt=(tokenizer.end_of_text, *tokenizer.encode(prompt)),
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            stop=tuple(args.stop),
        )
        for prompt in args.prompt
    ]
    for request in requests:  # an engine may have to be exported or compiled: not for what is refused then
        check_request(request, config)
    try:
        with inference_ranks(config, args.table_placement) as (ranks, shard, reason):
            require_model_engine(ranks, args.engine)
            device = inference_device(
                args.device, [args.engine], mmap=args.mmap, pinned_tables=args.pinned_tables, ranks=ranks.size
            )
            chosen = {name: value for name, value in vars(args).items() if name != "run"}
            require_agreement(ranks, {"arguments": str(chosen), "model": str(config)})
            if reason and ranks.is_main and args.engine not in EXPORTS:
                print(reason, file=sys.stderr)
            result = _generate_on(ranks, shard, tokenizer, requests, device, args)
    except LostRankError as error:
        print(f"ultramem generate: lost another rank ({error})", file=sys.stderr)
        sys.exit(1)
    if any(each["finish_reason"] == "cancelled" for each in result["completions"]):
        raise KeyboardInterrupt
    if not ranks.is_main:
        sys.exit(0)
    return result


def _generate_on(
    ranks: Ranks,
    shard: TableShard | None,
    tokenizer: Tokenizer,
    requests: list[Request],
    device: str,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Every rank does the same, and the main one prints. A signal to one of them cancels the requests of all."""
    from ultramem.runtime.generate import Generator
    from ultramem.runtime.stop_signals import StopFlag, stop_signals

    with stop_signals() if ranks.size > 1 else nullcontext(StopFlag()) as stop:
        generator = Generator(
            _engine(args, device)
            if shard is None
            else _engine_of_part(args.engine, args.run_folder, args.artifact, mmap=args.mmap, shard=shard),
            tokenizer=tokenizer,
            max_batch=args.max_batch,
            max_cache_bytes=args.max_cache_bytes,
            ranks=ranks,
        )
        ids = [generator.submit(request) for request in requests]
        completions = [{"prompt": prompt, "text": "", "tokens": [], "finish_reason": None} for prompt in args.prompt]
        by_id: dict[int, dict[str, Any]] = dict(zip(ids, completions, strict=True))
        shown = _InOrder(ids, args.prompt)
        stop.may_raise = ranks.size == 1
        for event in generator.run():
            if stop.signum is not None:
                for each in ids:
                    generator.cancel(each)
            completion = by_id[event.request_id]
            completion["text"] += event.text
            completion["finish_reason"] = event.finish_reason
            if event.token is not None:
                completion["tokens"].append(event.token)
            if ranks.is_main and not args.json:
                for piece in shown.pieces(event):
                    print(piece, end="", flush=True)
    return {"engine": args.engine, **completions[0], "completions": completions}


class _InOrder:
    """Text of several prompts for one terminal: the first that has not ended is shown as it comes, the others wait."""

    def __init__(self, ids: Iterable[int], prompts: Iterable[str]) -> None:
        self._waiting = {request_id: [prompt] for request_id, prompt in zip(ids, prompts, strict=True)}
        self._ended: set[int] = set()

    def pieces(self, event: Event) -> Iterator[str]:
        self._waiting[event.request_id].append(event.text)
        if event.finish_reason is not None:
            self._ended.add(event.request_id)
        while self._waiting:
            first = next(iter(self._waiting))
            yield "".join(self._waiting[first])
            self._waiting[first].clear()
            if first not in self._ended:
                return
            del self._waiting[first]
            yield "\n\n" if self._waiting else "\n"


def _engine(args: argparse.Namespace, device: str) -> Engine:
    """An engine for a run; what it needs is exported first if it is not there."""
    from ultramem.runtime.engine import OnnxEngine, open_engine

    name, run_folder, artifact = args.engine, args.run_folder, args.artifact
    model = load_there(run_folder, device, mmap=args.mmap, pinned_tables=args.pinned_tables)
    if name in EXPORTS and artifact is None:
        artifact = run_folder / "exports" / name
        if not artifact.exists():
            from ultramem.export import export_model

            print(f"exporting to {artifact}", file=sys.stderr)
            artifact.parent.mkdir(exist_ok=True)
            export_model(model, name, artifact)
    engine = open_engine(name, model, artifact)
    if isinstance(engine, OnnxEngine):
        print(f"onnx: {engine.kernels}", file=sys.stderr)
    return engine


def _engine_of_part(name: str, run_folder: Path, artifact: Path | None, *, mmap: bool, shard: TableShard) -> Engine:
    """An engine for this rank's part of a run, or of an export of parts."""
    from ultramem.export.shard_record import part_folder
    from ultramem.graph.weights import load
    from ultramem.runtime.engine import open_engine

    if name not in EXPORTS:
        return open_engine(name, load(run_folder, mmap=mmap, shard=shard), None)
    if artifact is None:
        raise ValueError(f"artifact must be an export of parts for engine {name!r} of {shard.ranks} ranks, got None")
    return open_engine(name, None, part_folder(artifact, shard.rank, shard.ranks))
