"""One interface to a model, whatever runs it: prefill, decode, and a cache between them.

Shapes: B batch, S tokens of a prompt, P tokens in the cache, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ultramem.config import ModelConfig
from ultramem.export.program import empty_state, flat_inputs
from ultramem.runtime.engine_cache import EngineCache


class Engine(ABC):
    """Runs a model without gradients; tokens, masks and logits are on the CPU."""

    name: str
    state_dtype = torch.float32
    """Of the empty cache."""
    batch: int | None = None
    """The only number of sequences that it takes; None: any."""
    new_tokens: int | None = None
    """The only number of new tokens that it takes; None: any."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def prefill(self, input_ids_BS: Tensor, attention_mask_BS: Tensor | None = None) -> tuple[Tensor, EngineCache]:
        """Logits [B,S,V] of a prompt, and the cache to decode from.

        Args:
            input_ids_BS: int64 tokens, S at least 1.
            attention_mask_BS: 1 for tokens, 0 for padding; None: no padding.

        Raises:
            ValueError: a shape or dtype is not that, or a token is not in the vocabulary.
        """
        _check_tokens(input_ids_BS, self.config.vocab_size)
        if attention_mask_BS is None:
            attention_mask_BS = torch.ones_like(input_ids_BS)
        _check_mask(attention_mask_BS, tuple(input_ids_BS.shape))
        with torch.inference_mode():
            return self._prefill(input_ids_BS, attention_mask_BS.long())

    def decode(
        self, input_ids_B1: Tensor, cache: EngineCache, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, EngineCache]:
        """Logits [B,1,V] of one more token per sequence, and the cache with it.

        The cache that was passed stays valid. An engine that writes in place (compile) takes it as often as one likes,
        and refuses what came of it before.

        Args:
            input_ids_B1: int64 tokens.
            cache: of an earlier call.
            attention_mask: [B,P+1] in place of the mask so far; None: the new token is no padding.

        Raises:
            ValueError: a shape or dtype is not that, a token is not in the vocabulary, or the cache was overwritten.
        """
        batch, length = cache.mask_BP.shape
        _check_tokens(input_ids_B1, self.config.vocab_size)
        if input_ids_B1.shape != (batch, 1):
            raise ValueError(
                f"input_ids must have shape {(batch, 1)}, a token per sequence, got {tuple(input_ids_B1.shape)}"
            )
        if attention_mask is None:
            mask_BP = torch.cat([cache.mask_BP, cache.mask_BP.new_ones(batch, 1)], 1)
        else:
            _check_mask(attention_mask, (batch, length + 1 - cache.hidden))
            mask_BP = torch.cat([cache.mask_BP[:, : cache.hidden], attention_mask.long()], 1)
        with torch.inference_mode():
            return self._decode(input_ids_B1, mask_BP, cache)

    def _prefill(self, input_ids_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, EngineCache]:
        inputs = flat_inputs(input_ids_BS, mask_BS, empty_state(self.config, input_ids_BS.shape[0], self.state_dtype))
        logits_BSV, *state = self._run(inputs)
        return logits_BSV, EngineCache(mask_BS, tuple(state), 0)

    def _decode(self, input_ids_B1: Tensor, mask_BP: Tensor, cache: EngineCache) -> tuple[Tensor, EngineCache]:
        logits_B1V, *state = self._run(flat_inputs(input_ids_B1, mask_BP, cache.state))
        return logits_B1V, EngineCache(mask_BP, tuple(state), cache.hidden)

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of the keys and values that it keeps."""
        return self.state_dtype

    @abstractmethod
    def _run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The program of `ultramem.export`: flat inputs to flat outputs."""


def _check_tokens(input_ids: Tensor, vocab_size: int) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.dtype != torch.int64:
        raise ValueError(f"input_ids must be an int64 tensor, got {getattr(input_ids, 'dtype', type(input_ids))}")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must have shape [B,S] with at least one token, got {tuple(input_ids.shape)}")
    least, most = (int(each) for each in input_ids.aminmax())
    if least < 0 or most >= vocab_size:
        raise ValueError(f"input_ids must be tokens in 0..{vocab_size - 1}, got {least if least < 0 else most}")


def _check_mask(attention_mask: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(attention_mask.shape) != tuple(shape):
        raise ValueError(f"attention_mask must have shape {tuple(shape)}, got {tuple(attention_mask.shape)}")
