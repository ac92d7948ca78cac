"""How much of the exact top-m do the two-phase selection rules find, and at what cost?

Per rule (one or two tails, m' = m to 4m candidates a side): recall of the m best cells of the whole grid, the share of
their score sum, the overlap of what (u, t) and (-u, -t) select, the cells rescored and the time of the op. Without
`--run` on layers at init; with it on the queries of trained runs over their held-out text. Every kept score is checked
before anything is reported. The last line is one JSON object; `--out` merges it into a file.

    python -m benchmarks.selection_recall [--run RUN ...] [--data DATA] [--out FILE]

Shapes: T tokens, H heads, R ranks, N side of the grid, C cores, B batch, S sequence, D hidden size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ultramem
from benchmarks.selection_quality import RULES, Quality, Scores, quality, time_rules
from ultramem import MemoryConfig, UltraMemLayer
from ultramem.graph.memory_layer import Select
from ultramem.graph.weights import read_config, write_atomically
from ultramem.runtime.data import IGNORE, evaluation_batches, load_corpus
from ultramem.runtime.run import environment

NAME = "selection_recall"
SEEDS = (0, 1, 2)
INIT_TOKENS = 128  # a seed; with 2 heads, the mean recall of a seed is then known to about 0.01
RUN_TOKENS = 512
ROOT = Path(__file__).resolve().parents[1]


def record(problems: Sequence[Scores], m: int, **labels: Any) -> dict[str, Any]:
    """One case: its labels, and per rule the figures of each problem and the time of the first."""
    rules = [rule for rule in RULES if rule.k(m) <= problems[0].row_THRN.shape[-1]]
    with torch.no_grad():
        qualities = [quality(problem, m, rules) for problem in problems]
        times = time_rules(problems[0], m, rules)
    rows = []
    for rule, us_per_token, *of_rule in zip(rules, times, *qualities, strict=True):
        figures = {name: [round(getattr(q, name), 4) for q in of_rule] for name in Quality._fields}
        rows.append({**rule._asdict(), "k": rule.k(m), "cells": rule.cells(m), **figures, "us_per_token": us_per_token})
    return {**labels, "top_m": m, "rules": rows}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One size at init."""

    name: str
    config: MemoryConfig


def init_cases() -> list[Case]:
    """ultramem-tiny's layer, and sides of 400 and 1100 with key widths of the 151M model."""
    tiny = ultramem.preset("ultramem-tiny").memory
    assert tiny is not None
    cases = [Case(name="ultramem-tiny", config=tiny)]
    for side, m, rank, cores in itertools.product((400, 1100), (16, 42), (2, 3), (1, 2)):
        config = MemoryConfig(
            hidden_size=256,
            num_layers=12,
            value_dim=cores,  # values do not take part
            key_dim=256,
            knum=side // 2,
            top_m=m,
            rank=rank,
            num_cores=cores,
        )
        cases.append(Case(name=f"n={side} m={m} r={rank} C={cores}", config=config))
    return cases


def init_scores(config: MemoryConfig, seed: int, tokens: int = INIT_TOKENS) -> Scores:
    """Scores of a fresh, calibrated layer for normalised random hidden states."""
    torch.manual_seed(seed)
    layer = UltraMemLayer(config).eval()
    hidden_BSD = torch.nn.functional.layer_norm(torch.randn(1, tokens, config.hidden_size), (config.hidden_size,))
    with torch.no_grad():
        row_THRN, col_THRN = layer.score(layer.query(hidden_BSD))
    cores_HCRR = layer.select.cores_HCRR
    assert cores_HCRR is not None
    return Scores(row_THRN, col_THRN, cores_HCRR.detach())


def measure_init() -> list[dict[str, Any]]:
    records = []
    for case in init_cases():
        problems = [init_scores(case.config, seed) for seed in SEEDS]
        sizes = {"side": case.config.grid_side, "rank": case.config.rank, "num_cores": case.config.num_cores}
        records.append(record(problems, case.config.top_m, case=case.name, **sizes, seeds=list(SEEDS)))
        print_record(records[-1])
    return records


