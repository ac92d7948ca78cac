"""Write docs/scaling.md and docs/scaling.svg, by arithmetic and from docs/deduplication.json.

python docs/make_scaling.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ultramem.config import ModelConfig, from_dict
from ultramem.presets import preset
from ultramem.runtime.plan import PAPER_WIRE, LookupShape, Wire, equal_value_dim, lookup_shape, rows_at_home
from ultramem.runtime.plan.figure_9 import crossing_ranks, figure_9
from ultramem.runtime.plan.options import PlanOptions
from ultramem.runtime.plan.plan import Plan, make_plan
from ultramem.runtime.plan.plan_devices import LINK_SOURCE, plan_device
from ultramem.runtime.profile.units import bytes_text, number_text, share_text, time_text

DOCS = Path(__file__).resolve().parent
NAME, DEVICE = "ultramem-1.6b-x12", "h100"
RANKS = (8, 64, 256, 1024)
DEDUPLICATED_RANKS = 8


def plan_for(ranks: int) -> Plan:
    """With the options that `ultramem plan` takes by default."""
    options = PlanOptions(ranks=ranks)
    return make_plan(NAME, preset(NAME), options, plan_device(DEVICE, options))


def picture() -> str:
    """Figure 9, at 64 ranks."""
    return figure_9(plan_for(64))


def page() -> str:
    """The whole page."""
    memory = preset(NAME).memory
    assert memory is not None
    shape = lookup_shape(memory, PlanOptions(ranks=1).tokens_per_rank)
    paper = LookupShape(tokens=shape.tokens, slots=shape.slots, value_dim=shape.value_dim, table_rows=shape.table_rows)
    papers, ours = (
        equal_value_dim(paper, 64, PAPER_WIRE),
        equal_value_dim(shape, 64, Wire(count_bytes=0), training=True),
    )
    assert papers is not None
    assert ours is not None
    crossings = (
        crossing_ranks(paper, PAPER_WIRE, training=False),
        crossing_ranks(shape, Wire(count_bytes=0), training=True),
    )
    plans = {ranks: plan_for(ranks) for ranks in RANKS}
    return f"""# Tables over many ranks

Written by `python docs/make_scaling.py`, by arithmetic but for what text repeats; `ultramem plan` says the same of any
preset, number of ranks and device. What is counted, and how, stands at the top of `volumes.py` (bytes), `memory.py`,
`activations.py` and `step_time.py` in `runtime/plan`.

## Rows or columns: the paper's Figure 9

![Which of rows and columns sends less, by ranks and value dim](scaling.svg)

A table that is cut by rows sends rows to the tokens that read them: `K` rows a token, however many ranks there are. Cut
by columns it sends the numbers and scores of all `K` slots to every rank, and gets pooled rows back, which are few. So
rows cost by their width, columns by the number of ranks, and there is a width at which both send the same. By the
paper's formulas (one score a slot, no virtual blocks, the forward alone) it is about 3 columns a rank: {papers:.0f} for
64 ranks where K = {shape.slots}. As {NAME} is trained, with {shape.cores} scores a slot, {shape.blocks} blocks and
gradients that go back the same way, it is {ours:.0f}. At its own width of {shape.value_dim}, columns send less up to
{_before(crossings[0])} ranks by the paper's formulas, and up to {_before(crossings[1])} as it is trained.

The paper's text says of its figure no more than "the relationship between P and v_dim for communication volume"; what
is drawn here is that relationship, from its formulas.

## {NAME} on H100s

{PlanOptions(ranks=1).tokens_per_rank:,} tokens a rank in one forward and backward, bfloat16 on the wire, deduplicated
rows, LazyAdamW on float32 tables, one copy of each, FSDP2 for all else. "Sent" is by one rank in a step, for all
{len(preset(NAME).parsed_insertions)} memory layers, forward and backward; its share to itself is not counted.

{_placement_table(plans)}

Copies of all tables, with gradients and the optimiser's state, take {bytes_text(_replica_bytes(plans[64]))} a rank:
more than an H100 or H200 has. Where columns do not divide by the ranks, rows are left, which few ranks best pool at the
owner. Deduplication is counted for rows chosen by chance, which hardly repeat among {shape.table_rows:,};
`--distinct-rows` takes what was seen, and `--run` counts it (below). Eight ranks of 80 GB are too few for so many
tokens each; the command says what would do. At 1024 no dimension of the keys divides by the ranks, so FSDP pads them,
and dense weights take their time.

## What deduplication saves on real text

{_deduplication()}

## What a step takes at least

{_time_table(plans)}

