"""What FSDP gives each rank of the weights that are no tables."""

from __future__ import annotations

import functools

from ultramem.config import ModelConfig
from ultramem.graph import build_model
from ultramem.graph.value_table import ValueTable
from ultramem.runtime.distributed.sharded_loss import cut_dimension


@functools.lru_cache(maxsize=32)
def dense_share(config: ModelConfig, ranks: int) -> int:
    """Numbers of a rank, padding included: the largest part of every weight, of a model that is not built.

    Args:
        config: of the model.
        ranks: that the weights are cut over.
    """
    model = build_model(config, device="meta")
    tables = {id(each) for module in model.modules() if isinstance(module, ValueTable) for each in module.parameters()}
    share = 0
    for parameter in model.parameters():
        if id(parameter) not in tables:
            length = parameter.shape[cut_dimension(parameter.shape, ranks)]
            share += -(-length // ranks) * (parameter.numel() // length)
    return share