def run_scores(run: str, *, data: str | None = None, tokens: int = RUN_TOKENS) -> dict[str, tuple[Select, Scores]]:
    """By the name of its select stage, each Tucker layer of a run and its scores on held-out text.

    Raises:
        FileNotFoundError: the run or its text is missing.
        ValueError: the run has no layer with Tucker scores, or its config does not name its text.
    """
    model, document = ultramem.load(run), read_config(Path(run))
    stages = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Select) and module.cores_HCRR is not None  # None: additive scores, exact anyway
    }
    if not stages:
        raise ValueError(f"run must have a memory layer with Tucker scores (rank 2 or more), {run} has none")
    data = data or document.get("data", {}).get("name")
    if not isinstance(data, str):
        raise ValueError(f"{run} does not say what text it was trained on: name it with --data")
    length = document.get("train", {}).get("sequence_length", 256)
    # Spread over eight times as many tokens, so that they are not all of one page.
    batches = evaluation_batches(
        load_corpus(data).held_out, batch_size=8, sequence_length=length, max_tokens=8 * tokens
    )
    chosen_T = torch.empty(0, dtype=torch.int64)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in stages}

    def keep(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, Tensor]) -> None:
            seen[name].append((inputs[0][chosen_T].float(), inputs[1][chosen_T].float()))

        return hook

    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in stages.items()]
    with torch.no_grad():
        for inputs_BS, targets_BS in batches:
            chosen_T = (targets_BS.flatten() != IGNORE).nonzero().squeeze(1)[::8]
            model(inputs_BS)
    for handle in hooks:
        handle.remove()
    found = {}
    for name, module in stages.items():
        row_THRN, col_THRN = (torch.cat(side) for side in zip(*seen[name], strict=True))
        assert module.cores_HCRR is not None
        found[name] = module, Scores(row_THRN, col_THRN, module.cores_HCRR.detach().float())
    return found


def measure_run(run: str, data: str | None) -> list[dict[str, Any]]:
    label = Path(run).name if Path(run).is_absolute() else Path(run).as_posix()
    records = []
    for stage, (module, scores) in run_scores(run, data=data).items():
        _, h, r, n = scores.row_THRN.shape
        sizes = {"side": n, "rank": r, "num_cores": scores.cores_HCRR.shape[1], "num_heads": h}
        labels = {"case": f"{label} {stage}", "run": label, "stage": stage, "trained_with": module.candidates}
        records.append(record([scores], module.top_m, **labels, **sizes, tokens=len(scores.row_THRN)))
        print_record(records[-1])
    return records


def print_record(found: dict[str, Any]) -> None:
    print(
        f"{found['case']}\n  {'rule':11} {'m/m':>4} {'cells':>6} {'recall':>7} {'score':>7} {'sign':>7} {'us/token':>9}"
    )
    for row in found["rules"]:
        means = (f"{statistics.mean(row[name]):7.3f}" for name in Quality._fields)
        print(
            f"  {row['candidates']:11} {row['factor']:4} {row['cells']:6} {' '.join(means)} "
            f"{row['us_per_token']['median']:9.1f}",
            flush=True,
        )


def merged(before: dict[str, Any], **sections: list[dict[str, Any]]) -> dict[str, Any]:
    """`before` with new records: "init" is replaced whole, "trained" by run."""
    document = {"benchmark": NAME, "init": [], "trained": [], **before}
    for section, records in sections.items():
        runs = {each["run"] for each in records if "run" in each}
        kept = [] if section == "init" else [each for each in document[section] if each["run"] not in runs]
        document[section] = kept + records
    return document


def read_out(path: Path | None) -> dict[str, Any]:
    """What the file holds so far.

    Raises:
        ValueError: it is something else than a result of this benchmark.
    """
    if path is None or not path.exists():
        return {}
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"out: {path} is not valid JSON: {error}") from error
    if not isinstance(document, dict) or document.get("benchmark") != NAME:
        raise ValueError(f"out: {path} must be a result of {NAME}")
    return document


def provenance() -> dict[str, Any]:
    """Versions, device, threads and commit of the records made now."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT)
    found = {name: value for name, value in environment().items() if name != "platform"}  # the kernel tells nothing
    return {**found, "commit": git.stdout.strip() or None}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", default=[], help="folder of a trained run; may be given again")
    parser.add_argument("--data", help="text whose held-out part is read (default: what the run was trained on)")
    parser.add_argument("--out", type=Path, help="JSON file that the records are merged into")
    options = parser.parse_args(arguments)
    failed = False
    try:
        document = read_out(options.out)
    except ValueError as error:
        parser.error(str(error))
    made_by = provenance()
    for run in options.run or [None]:
        try:
            records = measure_init() if run is None else measure_run(run, options.data)
        except (ValueError, FileNotFoundError) as error:  # of one run; the others are measured all the same
            print(f"{NAME}: {error}", file=sys.stderr)
            failed = True
            continue
        records = [{**each, "environment": made_by} for each in records]
        document = merged(document, **{"init" if run is None else "trained": records})
        if options.out is not None:
            write_atomically(options.out, json.dumps(document, indent=1).encode() + b"\n")
    print(json.dumps(document))
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
