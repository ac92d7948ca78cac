"""Families of small models that several files of tests look at."""

from dataclasses import replace

from exported import DENSE, MEMORY

from ultramem import MemoryConfig, MoEConfig
from ultramem.config.pkm import PKM_SWITCHES

ONE_LAYER = replace(MEMORY, num_layers=1, permutation="none")  # a permutation is most of a compiler's time
BASE = replace(DENSE, hidden_size=32, inner_size=48, memory=ONE_LAYER, insertions="1:1")
PKM = replace(ONE_LAYER, rank=1, num_cores=1, expansion=1, conv_width=1, score_function="softmax")
FAMILIES = {
    "dense": DENSE,
    "moe": replace(DENSE, moe=MoEConfig(num_experts=4)),
    "pkm": replace(BASE, memory=PKM),
    "ultramem": BASE,
    "memory-plus": replace(BASE, memory=replace(PKM, table="shared", output="gated"), replace_mlp=True),
    "peer": replace(BASE, memory=replace(PKM, expert_dim=32), replace_mlp=True),
    "ultramem-v2": replace(BASE, memory=replace(ONE_LAYER, expert_dim=8, expert_project=True, table="windows")),
}


def as_pkm(memory: MemoryConfig) -> MemoryConfig:
    """The layer with the switches of product-key memories, whose rows are as wide as the model."""
    return replace(memory, value_dim=memory.hidden_size, **PKM_SWITCHES)
