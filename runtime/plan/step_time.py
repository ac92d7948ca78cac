"""Time of one training step on many ranks, by a stated model.

A stage of a forward takes the longer of its FLOPs at the device's rate of large products and its bytes at that of its
memory (`runtime/profile/arithmetic.py` counts both); its backward takes twice that, and with checkpointing attention
and MLPs run forward once more. The optimiser moves its numbers through memory: weights read and written, the gradient
read, and what state there is read and written. A collective takes its latency and its bytes at the links' line rate
(`plan_devices.collective_us`).

What is hidden: rows, or what was pooled of them, travel beside the layers that their memory layer skips: for "3:5" the
MLP of layer 3 and all of layers 4 and 5, and in the backward their backwards. Where nothing is skipped that is the MLP
of the layer itself; without `overlap` it is nothing. All else that a lookup sends (numbers, scores, the gradients of
scores) is waited for. So are, as training has them, the collectives around forward and backward: with FSDP all dense
weights are gathered before each forward, in float32, and gradients scattered after the last backward; copies add up
their gradients after it, dense ones in pieces of 32 MiB, those of tables table by table.

So this is a floor: kernels reach their roofs, links their line rate, no rank waits for another, and nothing but the
above takes time. It compares placements better than it foretells a training run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ultramem.config import ModelConfig
from ultramem.config.model import Insertion
from ultramem.runtime.plan.dense_share import dense_share
from ultramem.runtime.plan.exchange import Collective, Phase, Placement, Volume
from ultramem.runtime.plan.memory import dense_parameters, num_tables, table_share
from ultramem.runtime.plan.options import TABLE_BYTES, PlanOptions
from ultramem.runtime.plan.plan_devices import PlanDevice, collective_us
from ultramem.runtime.plan.volumes import others_share
from ultramem.runtime.profile.arithmetic import MEMORY_STAGES, stage_costs

BUCKET_BYTES = 32 * 2**20
"""Of dense gradients that are added up at once, as `runtime/distributed/gradients.py` does."""
BACKWARD = 2
"""Times a forward: a product for the gradient of each of its inputs."""


class StepTime(NamedTuple):
    """Where a step's time goes."""

    dense_us: float
    """Attention, MLP, head and the rest, forward and backward."""
    memory_us: float
    """Memory layers, forward and backward, exchanges apart."""
    optimizer_us: float
    exchange_us: float
    """Of tables, forward and backward, hidden or not."""
    exposed_exchange_us: float
    """What of it nothing hides."""
    copies_us: float
    """Of adding up the gradients of tables, or parts of them, that several ranks have; nothing hides it."""
    dense_collectives_us: float
    """Of all that is no table; nothing hides it."""

    @property
    def total_us(self) -> float:
        compute = self.dense_us + self.memory_us + self.optimizer_us
        return compute + self.exposed_exchange_us + self.copies_us + self.dense_collectives_us


def step_time(
    config: ModelConfig, options: PlanOptions, device: PlanDevice, volume: Volume, copies: Sequence[Collective] = ()
) -> StepTime:
    """Of one step of `options.accumulate` forwards and backwards on each rank.

    Args:
        config: of a model with memory layers.
        options: of the plan.
        device: that every rank is.
        volume: what one lookup sends, in the placement that it names.
        copies: that add up the gradients of one table, once a step.
    """
    costs = {
        each.stage: 1e6 * max(each.total_bytes / device.bytes_per_second, each.flops / device.flops_per_second)
        for each in stage_costs(
            config,
            batch=options.tokens_per_rank // options.sequence_length,
            new_tokens=options.sequence_length,
            element_bytes=options.element_bytes,
        )
    }
    memory_us = sum(costs[stage] for stage in MEMORY_STAGES)
    dense_us = sum(time for stage, time in costs.items() if stage not in MEMORY_STAGES)
    passes = options.accumulate * (1 + BACKWARD)
    again_us = costs["attention"] + costs["mlp"] if options.activation_checkpointing else 0.0
    optimizer_us = 1e6 * optimizer_bytes(config, options, volume.placement) / device.bytes_per_second
    exchange = _exchange(config, options, device, volume, costs)
    group = options.everybody if volume.placement == "replicate" else options.copy_group
    copies_us = sum(collective_us(each.kind, each.sent_bytes, group, device.links) for each in copies)
    return StepTime(
        dense_us=passes * dense_us + options.accumulate * again_us,
        memory_us=passes * memory_us,
        optimizer_us=optimizer_us,
        exchange_us=exchange.all_us,
        exposed_exchange_us=exchange.exposed_us,
        copies_us=num_tables(config) * copies_us,
        dense_collectives_us=_dense_collectives_us(config, options, device),
    )


