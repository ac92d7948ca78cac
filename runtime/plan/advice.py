"""What to think of a plan, in sentences."""

from __future__ import annotations

import dataclasses
from typing import Any

from ultramem.runtime.plan.dense_share import dense_share
from ultramem.runtime.plan.exchange import lookup_shape
from ultramem.runtime.plan.memory import dense_parameters, rank_memory, require_memory, total_bytes
from ultramem.runtime.plan.plan import PlacementPlan, Plan
from ultramem.runtime.plan.volumes import rows_at_home
from ultramem.runtime.profile.units import bytes_text, number_text, share_text, time_text

SECTOR_BYTES = 32
"""A GPU reads its memory in no smaller pieces."""
EXPOSED_SHARE = 0.1
"""Of a step, from which on waiting for the exchange is worth a word."""
PADDED = 1.1
"""Times the size of all dense weights, from which on padding is worth a word."""
FASTER = 0.95
"""Another placement is worth a word below this share of the chosen one's time."""


def advice_on(plan: Plan) -> tuple[str, ...]:
    """Sentences on what is short, what would be faster, and what the plan assumes."""
    found = (
        _memory(plan),
        _faster(plan),
        _narrow_columns(plan),
        _exposed(plan),
        _copies(plan),
        _padding(plan),
        _repeats(plan),
    )
    return tuple(each for each in found if each is not None)


def _memory(plan: Plan) -> str | None:
    needed, there = plan.chosen.memory_bytes, plan.device.memory_bytes
    if needed <= there:
        return f"A rank's memory suffices: {bytes_text(needed)} of {bytes_text(there)}."
    said = f"A rank's memory does not suffice: {bytes_text(needed)} of {bytes_text(there)}"
    changes: dict[str, dict[str, Any]] = {
        "activation checkpointing": {"activation_checkpointing": True},
        "row_adagrad": {"table_optimizer": "row_adagrad"},
        "bfloat16 tables": {"table_dtype": "bfloat16"},
        "half the tokens per rank": {"tokens_per_rank": plan.options.tokens_per_rank // 2},
    }
    enough = [
        f"{each.volume.label} ({bytes_text(each.memory_bytes)})"
        for each in plan.placements
        if each.refused is None and each.memory_bytes <= there
    ]
    if plan.chosen.volume.placement == "columns":
        del changes["row_adagrad"]
    for name, change in changes.items():
        if any(getattr(plan.options, field) == value for field, value in change.items()):
            continue
        try:
            options = dataclasses.replace(plan.options, **change)
            parts = rank_memory(plan.config, options, plan.chosen.volume.placement, plan.chosen.volume.pooling)
        except ValueError:  # half a sequence, or more distinct rows than half the tokens read
            continue
        if total_bytes(parts) <= there:
            enough.append(f"{name} ({bytes_text(total_bytes(parts))})")
    return f"{said}. " + (f"It would with {', or with '.join(enough)}." if enough else "No one change is enough.")


def _faster(plan: Plan) -> str | None:
    """Bytes decide, but not all links are alike."""

    def total_us(placement: PlacementPlan) -> float:
        return placement.time.total_us

    there = plan.device.memory_bytes
    possible = [each for each in plan.placements if each.refused is None and each.memory_bytes <= there]
    best = min(possible, key=total_us, default=plan.chosen)
    if total_us(best) >= FASTER * total_us(plan.chosen):
        return None
    return (
        f"By the model of time {best.volume.label} would be faster: {time_text(total_us(best))} a step, "
        f"{time_text(total_us(plan.chosen))} as chosen. All-to-alls are bound by each rank's own network link, "
        f"rings by those of a whole node."
    )


def _narrow_columns(plan: Plan) -> str | None:
    if plan.chosen.volume.placement != "columns":
        return None
    memory, size = require_memory(plan.config), 4 if plan.options.table_dtype == "float32" else 2
    wide = memory.value_dim // plan.options.table_ranks * size
    if wide >= SECTOR_BYTES:
        return None
    return (
        f"A rank's part of a row is {wide} bytes, and memory is read in pieces of {SECTOR_BYTES}: lookups read "
        f"{number_text(SECTOR_BYTES / wide)} times what they use. Fewer ranks to a table, or rows, avoid that."
    )


def _exposed(plan: Plan) -> str | None:
    time = plan.chosen.time
    share = time.exposed_exchange_us / time.total_us
    if share < EXPOSED_SHARE:
        return None
    waited = sum(each.sent_bytes for each in plan.chosen.volume.collectives if not each.travels)
    skips = sorted({each.target - each.source for each in plan.config.parsed_insertions})
    return (
        f"The exchange is in the open for {time_text(time.exposed_exchange_us)} a step, {share_text(share)} of it: "
        f"{bytes_text(waited)} of a lookup are waited for at once, and the rest has {' or '.join(map(str, skips))} "
        f"skipped layers to hide behind."
    )


def _copies(plan: Plan) -> str | None:
    time = plan.chosen.time
    share = (time.copies_us + time.dense_collectives_us) / time.total_us
    if share < EXPOSED_SHARE:
        return None
    said = (
        f"Around forward and backward a rank waits {time_text(time.dense_collectives_us)} for dense weights and "
        f"gradients and {time_text(time.copies_us)} for those of tables, {share_text(share)} of a step"
    )
    if plan.options.dense == "fsdp":
        return f"{said}. More tokens per rank make that a smaller share; gathering less than all at once is not there."
    return f"{said}. More tokens per rank make that a smaller share."


def _padding(plan: Plan) -> str | None:
    if plan.options.dense != "fsdp":
        return None
    dense = dense_parameters(plan.config)
    times = dense_share(plan.config, plan.options.ranks) * plan.options.ranks / dense
    if times < PADDED:
        return None
    return (
        f"FSDP pads the dense weights to {number_text(times)} times their size: some of them, as keys of few heads, "
        f"have no dimension that divides by {plan.options.ranks} ranks."
    )


def _repeats(plan: Plan) -> str | None:
    """What deduplication saves where reads are as the plan takes them."""
    if plan.chosen.volume.pooling != "home" or plan.distinct_rows is None:
        return None
    shape = lookup_shape(require_memory(plan.config), plan.options.tokens_per_rank)
    every = rows_at_home(shape, plan.options.table_ranks, plan.options.wire)
    saved = 1 - plan.chosen.volume.total_bytes / every.total_bytes
    source = "as given" if plan.options.distinct_rows is not None else "for rows chosen by chance; text repeats more"
    if (counted := plan.measured) is not None:
        source = (
            f"counted in {counted.batches} batches of {counted.text}: of {counted.reads:,} rows that a lookup reads, "
            f"{counted.distinct_rows:,} are different"
        )
    return f"Deduplication saves {share_text(saved)} of the bytes ({source})."