These are floors: products and memory at the rates that an H100 was measured to reach, links at their line rate,
nobody waiting for anybody ({LINK_SOURCE}). Rows, or what was pooled of them, travel beside the
{_skips(plans[64])} layers that their memory layer skips; for numbers and scores a lookup waits. Dense weights are
gathered before the forward and their gradients scattered after the backward, as training does. Bytes are not all that
counts: in an all-to-all between nodes each rank has its own network link, while in a ring the ranks of a node share
theirs. Where that turns the order of two placements, `ultramem plan` says so.

## How it is checked

Tests hold the formulas to the paper's, to the byte, and to the layers themselves: these run on a process group that
delivers nothing, of 8, 64 and 1024 ranks, and a dispatch mode counts what every collective would have sent
(`tests/runtime/test_plan_exchange.py`). Memory of weights and optimisers is held to that of models after a step,
activations to what autograd keeps. Times have been compared with nothing: no two GPUs were there.
"""


def _deduplication() -> str:
    found = json.loads((DOCS / "deduplication.json").read_text())
    ranks, wire = DEDUPLICATED_RANKS, PlanOptions(ranks=DEDUPLICATED_RANKS).wire
    trained = [
        f"{run['run']} ({run['table_rows']:,} rows of {run['value_dim']} a table, {run['slots']} slots a token, "
        f"{run['steps']} steps, {run['bits_per_byte']:.2f} bits per byte on held-out text)"
        for run in found["runs"]
    ]
    lines = [
        "| model | tokens a rank | rows read | different ones | by chance | sent once a slot | once a row | saved |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in found["runs"]:
        for count in run["counts"]:
            shape, rows, reads = _shape(run, count["tokens"]), count["distinct_rows"], count["reads"]
            every = rows_at_home(shape, ranks, wire).total_bytes
            once = rows_at_home(shape, ranks, wire, distinct_rows=rows).total_bytes
            saved = share_text(1 - once / every)
            lines.append(
                f"| {run['run']} | {count['tokens']:,} | {reads:,} | {rows:,} ({share_text(rows / reads)}) "
                f"| {count['by_chance']:,} | {bytes_text(every)} | {bytes_text(once)} | {saved} |"
            )
    batches = len(next(iter(found["runs"][0]["counts"][0]["lookups"].values())))
    text = found["runs"][0]["counts"][0]["text"]
    return f"""Models that were trained on the text "{text}", byte by byte:

{chr(10).join(f"- {each}" for each in trained)}

Rows are counted in {batches} batches drawn as training draws them (`python docs/measure_deduplication.py`), and the
mean is over lookups and batches. Bytes are what a rank sends for one lookup on {ranks} ranks, forward and backward,
rows pooled at home, bfloat16 on the wire.

{chr(10).join(lines)}

`ultramem plan --run RUN` does the same for a model of yours, and plans with it."""


def _shape(run: dict[str, Any], tokens: int) -> LookupShape:
    memory = from_dict(ModelConfig, run["model"]).memory
    assert memory is not None
    return lookup_shape(memory, tokens)


def _before(ranks: int | None) -> str:
    return "any number of" if ranks is None else str(ranks - 1)


def _skips(plan: Plan) -> str:
    skips = {each.target - each.source for each in plan.config.parsed_insertions}
    return " or ".join(str(each) for each in sorted(skips))


def _replica_bytes(plan: Plan) -> int:
    replicas = plan.placements[0]
    return sum(part.bytes for part in replicas.memory if part.name.startswith("table"))


def _placement_table(plans: dict[int, Plan]) -> str:
    lines = ["| ranks | columns send | rows, pooled at home | rows, pooled at owner | chosen | memory of a rank |"]
    lines.append("| ---: | ---: | ---: | ---: | --- | ---: |")
    for ranks, plan in plans.items():
        sent = {each.volume.label: bytes_text(each.step_bytes) for each in plan.placements}
        lines.append(
            f"| {ranks} | {sent['columns']} | {sent['rows, pooled at home']} | {sent['rows, pooled at owner']} "
            f"| {plan.chosen.volume.label} | {bytes_text(plan.chosen.memory_bytes)} of "
            f"{bytes_text(plan.device.memory_bytes)} |"
        )
    return "\n".join(lines)


def _time_table(plans: dict[int, Plan]) -> str:
    lines = ["| ranks | placement | computing | exchange | of it waited for | dense weights | step | tokens/s |"]
    lines.append("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for ranks, plan in plans.items():
        time = plan.chosen.time
        compute = time.dense_us + time.memory_us + time.optimizer_us
        tokens = ranks * plan.options.tokens_per_rank * plan.options.accumulate / time.total_us
        lines.append(
            f"| {ranks} | {plan.chosen.volume.label} | {time_text(compute)} | {time_text(time.exchange_us)} "
            f"| {time_text(time.exposed_exchange_us)} | {time_text(time.dense_collectives_us)} "
            f"| {time_text(time.total_us)} | {number_text(tokens)} M |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    (DOCS / "scaling.md").write_text(page())
    (DOCS / "scaling.svg").write_text(picture())
