"""The placement of a model's tables: what `choose_placement` asks, from the model and the options of a plan."""

from __future__ import annotations

from ultramem.config import ModelConfig
from ultramem.runtime.figures.expected import expected_distinct
from ultramem.runtime.plan.exchange import Placement, Pooling, Wire, lookup_shape
from ultramem.runtime.plan.exchange_memory import distinct_rows
from ultramem.runtime.plan.memory import num_tables, rank_memory, require_memory, table_parts
from ultramem.runtime.plan.options import PlanOptions
from ultramem.runtime.plan.placement import Choice, choose_placement

ROW_ADAGRAD: dict[Placement, str] = {
    "columns": "Columns are not possible: row_adagrad's accumulator of a row is a mean over all of its columns."
}


def choose_for_model(
    config: ModelConfig,
    options: PlanOptions,
    *,
    wire: Wire,
    memory_bytes: int | None,
    pool: Pooling | None = None,
) -> Choice:
    """The placement of the model's tables that sends the fewest bytes and fits.

    Args:
        config: of a model with memory layers.
        options: but for `placement`, which is not looked at.
        wire: bytes of what is sent.
        memory_bytes: of a rank; None: nobody knows, so that tables of several ranks are cut.
        pool: where rows are pooled, if that is settled.

    Raises:
        ValueError: the model has no table, or a number does not fit it.
    """
    memory = require_memory(config)
    shape = lookup_shape(memory, options.tokens_per_rank)
    lookups = options.accumulate * (len(config.parsed_insertions) // num_tables(config))
    touched = {
        ranks: round(expected_distinct(ranks * shape.reads * lookups, shape.table_rows))
        for ranks in (1, options.table_ranks)
        if options.table_optimizer != "adamw"
    }
    return choose_placement(
        shape,
        options.table_ranks,
        wire=wire,
        replica_bytes=sum(part.bytes for part in table_parts(config, options, "replicate")),
        free_bytes=None if memory_bytes is None else _free_bytes(config, options, memory_bytes),
        distinct_rows=distinct_rows(memory, options),
        copies=options.table_copies,
        touched_rows=touched.get(1),
        group_touched_rows=touched.get(options.table_ranks),
        lookups=lookups,
        pool=pool,
        ruled_out=ROW_ADAGRAD if options.table_optimizer == "row_adagrad" else None,
    )


def _free_bytes(config: ModelConfig, options: PlanOptions, memory_bytes: int) -> int:
    """Memory of a rank that all but tables leave over."""
    others = sum(part.bytes for part in rank_memory(config, options, "replicate") if not part.name.startswith("table"))
    return max(0, memory_bytes - others)
