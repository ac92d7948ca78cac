"""The models of the paper's Table 6 as data, and sizes that train on a laptop."""

from __future__ import annotations

import difflib

from ultramem.config import MemoryConfig, ModelConfig

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


def _ultramem(
    hidden_size: int, heads: int, layers: int, *, top_m: int, key_dim: int, knum: int, insertions: str
) -> ModelConfig:
    memory = MemoryConfig(
        hidden_size=hidden_size,
        num_layers=layers,
        value_dim=hidden_size // 2,
        key_dim=key_dim,
        knum=knum,
        top_m=top_m,
    )
    return ModelConfig(
        vocab_size=PAPER_VOCABULARY,
        hidden_size=hidden_size,
        inner_size=4 * hidden_size,
        num_heads=heads,
        num_layers=layers,
        memory=memory,
        insertions=insertions,
    )


_680M = "3:7/8:12/13:17/18:22"

# Without dropout: the tiny models see less than one epoch of their text.
_TINY_MEMORY = MemoryConfig(hidden_size=192, num_layers=4, value_dim=96, key_dim=48, knum=96)
_ULTRAMEM_TINY = ModelConfig(
    vocab_size=BYTE_VOCABULARY,
    hidden_size=192,
    inner_size=768,
    num_heads=6,
    num_layers=4,
    dropout=0.0,
    memory=_TINY_MEMORY,
    insertions="1:2/3:4",
)
# The MLP is widened until the FLOPs of a token are those of ultramem-tiny (tests/graph/test_counts.py).
_DENSE_TINY = ModelConfig(
    vocab_size=BYTE_VOCABULARY, hidden_size=192, inner_size=992, num_heads=6, num_layers=4, dropout=0.0
)

_PRESETS: dict[str, ModelConfig] = {
    "dense-151m": _dense(1024, 16, 12),
    "dense-680m": _dense(1536, 16, 24),
    "dense-1.6b": _dense(2048, 16, 32),
    "dense-6.5b": _dense(4096, 32, 32),
    "ultramem-151m-x12": _ultramem(1024, 16, 12, top_m=16, key_dim=256, knum=1100, insertions="3:5/6:8/9:11"),
    "ultramem-680m-x12": _ultramem(1536, 16, 24, top_m=35, key_dim=384, knum=1632, insertions=_680M),
    "ultramem-1.6b-x12": _ultramem(2048, 16, 32, top_m=42, key_dim=448, knum=1792, insertions=f"{_680M}/23:27/28:32"),
    "dense-tiny": _DENSE_TINY,
    "ultramem-tiny": _ULTRAMEM_TINY,
}


def presets() -> tuple[str, ...]:
    """The names that `preset` takes."""
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
