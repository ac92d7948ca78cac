"""Families of small models that several files of tests look at."""

from dataclasses import replace

from ultramem import MemoryConfig


def as_pkm(memory: MemoryConfig) -> MemoryConfig:
    """The layer with the switches of product-key memories, whose rows are as wide as the model."""
    return replace(
        memory,
        value_dim=memory.hidden_size,
        rank=1,
        num_cores=1,
        expansion=1,
        permutation="none",
        conv_width=1,
        shared_query=False,
        qk_norm="none",
        score_function="softmax",
        output="none",
    )