def optimizer_bytes(config: ModelConfig, options: PlanOptions, placement: Placement) -> float:
    """That the optimisers of a rank move through memory in a step."""
    share, size = table_share(config, options, placement), TABLE_BYTES[options.table_dtype]
    tables = {
        "adamw": 7 * size * share.numbers,
        "lazy_adamw": (3 * size + 16) * share.touched_numbers,
        "row_adagrad": 3 * size * share.touched_numbers,
    }[options.table_optimizer]
    dense = dense_share(config, options.ranks) if options.dense == "fsdp" else dense_parameters(config)
    return 28 * dense + tables


class _Collectives(NamedTuple):
    """Time of a step's collectives of one sort."""

    all_us: float
    exposed_us: float


def _exchange(
    config: ModelConfig, options: PlanOptions, device: PlanDevice, volume: Volume, costs: dict[str, float]
) -> _Collectives:
    """Of all tables."""
    if volume.placement == "replicate":
        return _Collectives(0.0, 0.0)

    def time_us(phase: Phase, *, travels: bool) -> float:
        return sum(
            collective_us(each.kind, each.sent_bytes, options.table_group, device.links)
            for each in volume.collectives
            if (each.phase, each.travels) == (phase, travels)
        )

    forward_us, backward_us = time_us("forward", travels=True), time_us("backward", travels=True)
    waited_us = time_us("forward", travels=False) + time_us("backward", travels=False)
    exposed_us = 0.0
    for insertion in config.parsed_insertions:
        room_us = _window_us(config, insertion, costs) if options.overlap else 0.0
        exposed_us += waited_us + max(0.0, forward_us - room_us) + max(0.0, backward_us - BACKWARD * room_us)
    lookups = options.accumulate * len(config.parsed_insertions)
    return _Collectives(lookups * (waited_us + forward_us + backward_us), options.accumulate * exposed_us)


def _window_us(config: ModelConfig, insertion: Insertion, costs: dict[str, float]) -> float:
    """Forward of what runs between the place where a memory layer reads and the one where it is added."""
    mlps = [number for number in range(1, config.num_layers + 1) if number not in config.layers_without_mlp]
    skipped_mlps = sum(insertion.source <= number <= insertion.target for number in mlps)
    attention_us = costs["attention"] / config.num_layers
    return (insertion.target - insertion.source) * attention_us + skipped_mlps * costs["mlp"] / max(1, len(mlps))


def _dense_collectives_us(config: ModelConfig, options: PlanOptions, device: PlanDevice) -> float:
    """Of all that is no table."""
    group, ranks = options.everybody, options.ranks
    if options.dense == "fsdp":
        sent = 4 * dense_share(config, ranks) * (ranks - 1)
        gather_us = collective_us("all_gather", sent, group, device.links)
        return options.accumulate * gather_us + collective_us("reduce_scatter", sent, group, device.links)
    size = 4 * dense_parameters(config)
    pieces = -(-size // BUCKET_BYTES)
    return pieces * collective_us("all_reduce", -(-2 * others_share(size, ranks) // pieces), group, device.links)
