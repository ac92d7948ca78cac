"""`ultramem plan`: what a model's tables cost on many ranks, by arithmetic."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ultramem.config import ModelConfig
    from ultramem.runtime.plan.plan import Plan

DEVICES = ("h100", "h200", "cpu")


def add_plan_command(command: Callable[[str, Any, str], argparse.ArgumentParser]) -> None:
    """Add it; `command(name, run, help)` makes its parser."""
    sub = command("plan", _plan, "Placement, bytes, memory and step time of sharded tables, by arithmetic.")
    model = sub.add_mutually_exclusive_group(required=True)
    model.add_argument("--preset", metavar="P", help="a model with memory layers")
    help_text = "a trained one; the rows that its lookups read twice are counted in batches of its text"
    model.add_argument("--run", dest="run_folder", type=Path, metavar="RUN", help=help_text)
    sub.add_argument("--ranks", required=True, type=int, metavar="N", help="devices that train it")
    sub.add_argument("--device", default="h100", metavar="D", help=f"{', '.join(DEVICES)} (default: h100)")
    sub.add_argument(
        "--rows", metavar="N", help="of each table, as 1e9 (default: the preset's); rounded up to a square"
    )
    sub.add_argument("--ranks-per-node", type=int, metavar="N", help="(default: 8, or 1 with device cpu)")
    sub.add_argument("--tokens-per-rank", type=int, metavar="N", help="of one forward and backward (default: 8192)")
    sub.add_argument("--accumulate", type=int, metavar="N", help="forwards and backwards of a step (default: 1)")
    sub.add_argument("--sequence-length", type=int, metavar="N", help="(default: 2048, or a run's)")
    sub.add_argument("--dtype", metavar="T", help="of activations and on the wire: bf16 (default) or fp32")
    sub.add_argument("--placement", metavar="P", help="auto (default), rows, columns or replicate")
    sub.add_argument("--table-copies", type=int, metavar="N", help="of each cut table, as of one a node (default: 1)")
    sub.add_argument("--dense", metavar="P", help="all that is no table: fsdp (default) or replicate")
    sub.add_argument("--table-optimizer", metavar="O", help="lazy_adamw (default), row_adagrad or adamw")
    sub.add_argument("--table-dtype", metavar="T", help="float32 (default) or bfloat16")
    sub.add_argument(
        "--activation-checkpointing", action="store_true", default=None, help="attention and MLPs run again"
    )
    sub.add_argument("--no-overlap", dest="overlap", action="store_false", default=None, help="nothing hides exchanges")
    sub.add_argument(
        "--no-deduplicate", dest="deduplicate", action="store_false", default=None, help="rows travel once a slot"
    )
    sub.add_argument("--distinct-rows", type=int, metavar="N", help="that a rank's lookup reads (default: by chance)")
    sub.add_argument("--network-gbit", type=float, metavar="G", help="of each rank's network link, in Gb/s")
    sub.add_argument("--plot", type=Path, metavar="FILE.svg", help="write the paper's Figure 9 for this model")


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    from ultramem.graph.weights import write_atomically
    from ultramem.presets import preset
    from ultramem.runtime.plan.figure_9 import figure_9
    from ultramem.runtime.plan.options import PlanOptions
    from ultramem.runtime.plan.plan import make_plan, to_json
    from ultramem.runtime.plan.plan_devices import plan_device
    from ultramem.runtime.plan.table import print_plan

    if args.device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {args.device!r}")
    if args.plot is not None and args.plot.suffix != ".svg":
        raise ValueError(f"plot must be a file name that ends in .svg, got {str(args.plot)!r}")
    given = {
        field.name: value
        for field in dataclasses.fields(PlanOptions)
        if (value := getattr(args, field.name)) is not None
    }
    if args.device == "cpu":
        given.setdefault("ranks_per_node", 1)
    if args.run_folder is not None:
        plan = _plan_of_run(args, given)
    else:
        options, config = PlanOptions(**given), preset(args.preset)
        if config.memory is None:
            raise ValueError(f"preset must be a model with memory layers, got {args.preset!r}")
        if args.rows is not None:
            config = with_rows(config, args.rows)
        plan = make_plan(args.preset, config, options, plan_device(args.device, options))
    document = to_json(plan)
    if args.plot is not None:
        picture = figure_9(plan).encode()
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.plot, picture)
    if not args.json:
        print_plan(plan)
        if args.plot is not None:
            print(args.plot)
    return document


def _plan_of_run(args: argparse.Namespace, given: dict[str, Any]) -> Plan:
    from ultramem.runtime.plan.measured_rows import open_run
    from ultramem.runtime.plan.options import PlanOptions
    from ultramem.runtime.plan.plan import make_plan
    from ultramem.runtime.plan.plan_devices import plan_device

    for name in ("rows", "distinct_rows", "sequence_length"):
        if (value := getattr(args, name)) is not None:
            raise ValueError(f"{name} must be left out with run, which has its own, got {value!r}")
    run = open_run(args.run_folder)
    options = PlanOptions(**given, sequence_length=run.train.sequence_length)
    measured = run.measure(options.tokens_per_rank)
    options = dataclasses.replace(options, distinct_rows=measured.distinct_rows)
    name = args.run_folder.resolve().name
    return make_plan(name, run.model.config, options, plan_device(args.device, options), measured)


def with_rows(config: ModelConfig, text: str) -> ModelConfig:
    """The model with tables of at least so many rows each: of the least square from there on, as the grid wants it.

    Raises:
        ValueError: that is no number of rows, the model has no table, or its grid would be too large.
    """
    from ultramem.runtime.plan.memory import require_memory

    try:
        rows = float(text)
    except ValueError:
        rows = math.nan
    if not 1 <= rows < 1e15:
        raise ValueError(f"rows must be a number from 1 to 1e15, as 1e9, got {text!r}")
    memory = require_memory(config)
    knum = math.isqrt(math.ceil(rows / memory.table_layers) - 1) + 1
    try:
        return dataclasses.replace(config, memory=dataclasses.replace(memory, knum=knum))
    except ValueError as error:
        raise ValueError(f"rows must make a table that the model's grid can address, got {text!r}: {error}") from error
