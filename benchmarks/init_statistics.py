"""What each initialisation gives: mean kept score and output variance of fresh layers, over seeds, sizes, r and C.

    python -m benchmarks.init_statistics [--out FILE]

The aim, the paper's and ours: kept scores of mean 1 and an output variance of 1/(2L), an MLP's. Prints a table and one
JSON line, and writes the JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

import ultramem
from ultramem import MemoryConfig, UltraMemLayer
from ultramem.graph.init import kept_scores
from ultramem.runtime.run import environment

RESULT = Path(__file__).parent / "results" / "init_statistics.json"
SEEDS = 3
INITS = ("calibrated", "paper", "released")


def cases() -> dict[str, dict[str, Any]]:
    """Layers of the sizes that matter, as fields of MemoryConfig."""
    tiny = ultramem.preset("ultramem-tiny").memory
    assert tiny is not None
    base = {
        "hidden_size": tiny.hidden_size,
        "num_layers": tiny.num_layers,
        "value_dim": tiny.value_dim,
        "key_dim": tiny.key_dim,
        "knum": tiny.knum,
    }
    found = {
        f"tiny r={rank} C={cores}": base | {"rank": rank, "num_cores": cores}
        for rank, cores in ((1, 1), (2, 1), (2, 2), (2, 4), (3, 2), (4, 2))
    }
    found["tiny m=42"] = base | {"top_m": 42}
    found["d=512, n=800, L=12"] = {
        "hidden_size": 512, "num_layers": 12, "value_dim": 256, "key_dim": 128, "knum": 400,
    }  # fmt: skip
    return found


@torch.no_grad()
def measure(fields: dict[str, Any], init: str, seed: int) -> dict[str, float]:
    """Figures of one fresh layer, on other queries than those it was calibrated with."""
    torch.manual_seed(seed)
    layer = UltraMemLayer(MemoryConfig(**fields, init=init))
    summed_SHM = kept_scores(layer, samples=2048, seed=seed + 1).sum(-1)
    heads = summed_SHM.mean(dim=(0, 2))
    output = layer(torch.randn(8, 64, layer.config.hidden_size))
    return {
        "mean_score": summed_SHM.mean().item(),
        "score_ratio_between_heads": (heads.max() / heads.min()).item(),
        "output_variance_times_2L": output.var().item() * 2 * layer.config.num_layers,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    args = parser.parse_args(argv)
    rows = []
    print(f"{'case':<22}{'init':<12}{'mean kept score':>24}{'ratio of heads':>16}{'output variance * 2L':>26}")
    for name, fields in cases().items():
        for init in INITS:
            runs = [measure(fields, init, seed) for seed in range(SEEDS)]
            row: dict[str, Any] = {"case": name, "init": init, "seeds": SEEDS}
            for figure in runs[0]:
                values = [run[figure] for run in runs]
                row[figure] = {"min": min(values), "median": statistics.median(values), "max": max(values)}
                if not all(math.isfinite(value) for value in values):
                    raise SystemExit(f"{name}, {init}: {figure} is not finite")
            rows.append(row)
            texts = [
                f"{row[figure]['median']:.3g} ({row[figure]['min']:.3g} to {row[figure]['max']:.3g})"
                for figure in ("mean_score", "score_ratio_between_heads", "output_variance_times_2L")
            ]
            print(f"{name:<22}{init:<12}{texts[0]:>24}{texts[1].split()[0]:>16}{texts[2]:>26}", flush=True)
    document = {"rows": rows, "environment": environment()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
