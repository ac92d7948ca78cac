"""Dense, MoE, PKM and UltraMem on the same text: equal FLOPs, equal parameters of the sparse ones, three seeds.

Then UltraMem with one switch turned back at a time. Nothing is tuned for any of them: one learning rate, schedule and
budget for all, fixed beforehand. Every run is an `ultramem train` command with `--resume`: stop this program when you
like, start it again, and it goes on. `python docs/experiment/make_page.py` turns the runs into the page.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ultramem.runtime.run import RunFolder

FAMILIES = ("dense-tiny", "moe-tiny", "pkm-tiny", "ultramem-tiny")
SEEDS = 3
# What all runs have in common. 300 steps of 4 x 256 bytes; the values' learning rate is 10x and falls to 1x, as in the
# paper, wherever there are value tables.
TRAINING = (
    *("--data", "gutenberg", "--steps", "300", "--batch-size", "4", "--sequence-length", "256", "--lr", "2e-3"),
    *("--precision", "float32", "--eval-every", "100", "--eval-tokens", "8192", "--final-eval-tokens", "65536"),
    *("--checkpoint-every", "100", "--keep-checkpoints", "1"),
)
# UltraMem without one of its parts, with the sizes that go with it (half Dv: half the rows of twice the width and half
# the slots; the split: one layer with all rows and slots); TDQKR takes MCS with it, which needs cores. And both tails.
ABLATIONS: dict[str, tuple[str, ...]] = {
    "two-tailed": ("--set", "model.memory.candidates=two_tailed"),
    "no-half-vdim": (
        *("--set", "model.memory.value_dim=192", "--set", "model.memory.knum=112"),
        *("--set", "model.memory.top_m=8"),
    ),
    "no-split": (
        *("--set", "model.insertions=2:2", "--set", "model.memory.knum=223", "--set", "model.memory.top_m=32"),
    ),
    "no-ive": ("--set", "model.memory.expansion=1"),
    "no-tdqkr-mcs": ("--set", "model.memory.rank=1", "--set", "model.memory.num_cores=1"),
    "no-mcs": ("--set", "model.memory.num_cores=1"),
    "no-value-lr": ("--value-lr-ratio", "1"),
}


class Run(NamedTuple):
    """One training run."""

    name: str
    preset: str
    seed: int
    options: tuple[str, ...]

    @property
    def folder(self) -> str:
        return f"{self.name}-seed{self.seed}"


def runs(seeds: int) -> list[Run]:
    """The families first, then the ablations; one seed after the other, so that what is done is comparable."""
    families = [Run(name, name, seed, ()) for seed in range(seeds) for name in FAMILIES]
    ablations = [
        Run(name, "ultramem-tiny", seed, options) for seed in range(seeds) for name, options in ABLATIONS.items()
    ]
    return [*families, *ablations]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/experiment"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"(default: {SEEDS})")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--publish", type=Path, help="copy what the page is made from into this folder")
    parser.add_argument("options", nargs="*", help="further options of every run, after --")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "ultramem", "data", "get", "gutenberg"], check=True)
    write_record(args.out, args.seeds, tuple(args.options))
    pending = [run for run in runs(args.seeds) if not RunFolder(args.out / run.folder).weights.exists()]
    print(f"{len(runs(args.seeds)) - len(pending)} runs are done, {len(pending)} to do", flush=True)
    failed = train_all(pending, args.out, args.jobs, tuple(args.options))
    if args.publish is not None:
        publish(args.out, args.publish, args.seeds)
    return 1 if failed else 0


def write_record(out: Path, seeds: int, options: tuple[str, ...]) -> None:
    """experiment.json: what is compared, and the commit that each of the calls so far ran at."""
    path = out / "experiment.json"
    record = json.loads(path.read_text()) if path.exists() else {"commits": []}
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False).stdout
    record["commits"] = list(dict.fromkeys([*record["commits"], commit.strip() or "unknown"]))
    record |= {"seeds": seeds, "families": FAMILIES, "training": [*TRAINING, *options], "ablations": ABLATIONS}
    path.write_text(json.dumps(record, indent=1) + "\n")


def train_all(pending: list[Run], out: Path, jobs: int, options: tuple[str, ...]) -> list[Run]:
    """Train, `jobs` at a time; returns the runs that failed. Ctrl-C lets each save its work."""
    children: set[subprocess.Popen[bytes]] = set()
    stopping = threading.Event()

    def train(run: Run) -> bool:
        if stopping.is_set():
            return True
        command = [
            *(sys.executable, "-m", "ultramem", "train", "--preset", run.preset, "--out", str(out / run.folder)),
            *("--resume", "--seed", str(run.seed), *TRAINING, *run.options, *options),
        ]
        began = time.perf_counter()
        with (out / f"{run.folder}.log").open("ab") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            # A session of its own: Ctrl-C reaches it through us, once.
            child = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
            children.add(child)
            code = child.wait()
            children.discard(child)
        took = time.perf_counter() - began
        what = "done" if code == 0 else "stopped" if stopping.is_set() else f"FAILED, see {out / run.folder}.log"
        print(f"{run.folder}: {what} ({took:.0f} s)", flush=True)
        return code == 0 or stopping.is_set()

    with ThreadPoolExecutor(jobs) as pool, interrupting(children, stopping):
        results = list(pool.map(train, pending))
    if stopping.is_set():
        raise SystemExit("stopped; the same command goes on")
    return [run for run, good in zip(pending, results, strict=True) if not good]


@contextlib.contextmanager
def interrupting(children: set[subprocess.Popen[bytes]], stopping: threading.Event) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM are passed on to the children, and no further one is started."""

    def stop(signum: int, frame: object) -> None:
        stopping.set()
        for child in tuple(children):
            child.send_signal(signal.SIGINT)

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def publish(out: Path, target: Path, seeds: int) -> None:
    """Copy config.json and metrics.jsonl of every finished run to `target`."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out / "experiment.json", target / "experiment.json")
    for run in runs(seeds):
        folder = out / run.folder
        if RunFolder(folder).weights.exists():
            (target / run.folder).mkdir(parents=True, exist_ok=True)
            for name in ("config.json", "metrics.jsonl"):
                shutil.copyfile(folder / name, target / run.folder / name)


if __name__ == "__main__":
    sys.exit(main())
