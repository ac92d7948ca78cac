"""The models that are measured: the paper's families at a size that a laptop holds, and their tiny twins.

Widths are chosen as Table 6 chooses them: nearly equal FLOPs per token, and about twelve times as many sparse
parameters as a dense model of the usual inner size has. At 100 MB of dense weights in float32 a step reads more than
caches hold.
"""

from __future__ import annotations

from dataclasses import replace

from ultramem.config import MemoryConfig, ModelConfig, MoEConfig
from ultramem.config.pkm import PKM_SWITCHES
from ultramem.presets import BYTE_VOCABULARY

CACHED_TOKENS = 16
"""In the cache of a measured step: few, because the caches of eager engines are copied at every step, which arithmetic
does not count."""

_DENSE = ModelConfig(
    vocab_size=BYTE_VOCABULARY, hidden_size=512, inner_size=2048, num_heads=8, num_layers=8, dropout=0.0
)
_ULTRAMEM = MemoryConfig(hidden_size=512, num_layers=8, value_dim=256, key_dim=128, knum=768)
_PKM = MemoryConfig(hidden_size=512, num_layers=8, value_dim=512, key_dim=288, knum=768, num_heads=6, **PKM_SWITCHES)
SMALL: dict[str, ModelConfig] = {
    "dense": replace(_DENSE, inner_size=2600),
    "moe": replace(_DENSE, inner_size=1288, moe=MoEConfig(num_experts=31)),
    "pkm": replace(_DENSE, memory=_PKM, insertions="4:4"),
    "ultramem": replace(_DENSE, memory=_ULTRAMEM, insertions="2:4/5:7"),
}

_TWIN_WIDTH = 64
_TWIN_SIDE = 16


def tiny_twin(config: ModelConfig) -> ModelConfig:
    """A model that calls the same operators at widths at which they have next to nothing to do."""
    memory = None if config.memory is None else tiny_memory(config.memory)
    return replace(config, hidden_size=_TWIN_WIDTH, inner_size=_TWIN_WIDTH, memory=memory)


def tiny_memory(memory: MemoryConfig) -> MemoryConfig:
    """Likewise of a memory layer."""
    value_dim = _TWIN_WIDTH if memory.output == "none" else _TWIN_WIDTH // 2
    return replace(memory, hidden_size=_TWIN_WIDTH, value_dim=value_dim, key_dim=8, knum=max(_TWIN_SIDE, memory.top_m))
