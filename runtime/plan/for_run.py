"""The placement of a run that leaves it open: the choice of a plan, for the ranks and the memory that there are."""

from __future__ import annotations

from dataclasses import replace

from ultramem.config import ModelConfig, ParallelConfig, TrainConfig
from ultramem.runtime.plan.choose_for_model import choose_for_model
from ultramem.runtime.plan.exchange import Wire
from ultramem.runtime.plan.options import TABLE_BYTES, PlanOptions
from ultramem.runtime.plan.placement import Choice
from ultramem.runtime.profile.units import bytes_text


def settle_placement(
    model: ModelConfig,
    train: TrainConfig,
    parallel: ParallelConfig,
    *,
    ranks: int,
    memory_bytes: int | None,
    half: bool = False,
) -> tuple[ParallelConfig, list[str]]:
    """`parallel` with a placement and a pooling that are not "auto", and the reasons in sentences.

    Args:
        model: with memory layers.
        train: of the run.
        parallel: what was asked for; what is settled there stays.
        ranks: of the run.
        memory_bytes: of the rank that has least; None: nobody knows, so that tables are cut.
        half: activations are in 16 bits.

    Raises:
        ValueError: the model has no memory layers, or its tables fit no way that is left open.
    """
    choice = _choice(model, train, parallel, ranks, memory_bytes, half)
    if parallel.table_placement == "auto":
        # A placement by columns or a replica pools nowhere else: "home" is what is then not looked at.
        chosen = replace(parallel, table_placement=choice.placement, pool=choice.pooling or "home")
        return chosen, list(choice.reasons)
    if parallel.pool != "auto" or parallel.table_placement != "rows":
        return replace(parallel, pool="home" if parallel.pool == "auto" else parallel.pool), []
    sent = {each.volume.pooling: each.step_bytes for each in choice.candidates if each.volume.placement == "rows"}
    pool = min(sent, key=lambda each: sent[each])
    assert pool is not None
    said = ", ".join(f"at {each} {bytes_text(size)}" for each, size in sent.items())
    reason = f"Rows are pooled at {pool}: a rank sends a step and table {said}."
    return replace(parallel, pool=pool), [reason]


def _choice(
    model: ModelConfig, train: TrainConfig, parallel: ParallelConfig, ranks: int, memory_bytes: int | None, half: bool
) -> Choice:
    options = PlanOptions(
        ranks=ranks,
        ranks_per_node=ranks,  # bytes decide, not links
        tokens_per_rank=max(1, train.micro_batch_size // ranks) * train.sequence_length,
        accumulate=train.accumulate,
        sequence_length=train.sequence_length,
        dtype="bf16" if half else "fp32",
        table_copies=parallel.table_copies,
        dense=parallel.dense,
        table_optimizer=train.table_optimizer,
        table_dtype=train.table_dtype,
        deduplicate=parallel.deduplicate,
        activation_checkpointing=train.activation_checkpointing,
    )
    table = TABLE_BYTES[train.table_dtype]
    size, score = (2, 2) if parallel.exchange_dtype == "bfloat16" else (table, options.element_bytes)
    wire = Wire(
        row_bytes=size,
        score_bytes=score,
        gradient_bytes=size,
        score_gradient_bytes=score,
        replica_gradient_bytes=table,
    )
    return choose_for_model(
        model,
        options,
        wire=wire,
        memory_bytes=None if model.moe is not None else memory_bytes,  # what experts keep is not counted
        pool=None if parallel.pool == "auto" else parallel.pool,
    )
