"""Train on two ranks, kill one in the middle, resume, and draw the losses over those of a run that nobody killed.

Every step is a command that you could type; this script prints and runs them, then writes one HTML page. It finds the
rank to kill under /proc, so it runs on Linux.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ultramem.runtime.report.charts import Curve, line_chart
from ultramem.runtime.report.page import Cell, escape, legend, number, page, section, table, text_cell, write_report
from ultramem.runtime.report.source import SERIES
from ultramem.runtime.run import RunFolder

PATIENCE_S = 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo_distributed"), help="folder to write, anew")
    parser.add_argument("--preset", default="ultramem-tiny", help="what to train (default: ultramem-tiny)")
    parser.add_argument("--data", default="austen", help="text to train on (default: austen)")
    parser.add_argument("--steps", type=int, default=60, help="training steps (default: 60)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows a step, on both ranks (default: 4)")
    parser.add_argument("--sequence-length", type=int, default=128, help="tokens of a window (default: 128)")
    args = parser.parse_args()
    if args.out.exists():
        if not (args.out / "whole").is_dir() and any(args.out.iterdir()):
            raise SystemExit(f"out: {args.out} holds something else than this demo's runs")
        shutil.rmtree(args.out)
    args.out.mkdir(parents=True)
    whole, killed = args.out / "whole", args.out / "killed"
    every = max(1, args.steps // 6)
    kill_step = 3 * args.steps // 5
    flags = [
        *("--preset", args.preset, "--data", args.data, "--steps", args.steps, "--batch-size", args.batch_size),
        *("--sequence-length", args.sequence_length, "--table-placement", "rows", "--table-optimizer", "lazy_adamw"),
        *("--lr", "2e-3", "--checkpoint-every", every, "--eval-every", 0, "--final-eval-tokens", 4096, "--no-compile"),
    ]
    finish(start("--out", whole, *flags))
    job = start("--out", killed, *flags)
    pid = kill_rank_1(job, RunFolder(killed), kill_step)
    code = job.wait()
    lost = losses_of(killed)
    print(f"\nrank 1 (process {pid}) got SIGKILL after step {max(lost)}; torchrun ended with exit code {code}\n")
    finish(start("--out", killed, "--resume", *flags))
    document, difference = compare(losses_of(whole), lost, losses_of(killed))
    write_report(args.out / "report.html", document)
    print(f"\nlargest difference of a loss to the run that nobody killed: {difference:.3g} nats per token")
    print(f"page: {(args.out / 'report.html').resolve()}")
    return 0


def start(*flags: object) -> subprocess.Popen[bytes]:
    """`ultramem train` on two ranks."""
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ultramem", "train"]
    command = [sys.executable, "-m", *launch, *map(str, flags)]
    print("$ torchrun " + " ".join(command[3:]), flush=True)
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": threads})


def finish(job: subprocess.Popen[bytes]) -> None:
    if code := job.wait():
        raise SystemExit(f"the command above ended with exit code {code}")


def kill_rank_1(job: subprocess.Popen[bytes], run: RunFolder, step: int) -> int:
    """Wait for `step` to be done, and kill; returns the process that is no more."""
    end = time.monotonic() + PATIENCE_S
    while not (steps := [row["step"] for row in run.read_metrics() if "loss" in row]) or steps[-1] < step:
        if job.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"the command above did not come to step {step}")
        time.sleep(0.02)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    for pid in map(int, children):
        if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            os.kill(pid, signal.SIGKILL)
            return pid
    raise SystemExit(f"rank 1 is not among the processes {children} of torchrun")


def losses_of(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in RunFolder(run).read_metrics() if "loss" in row}


def compare(whole: dict[int, float], lost: dict[int, float], resumed: dict[int, float]) -> tuple[str, float]:
    """The page, and the largest difference of a loss.

    Args:
        whole: losses of the run that nobody killed, by step.
        lost: of the other run, up to the kill.
        resumed: of it at its end.
    """
    if list(resumed) != list(whole):
        raise SystemExit(f"the resumed run has steps {list(resumed)}, the whole one {list(whole)}")
    differences = {step: abs(resumed[step] - loss) for step, loss in whole.items()}
    worst = max(differences, key=lambda step: differences[step])
    rows_of_page: dict[str, Any] = {
        "largest_difference_nats": differences[worst],
        "steps": [
            {"step": step, "whole": whole[step], "until_the_kill": lost.get(step), "resumed": resumed[step]}
            for step in whole
        ],
    }
    low, high = min(whole.values()), max(whole.values())
    curves = [
        Curve(label="never killed", points=sorted(whole.items()), color=SERIES[0]),
        Curve(label="killed, resumed", points=sorted(resumed.items()), color=SERIES[1], has_dots=True, is_faint=True),
    ]
    title = f"After a kill at step {max(lost)} the losses are those of a run that nobody killed"
    if differences[worst] > 1e-4:
        title = f"After a kill at step {max(lost)} the losses differ by up to {differences[worst]:.2g} nats"
    chart = line_chart(
        curves, x_title="training step", y_title="loss, nats per token", y_low=low - 0.1, y_high=high + 0.1,
        summary=title,
    )  # fmt: skip
    note = (
        f"Line: two ranks, never killed. Dots: rank 1 got SIGKILL after step {max(lost)}, and the same command with "
        "--resume went on from the last whole checkpoint. The axis does not start at zero."
    )
    shown = [
        [
            Cell(text=str(row["step"]), path=f"/steps/{place}/step"),
            Cell(text=f"{row['whole']:.6f}", path=f"/steps/{place}/whole"),
            text_cell("–") if row["until_the_kill"] is None  # noqa: RUF001  # an en dash
            else Cell(text=f"{row['until_the_kill']:.6f}", path=f"/steps/{place}/until_the_kill"),
            Cell(text=f"{row['resumed']:.6f}", path=f"/steps/{place}/resumed"),
        ]
        for place, row in enumerate(rows_of_page["steps"])
    ]  # fmt: skip
    shown_difference = number(f"{differences[worst]:.3g}", "/largest_difference_nats")
    body = [
        f"<header><h1>{escape(title)}</h1><p>Largest difference: {shown_difference} nats a token, at step {worst}.</p>"
        "</header>",
        section(
            "Losses",
            legend((curve.label, curve.color) for curve in curves),
            f"<figure>{chart}<figcaption>{escape(note)}</figcaption></figure>",
        ),
        section("Every step", table(("step", "never killed", "until the kill", "resumed"), shown)),
    ]
    return page(title, body, rows_of_page), differences[worst]


if __name__ == "__main__":
    sys.exit(main())
