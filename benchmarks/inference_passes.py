"""What each pass for inference does: nodes of the graph, bytes of its constants, and microseconds of a step.

    python -m benchmarks.inference_passes [--out benchmarks/results/inference_passes.json]

"graph": the passes of an export, one after the other, on ultramem-tiny's decode step; its graph runs operator by
operator, as captured. "coarse_keys": the score and select stages at the paper's three sizes and a tiny one, with the
keys of every rank and with coarse ones. "values": the lookup and expand stages of a layer that has no
virtual blocks and rows of the model's width, with a projector and with projected rows.

Float32, one thread, whose time on the processor is what counts: other work on the machine takes none of it. Caches are
emptied before each call. Contenders take turns; medians with quartiles. Every result is within 4 times the error that
the unfolded model makes against float64, or nothing is reported. The last line is one JSON object.

Shapes: B batch, S sequence, D hidden size, T tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ultramem
from benchmarks.harness.document import publish
from benchmarks.selection_recall import provenance
from ultramem import MemoryConfig, UltraMemLayer
from ultramem.export.program import (
    FlatModel,
    PassRecord,
    Program,
    apply_pass,
    capture,
    constant_bytes,
    example_inputs,
    weights,
)
from ultramem.graph import fold_for_inference
from ultramem.graph.passes import fold_constants, remove_no_ops

NAME = "inference_passes"
SIZES = ("ultramem-tiny", "ultramem-151m-x12", "ultramem-680m-x12", "ultramem-1.6b-x12")
TOKENS = (1, 4, 16, 64, 256)
ROUNDS = 15
FACTOR = 4
"""Of the unfolded model's own error against float64."""
PAST = 128
FLUSH_BYTES = 2**27

Call = Callable[[], Any]


