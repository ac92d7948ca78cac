"""The whole way in one go: train a memory-layer model and a dense one of equal FLOPs, compare, export, profile.

Every step is a command that you could type; this script prints and runs them, then writes one HTML report. Run it again
and it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import ultramem as um
from ultramem.runtime.report import DemoRun, render_demo, write_report
from ultramem.runtime.run import RunFolder

MODELS = ("ultramem-tiny", "dense-tiny")
PROMPT = "It was a truth which Emma"
ABOUT = (
    "Two byte-level models of equal FLOPs per token, trained on the same windows of three novels by Jane Austen in the "
    "same order. Held-out is the last 5 % of each novel; out of domain is Alice's Adventures in Wonderland."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write (default: runs/demo)")
    parser.add_argument("--steps", type=int, default=550, help="training steps of each model (default: 550)")
    parser.add_argument(
        "--engines",
        default="eager,onnx,aoti",
        help="to time the memory model on; adding compile takes two minutes more (default: eager,onnx,aoti)",
    )
    args = parser.parse_args()
    began = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    results, profiles = {}, {}
    for model in MODELS:
        run = args.out / model
        results[model] = ultramem(
            *("train", "--preset", model, "--data", "austen", "--out", run, "--resume"),
            *("--steps", args.steps, "--batch-size", 4, "--lr", "2e-3"),
            *("--eval-every", 200, "--eval-tokens", 16384),
        )
    memory_run = args.out / MODELS[0]
    sample = ultramem("generate", memory_run, "--prompt", PROMPT, "--max-new-tokens", 200, "--temperature", 0.8)
    greedy = {}
    for engine in ("eager", "onnx", "aoti"):
        export = args.out / MODELS[0] / "exports" / engine
        if engine != "eager" and not export.exists():
            profiled = ["--profiled"] if engine == "aoti" else []  # or the report can't tell its stages apart
            ultramem("export", memory_run, "--to", engine, "--out", export, *profiled)
        greedy[engine] = ultramem(
            *("generate", memory_run, "--prompt", PROMPT, "--max-new-tokens", 64, "--engine", engine)
        )["text"]
    if len(set(greedy.values())) != 1:
        raise SystemExit(f"the engines disagree on the greedy text: {greedy}")
    engines = {MODELS[0]: args.engines, MODELS[1]: "eager,onnx"}
    for model in MODELS:
        profiles[model] = ultramem(
            *("profile", args.out / model, "--engine", engines[model], "--batch", 1),
            *("--out", args.out / model / "profile"),
        )
    report = args.out / "report.html"
    runs = [
        demo_run(model, args.out / model, results[model], sample if model == MODELS[0] else None) for model in MODELS
    ]
    write_report(report, render_demo(runs, list(profiles.values()), about=ABOUT))
    summary = summarise(runs, profiles)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print_summary(summary)
    print(f"{time.perf_counter() - began:.0f} s in all. Open {report.resolve().as_uri()}")
    return 0


def demo_run(model: str, folder: Path, result: dict[str, Any], sample: dict[str, Any] | None) -> DemoRun:
    """What the report shows of a run."""
    counts = um.count(um.preset(model))
    return DemoRun(
        model=model,
        parameters=counts.total_with_embeddings,
        flops_per_token=counts.flops_per_token,
        steps=result["step"],
        seconds=result["seconds"],
        seed=result["seed"],
        bits_per_byte={
            "held-out": result["held_out"]["bits_per_byte"],
            "out of domain": result["out_of_domain"]["bits_per_byte"],
        },
        metrics=[row for row in RunFolder(folder).read_metrics() if row.get("split") != "out_of_domain"],
        prompt=sample["prompt"] if sample else "",
        sample=sample["text"] if sample else "",
    )


def summarise(runs: list[DemoRun], profiles: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures of the demo: quality, training, and the decode step at batch 1 on each engine."""
    first = profiles[runs[0].model]
    return {
        "machine": first["machine"],
        "engines": [engine["name"] for engine in first["engines"]],
        "models": [
            {
                "model": run.model,
                "parameters": run.parameters,
                "flops_per_token": run.flops_per_token,
                "bits_per_byte": run.bits_per_byte,
                "steps": run.steps,
                "seed": run.seed,
                "train_seconds": run.seconds,
                "decode_p50_us": {
                    row["engine"]: row["p50_us"]
                    for row in profiles[run.model]["latency"]
                    if row["phase"] == "decode" and row["batch"] == 1
                },
            }
            for run in runs
        ],
    }


def print_summary(summary: dict[str, Any]) -> None:
    """One row a model."""
    table = Table(title="ultramem demo")
    table.add_column("model")
    headings = ["parameters", "MFLOP/token", "bits/byte", "Alice", "steps", "seed", "train s"]
    for heading in headings + [f"decode {engine}" for engine in summary["engines"]]:
        table.add_column(heading, justify="right")
    for row in summary["models"]:
        table.add_row(
            row["model"],
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['flops_per_token'] / 1e6:.2f}",
            *(f"{bits:.3f}" for bits in row["bits_per_byte"].values()),
            str(row["steps"]),
            str(row["seed"]),
            f"{row['train_seconds']:.0f}",
            *(_milliseconds(row["decode_p50_us"].get(engine)) for engine in summary["engines"]),
        )
    Console(width=150).print(table)


def _milliseconds(time_us: float | None) -> str:
    return "-" if time_us is None else f"{time_us / 1e3:.2f} ms"


def ultramem(*words: Any) -> dict[str, Any]:
    """Run an `ultramem` command, show it, and return its JSON."""
    command = [str(word) for word in words]
    print("$ ultramem " + " ".join(f"'{word}'" if " " in word else word for word in command), flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "ultramem", *command, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    sys.exit(main())
