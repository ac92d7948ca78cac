"""What a training step costs as the table grows: forward, backward and update of one memory layer, compiled.

    python -m benchmarks.table_step [--out benchmarks/results/table_step.json]
    python -m benchmarks.table_step --plot docs/table_step.svg [--out benchmarks/results/table_step.json]

The number of keys stays the same while the table grows, and the slots of a token are spread evenly over the whole
table, which is the hardest case for caches. What keys cost is timed apart: scores and selection of a layer whose grid
has the side that such a table needs, which grows with the root of its rows.

Every case runs in a process of its own, in rounds over all cases. Medians, with the quartiles beside them. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ultramem import MemoryConfig
from ultramem.graph import UltraMemLayer
from ultramem.graph.memory_layer import Lookup
from ultramem.optim import TableOptimizer, build_optimizers, clip_grad_norm_

ROWS = (2**14, 2**17, 2**20, 2**22)
TABLES = ("row_adagrad", "lazy_adamw", "adamw")
DENSE_ROWS_LIMIT = 2**20  # a dense step at 2^22 rows needs 4.3 GB and minutes
HIDDEN, VALUE_DIM, TOKENS, HEADS, TOP_M, EXPANSION = 256, 64, 1024, 2, 16, 4
KNUM = 64  # 128 keys a side, whatever the table
WARM_UP, STEPS = 3, 9
RESULT = Path(__file__).parent / "results" / "table_step.json"


def memory_config(knum: int) -> MemoryConfig:
    return MemoryConfig(
        hidden_size=HIDDEN,
        num_layers=2,
        value_dim=VALUE_DIM,
        key_dim=64,
        knum=knum,
        num_heads=HEADS,
        top_m=TOP_M,
        expansion=EXPANSION,
    )


class SpreadLookup(Lookup):
    """The slots of a token at places of the whole table, drawn anew in every step."""

    def __init__(self, config: MemoryConfig, rows: int) -> None:
        super().__init__(config)
        self.num_virtual = rows * config.expansion
        self.offset_TK = torch.zeros(TOKENS, config.num_slots, dtype=torch.int64)

    def draw(self, generator: torch.Generator) -> None:
        self.offset_TK.random_(0, self.num_virtual, generator=generator)

    def virtual_indices(self, addresses_TK: Tensor) -> Tensor:
        return (addresses_TK + self.offset_TK) % self.num_virtual


def layer_with_table(rows: int) -> UltraMemLayer:
    config = memory_config(KNUM)
    layer = UltraMemLayer(config)
    layer.lookup = SpreadLookup(config, rows)
    layer.table.values_NV = nn.Parameter(torch.empty(rows, VALUE_DIM).normal_(std=0.02))
    return layer


class Stepper:
    """One layer's training steps on random hidden states; `step` gives the seconds of its three parts."""

    def __init__(self, rows: int, tables: str, *, compiled: bool) -> None:
        torch.manual_seed(0)
        self.layer = layer_with_table(rows)
        self.optimizers = build_optimizers(self.layer, lr=1e-3, tables=tables)
        self.generator = torch.Generator().manual_seed(0)
        for optimizer in self.optimizers:
            if isinstance(optimizer, TableOptimizer):
                _make_resident(optimizer)

        def loss(hidden_BSD: Tensor) -> Tensor:
            return (self.layer(hidden_BSD) - hidden_BSD).square().mean() + self.layer.aux_loss()

        self.loss = torch.compile(loss, fullgraph=True) if compiled else loss
        self.last_loss = 0.0

    def step(self) -> dict[str, float]:
        hidden_BSD = torch.randn(2, TOKENS // 2, HIDDEN, generator=self.generator)
        self.layer.lookup.draw(self.generator)
        began = time.perf_counter()
        loss = self.loss(hidden_BSD)
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        clip_grad_norm_(self.layer.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ended = time.perf_counter()
        self.last_loss = loss.item()
        parts = {"forward": forward - began, "backward": backward - forward, "update": ended - backward}
        return parts | {"step": ended - began}


def _make_resident(optimizer: TableOptimizer) -> None:
    """As after long training: no page of the state is touched for the first time in a timed step."""
    for state in optimizer.state.values():
        for name, tensor in state.items():
            if name not in ("step", "schedule"):
                tensor.fill_(0)


def check() -> None:
    """Lazy AdamW's losses are dense AdamW's, in this very layer; raises if they are not."""
    losses = {}
    for tables in ("adamw", "lazy_adamw"):
        stepper = Stepper(2**17, tables, compiled=False)
        losses[tables] = []
        for _ in range(4):
            stepper.step()
            losses[tables].append(stepper.last_loss)
    torch.testing.assert_close(torch.tensor(losses["lazy_adamw"]), torch.tensor(losses["adamw"]), rtol=1e-5, atol=0)


def time_step(rows: int, tables: str) -> list[dict[str, float]]:
    stepper = Stepper(rows, tables, compiled=True)
    return [stepper.step() for _ in range(WARM_UP + STEPS)][WARM_UP:]


def time_keys(rows: int) -> list[dict[str, float]]:
    """Scores and selection, forward and backward, of the grid that reaches `rows` physical rows."""
    torch.manual_seed(0)
    config = memory_config(round(rows**0.5))
    with torch.device("meta"):
        stages = UltraMemLayer(config)
    score, select = stages.score.to_empty(device="cpu"), stages.select.to_empty(device="cpu")
    for parameter in (*score.parameters(), *select.parameters()):
        nn.init.normal_(parameter)

    def loss(query: Tensor) -> Tensor:
        return select(*score(query)).scores.square().mean()

    compiled = torch.compile(loss, fullgraph=True)
    times = []
    for _ in range(WARM_UP + STEPS):
        query = torch.randn(TOKENS, 2, config.rank_key_dim, requires_grad=True)
        began = time.perf_counter()
        compiled(query).backward()
        times.append({"keys": time.perf_counter() - began})
    return times[WARM_UP:]


def run_case(case: str) -> None:
    """In a child process: print the times of one case as JSON."""
    tables, rows = case.split(":")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    times = time_keys(int(rows)) if tables == "keys" else time_step(int(rows), tables)
    print(json.dumps(times))


def cases() -> list[str]:
    steps = [f"{t}:{n}" for n in ROWS for t in TABLES if t != "adamw" or n <= DENSE_ROWS_LIMIT]
    return steps + [f"keys:{n}" for n in ROWS]


def measure(rounds: int) -> dict[str, Any]:
    check()
    times: dict[str, list[dict[str, float]]] = defaultdict(list)
    for number in range(rounds):
        for case in cases():
            command = [sys.executable, "-m", "benchmarks.table_step", "--case", case]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                sys.exit(f"{case} failed:\n{run.stderr}")
            times[case] += json.loads(run.stdout.splitlines()[-1])
            print(f"round {number + 1} of {rounds}: {case}", flush=True)
    rows = []
    for case, samples in times.items():
        tables, n = case.split(":")
        row: dict[str, Any] = {"tables": tables, "rows": int(n)}
        for part in samples[0]:
            quartiles = statistics.quantiles([1e3 * sample[part] for sample in samples], n=4)
            row[f"{part}_ms"], row[f"{part}_quartiles_ms"] = (
                round(quartiles[1], 2),
                [round(q, 2) for q in quartiles[::2]],
            )
        rows.append(row)
    return {"benchmark": "table_step", **_setting(rounds), "results": rows, "ratio_2^22_to_2^17": _ratios(rows)}


def _setting(rounds: int) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "shape": {
            "tokens": TOKENS,
            "hidden": HIDDEN,
            "value_dim": VALUE_DIM,
            "slots": HEADS * TOP_M,
            "keys_a_side": 128,
        },
        "samples": f"{rounds} rounds of {STEPS} steps, each case in its own process",
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    step = {(row["tables"], row["rows"]): row["step_ms"] for row in rows if "step_ms" in row}
    return {t: round(step[t, 2**22] / step[t, 2**17], 2) for t in TABLES if (t, 2**22) in step}


def table_of(result: dict[str, Any]) -> str:
    lines = ["tables            rows   step ms (quartiles)      forward  backward   update"]
    for row in result["results"]:
        part = "keys" if row["tables"] == "keys" else "step"
        low, high = row[f"{part}_quartiles_ms"]
        line = f"{row['tables']:12} {row['rows']:9}  {row[f'{part}_ms']:8.1f} ({low:.1f}-{high:.1f})"
        if part == "step":
            line = f"{line:46} {row['forward_ms']:8.1f}  {row['backward_ms']:8.1f} {row['update_ms']:8.1f}"
        lines.append(line)
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'ultramem[plot]'") from error
    labels = {"adamw": "dense AdamW", "lazy_adamw": "LazyAdamW", "row_adagrad": "RowAdagrad", "keys": "keys alone"}
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for tables, label in labels.items():
        rows = [row for row in result["results"] if row["tables"] == tables]
        part = "keys" if tables == "keys" else "step"
        median = [row[f"{part}_ms"] for row in rows]
        low, high = zip(*(row[f"{part}_quartiles_ms"] for row in rows), strict=True)
        style = "--" if tables == "keys" else "-"
        (line,) = axes.plot([row["rows"] for row in rows], median, style, marker="o", label=label)
        axes.fill_between([row["rows"] for row in rows], low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("rows of the table")
    axes.set_ylabel("ms (median, quartiles)")
    axes.set_title(f"One training step of a memory layer, {TOKENS} tokens")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "table_step"  # the same file from the same numbers
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT, help="the result file, written or (with --plot) read")
    parser.add_argument("--plot", type=Path, help="draw the result file into this file and measure nothing")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="kept in the result: what else should be known of the machine")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        run_case(arguments.case)
    elif arguments.plot:
        plot(json.loads(arguments.out.read_text()), arguments.plot)
    else:
        result = measure(arguments.rounds) | {"note": arguments.note}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(table_of(result))
        print(json.dumps(result))


if __name__ == "__main__":
    main()