def times(calls: Mapping[str, Call], rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """Microseconds of processor time of each call: median and quartiles of interleaved rounds, after one to warm up."""
    flush = torch.zeros(FLUSH_BYTES // 4)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + 1):
        for name, call in calls.items():
            flush.add_(1)
            start = time.thread_time()
            call()
            if round_number:
                taken[name].append(1e6 * (time.thread_time() - start))
    return {
        name: dict(zip(("low_us", "median_us", "high_us"), statistics.quantiles(us, n=4), strict=True))
        for name, us in taken.items()
    }


def require_near(found: Tensor, unfolded: Tensor, exact: Tensor, what: str) -> None:
    """Raise unless `found` is as near to float64 as `unfolded`, FACTOR times at most: in the mean, since a slot that is
    kept or not is a leap."""
    error, own = (float((each.double() - exact).abs().mean()) for each in (found, unfolded))
    if not error <= FACTOR * own:
        raise RuntimeError(f"{what}: mean error {error:.3g}, the unfolded model's own is {own:.3g}")


class Stages(nn.Module):
    """The score and select stages of a layer."""

    def __init__(self, layer: UltraMemLayer) -> None:
        super().__init__()
        self.score, self.select = layer.score, layer.select

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        scores, addresses = self.select(*self.score(query))
        return scores, addresses


def measure_coarse_keys(name: str, config: MemoryConfig) -> list[dict[str, Any]]:
    layer = UltraMemLayer(replace(config, init="released"), own_table=False).eval()
    by_rank, coarse = (Stages(fold_for_inference(layer, coarse_keys=each)) for each in (False, True))
    exact = Stages(UltraMemLayer(layer.config, own_table=False).double().eval())
    exact.load_state_dict(Stages(layer).state_dict())
    key_bytes = 4 * config.num_heads * 2 * config.rank_key_dim
    candidates = config.rank * config.num_candidates
    records = []
    for tokens in TOKENS:
        query = layer.query.norm(torch.randn(tokens, *layer.query.shape))
        found = [stages(query)[0].sum(-1) for stages in (coarse, by_rank)]
        require_near(*found, exact(query.double())[0].sum(-1), f"{name}, {tokens} tokens")
        calls: dict[str, Call] = {"by_rank": lambda q=query: by_rank(q), "coarse": lambda q=query: coarse(q)}
        records.append(
            {
                "size": name,
                "tokens": tokens,
                "top_m": config.top_m,
                "keys_a_side": config.grid_side,
                "keys_held_bytes": {"by_rank": held(by_rank), "coarse": held(coarse)},
                "keys_read_bytes": {
                    "by_rank": key_bytes * config.rank * config.grid_side,
                    "coarse": key_bytes * (config.grid_side + tokens * candidates),
                },
                "nodes": {"by_rank": nodes(by_rank, query), "coarse": nodes(coarse, query)},
                **times(calls),
            }
        )
        print_case(f"{name}, {tokens} tokens", records[-1])
    return records


def held(stages: nn.Module) -> int:
    """Bytes of keys, each once."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in stages.buffers()}
    return sum(storages.values())


def nodes(stages: nn.Module, query: Tensor) -> int:
    return len(torch.export.export(stages, (query,)).graph.nodes)


def read(layer: UltraMemLayer, scores_THMC: Tensor, addresses_THM: Tensor, hidden_TD: Tensor) -> Tensor:
    """The lookup and expand stages of a layer with a table of its own."""
    assert layer.table is not None
    output_TD: Tensor = layer.expand(layer.lookup(scores_THMC, addresses_THM, hidden_TD, layer.table), hidden_TD)
    return output_TD


def measure_values() -> list[dict[str, Any]]:
    preset = ultramem.preset("ultramem-151m-x12").memory
    assert preset is not None
    config = replace(preset, expansion=1, value_dim=preset.hidden_size, num_cores=1, knum=256, init="released")
    layer = UltraMemLayer(config).eval()
    folded = fold_for_inference(layer, values=True)
    exact_layer = UltraMemLayer(config).double().eval()
    exact_layer.load_state_dict(layer.state_dict())
    records = []
    for tokens in TOKENS:
        hidden_BSD = torch.randn(1, tokens, config.hidden_size)
        hidden_TD = hidden_BSD.flatten(0, 1)
        kept = layer.select(*layer.score(layer.query(hidden_BSD)))
        exact = read(exact_layer, kept.scores.double(), kept.addresses, hidden_TD.double())
        found = [read(each, *kept, hidden_TD) for each in (folded, layer)]
        require_near(*found, exact, f"values, {tokens} tokens")
        calls: dict[str, Call] = {
            "projector": lambda k=kept, h=hidden_TD: read(layer, *k, h),
            "projected_rows": lambda k=kept, h=hidden_TD: read(folded, *k, h),
        }
        projector_bytes = layer.expand.weight.nbytes
        records.append({"tokens": tokens, "projector_bytes": projector_bytes, **times(calls)})
        print_case(f"values, {tokens} tokens", records[-1])
    return records


def measure_graph() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = ultramem.build_model(ultramem.preset("ultramem-tiny")).eval()
    inputs = list(example_inputs(model, batch=1, seq=1, past=PAST))
    inputs[0] = torch.tensor([[7]])
    inputs[3:] = [torch.randn_like(each) for each in inputs[3:]]
    raw = capture(model)
    simple = apply_pass(capture(model), remove_no_ops)
    programs = {"as captured": raw, "remove_no_ops": simple}
    again = apply_pass(capture(model), remove_no_ops)
    programs["fold_constants"] = apply_pass(
        again, lambda gm: fold_constants(gm, weights(again.exported)), name="fold_constants"
    )
    runs = {name: program.exported.module(check_guards=False) for name, program in programs.items()}
    eager = runs["as captured"](*inputs)[0]
    exact_model = ultramem.build_model(model.config).double().eval()
    exact_model.load_state_dict(model.state_dict())
    wide = [each.double() if each.is_floating_point() else each for each in inputs]
    exact = FlatModel(exact_model)(*wide)[0]
    for name, run in runs.items():
        require_near(run(*inputs)[0], eager, exact, name)
    taken = times({name: lambda run=run: run(*inputs) for name, run in runs.items()})
    return [{"pass": name, **record(programs[name]), **taken[name]} for name in programs]


def record(program: Program) -> dict[str, Any]:
    """Nodes and constants as the manifest of an export records them."""
    last: PassRecord | None = program.passes[-1] if program.passes else None
    if last is None:
        return {"nodes": len(program.exported.graph.nodes), "constant_bytes": constant_bytes(program.exported)}
    fields = dataclasses.asdict(last)
    return {"nodes": fields["nodes_after"], "constant_bytes": fields["constant_bytes_after"]}


def print_case(name: str, found: Mapping[str, Any]) -> None:
    medians = {key: value["median_us"] for key, value in found.items() if isinstance(value, dict) and "low_us" in value}
    print(f"{name:32}" + "  ".join(f"{key} {us:.0f} us" for key, us in medians.items()), flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    document: dict[str, Any] = {"benchmark": NAME, "environment": provenance(), "rounds": ROUNDS}
    with torch.no_grad():
        document["graph"] = measure_graph()
        document["values"] = measure_values()
        document["coarse_keys"] = []
        for name in SIZES:
            config = ultramem.preset(name).memory
            assert config is not None
            document["coarse_keys"] += measure_coarse_keys(name, config)
    publish(document, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
