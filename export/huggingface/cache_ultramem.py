"""What decoding keeps: keys and values of each block, and the last inputs of memory layers with a convolution.

Shapes: B batch, S new tokens, D hidden size, W convolution width.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from .configuration_ultramem import UltraMemConfig


class UltraMemCacheLayer(DynamicLayer):
    """Of one block. `inputs_BSD` holds the last W-1 inputs of its memory layers, zeros where there were none."""

    def __init__(self, conv_length: int = 0) -> None:
        super().__init__()
        self.conv_length = conv_length
        self.inputs_BSD: Tensor | None = None
        self.record_past = False

    def update_inputs(self, inputs_BSD: Tensor) -> Tensor:
        """Append new inputs; returns them behind the W-1 before them, [B,W-1+S,D]."""
        if self.inputs_BSD is None:
            b, _, d = inputs_BSD.shape
            self.inputs_BSD = inputs_BSD.new_zeros(b, self.conv_length, d)
        joined_BSD = torch.cat([self.inputs_BSD, inputs_BSD], dim=1)
        self.inputs_BSD = joined_BSD if self.record_past else self._last(joined_BSD)
        return joined_BSD[:, joined_BSD.shape[1] - self.conv_length - inputs_BSD.shape[1] :]

    def _last(self, inputs_BSD: Tensor) -> Tensor:
        return inputs_BSD[:, inputs_BSD.shape[1] - self.conv_length :].clone()  # a view would keep all of them

    def activate_past_recording(self) -> None:
        """Keep all inputs until `crop`, which can then take tokens back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, and all inputs but the W-1 before what comes next."""
        if self.inputs_BSD is not None and self.inputs_BSD.shape[1] - abs(tokens_to_remove) < self.conv_length:
            raise RuntimeError(
                f"crop({tokens_to_remove}) needs inputs that are gone: call activate_past_recording() before"
            )
        super().crop(tokens_to_remove)
        if self.inputs_BSD is not None:
            self.inputs_BSD = self._last(self.inputs_BSD[:, : self.inputs_BSD.shape[1] - abs(tokens_to_remove)])

    def reset(self) -> None:
        super().reset()
        self.inputs_BSD = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.inputs_BSD is not None:
            self.inputs_BSD = self.inputs_BSD.index_select(0, beam_idx.to(self.inputs_BSD.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.inputs_BSD is not None:
            self.inputs_BSD = self.inputs_BSD.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.inputs_BSD is not None:
            self.inputs_BSD = self.inputs_BSD[indices]


class UltraMemCache(Cache):
    """A growing cache for the model of `config`; `generate` makes one by itself."""

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__(layers=[UltraMemCacheLayer(length) for length in config.conv_lengths])

    def update_inputs(self, inputs_BSD: Tensor, layer_idx: int) -> Tensor:
        """See `UltraMemCacheLayer.update_inputs`."""
        joined_BSD: Tensor = self.layers[layer_idx].update_inputs(inputs_BSD)
        return joined_BSD


__all__ = ["UltraMemCache", "UltraMemCacheLayer"]
