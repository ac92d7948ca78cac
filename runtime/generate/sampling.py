"""The choice of a token, outside of the engines, so that all of them agree."""

from __future__ import annotations

import torch
from torch import Tensor

from ultramem.runtime.generate.request import Request


class Sampler:
    """Chooses the tokens of one request, with random numbers of its own."""

    def __init__(self, request: Request) -> None:
        self.temperature = request.temperature
        self.top_p = request.top_p
        self.generator = torch.Generator().manual_seed(request.seed)

    def pick(self, logits_V: Tensor) -> int:
        """A token, of logits on the CPU.

        Raises:
            ValueError: a logit is not a number.
        """
        if torch.isnan(logits_V).any():
            raise ValueError("logits must be numbers, got NaN: the model's weights are damaged")
        if self.temperature == 0:
            return int(logits_V.argmax())
        probabilities_V = ((logits_V.double() - logits_V.max()) / self.temperature).softmax(-1)
        probabilities_V, order_V = probabilities_V.sort(descending=True, stable=True)
        before_V = probabilities_V.cumsum(-1) - probabilities_V
        kept_V = probabilities_V.where(before_V < self.top_p, 0.0)
        return int(order_V[torch.multinomial(kept_V, 1, generator=self.generator)])
