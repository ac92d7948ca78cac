"""The models of the paper's tables as data, and sizes of every family that train on a laptop."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ultramem.ablations import AblationSizes, ablation_rows
from ultramem.config import MemoryConfig, ModelConfig, MoEConfig
from ultramem.config.pkm import PKM_SWITCHES

PAPER_VOCABULARY = 50432  # GPT-NeoX's tokenizer, Appendix E
BYTE_VOCABULARY = 257  # 256 bytes and an end-of-text token


def _dense(hidden_size: int, heads: int, layers: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=PAPER_VOCABULARY,
        hidden_size=hidden_size,
        inner_size=4 * hidden_size,
        num_heads=heads,
        num_layers=layers,
    )


def _moe(dense: ModelConfig, *, inner_size: int, experts: int) -> ModelConfig:
    return replace(dense, inner_size=inner_size, moe=MoEConfig(num_experts=experts))


def _pkm(dense: ModelConfig, *, top_m: int, heads: int, key_dim: int, knum: int, insertions: str) -> ModelConfig:
    memory = MemoryConfig(
        hidden_size=dense.hidden_size,
        num_layers=dense.num_layers,
        value_dim=dense.hidden_size,
        key_dim=key_dim,
        knum=knum,
        num_heads=heads,
        top_m=top_m,
        **PKM_SWITCHES,
    )
    return replace(dense, memory=memory, insertions=insertions)


def _ultramem(dense: ModelConfig, *, top_m: int, key_dim: int, knum: int, insertions: str) -> ModelConfig:
    memory = MemoryConfig(
        hidden_size=dense.hidden_size,
        num_layers=dense.num_layers,
        value_dim=dense.hidden_size // 2,
        key_dim=key_dim,
        knum=knum,
        top_m=top_m,
    )
    return replace(dense, memory=memory, insertions=insertions)


_151M, _680M, _1_6B = _dense(1024, 16, 12), _dense(1536, 16, 24), _dense(2048, 16, 32)
_SKIPS_680M = "3:7/8:12/13:17/18:22"
_SKIPS_1_6B = f"{_SKIPS_680M}/23:27/28:32"

_TABLE_6: dict[str, ModelConfig] = {
    "dense-151m": _151M,
    "dense-680m": _680M,
    "dense-1.6b": _1_6B,
    "dense-6.5b": _dense(4096, 32, 32),
    "moe-151m-2in32": _moe(_151M, inner_size=2528, experts=32),
    "moe-680m-2in33": _moe(_680M, inner_size=3584, experts=33),
    "moe-1.6b-2in34": _moe(_1_6B, inner_size=4672, experts=34),
    "pkm-151m-x12": _pkm(_151M, top_m=16, heads=6, key_dim=512, knum=1347, insertions="6:6"),
    "pkm-680m-x12": _pkm(_680M, top_m=35, heads=8, key_dim=768, knum=2308, insertions="12:12"),
    # The paper prints knum 1792 here, which cannot give its 21.13 B parameters; 3088 does.
    "pkm-1.6b-x12": _pkm(_1_6B, top_m=42, heads=12, key_dim=896, knum=3088, insertions="16:16"),
    "ultramem-151m-x12": _ultramem(_151M, top_m=16, key_dim=256, knum=1100, insertions="3:5/6:8/9:11"),
    "ultramem-680m-x12": _ultramem(_680M, top_m=35, key_dim=384, knum=1632, insertions=_SKIPS_680M),
    "ultramem-1.6b-x12": _ultramem(_1_6B, top_m=42, key_dim=448, knum=1792, insertions=_SKIPS_1_6B),
}

# The tiny models have equal FLOPs per token, and the sparse ones equal parameters (tests/test_presets.py): widths of
# MLPs are what gives way. Without dropout: they see less than one epoch of their text.
_TINY = ModelConfig(vocab_size=BYTE_VOCABULARY, hidden_size=192, inner_size=768, num_heads=6, num_layers=4, dropout=0.0)
_TINY_KNUM = 158
_ULTRAMEM_TINY = _ultramem(_TINY, top_m=16, key_dim=48, knum=_TINY_KNUM, insertions="1:2/3:4")
_PKM_TINY = _pkm(replace(_TINY, inner_size=872), top_m=16, heads=4, key_dim=96, knum=_TINY_KNUM, insertions="2:2")


def _memory_plus_tiny() -> ModelConfig:
    """Two MLPs replaced by layers that share a table."""
    assert _PKM_TINY.memory is not None
    memory = replace(_PKM_TINY.memory, key_dim=64, table="shared", output="gated", top_m=16, init="memory_plus")
    return replace(_PKM_TINY, inner_size=1408, memory=memory, insertions="2:2/4:4", replace_mlp=True)


def _peer_tiny() -> ModelConfig:
    """One MLP replaced by one-neuron experts."""
    assert _PKM_TINY.memory is not None
    memory = replace(_PKM_TINY.memory, key_dim=64, knum=112, expert_dim=192, qk_norm="layer")
    return replace(_PKM_TINY, inner_size=1248, memory=memory, insertions="2:2", replace_mlp=True)


def _ultramem_v2_tiny() -> ModelConfig:
    """A memory layer in every block, on windows of one table."""
    assert _ULTRAMEM_TINY.memory is not None
    memory = replace(
        _ULTRAMEM_TINY.memory,
        key_dim=32,
        knum=91,
        top_m=8,
        expert_dim=48,
        expert_project=True,
        table="windows",
        table_layers=4,
        window_share=0.5,
    )
    return replace(_ULTRAMEM_TINY, inner_size=624, memory=memory, insertions="1:1/2:2/3:3/4:4")


_TINY_FAMILIES: dict[str, ModelConfig] = {
    "dense-tiny": replace(_TINY, inner_size=1048),
    "moe-tiny": _moe(_TINY, inner_size=520, experts=8),
    "pkm-tiny": _PKM_TINY,
    "ultramem-tiny": _ULTRAMEM_TINY,
    "memory-plus-tiny": _memory_plus_tiny(),
    "peer-tiny": _peer_tiny(),
    "ultramem-v2-tiny": _ultramem_v2_tiny(),
}

_ABLATIONS = {
    "151m": AblationSizes(
        dense=_151M,
        layer="6:6",
        knum=1224,
        half_knum=1728,
        top_m=12,
        key_dim=2448,
        split_layers="3:5/6:8/9:11",
        split_knum=1000,
        split_whole_knum=707,
        split_top_m=6,
        split_key_dim=500,
        rank_3_key_dim=501,
    ),
    "tiny": AblationSizes(
        dense=_TINY,
        layer="2:2",
        knum=_TINY_KNUM,
        half_knum=223,
        top_m=16,
        key_dim=144,
        split_layers="1:2/3:4",
        split_knum=_TINY_KNUM,
        split_whole_knum=112,
        split_top_m=16,
        split_key_dim=48,
        rank_3_key_dim=48,
    ),
}
_ABLATION_ROWS = {
    f"ablation-{row.name}-{size}": row for size, sizes in _ABLATIONS.items() for row in ablation_rows(sizes)
}

_PRESETS: dict[str, ModelConfig] = {
    **_TABLE_6,
    **_TINY_FAMILIES,
    **{name: row.model for name, row in _ABLATION_ROWS.items()},
}


def presets() -> tuple[str, ...]:
    """The names that `preset` takes: Table 6, every family tiny, and "ablation-ROW-SIZE" for Tables 2, 3 and 8."""
    return tuple(_PRESETS)


def preset(name: str) -> ModelConfig:
    """The configuration called `name`.

    Raises:
        ValueError: no preset has that name; the message lists those there are.
    """
    if name not in _PRESETS:
        close = difflib.get_close_matches(str(name), _PRESETS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"preset must be one of {', '.join(_PRESETS)}, got {name!r}{hint}")
    return _PRESETS[name]


def preset_training(name: str) -> Mapping[str, Any]:
    """Fields of `TrainConfig` that the preset fixes: the value learning rate, in ablation rows before its decay.

    Raises:
        ValueError: no preset has that name.
    """
    preset(name)
    return _ABLATION_ROWS[name].training if name in _ABLATION_ROWS else {}
