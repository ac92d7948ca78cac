"""A model whose tables are mostly idle in any one step, and its training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import ultramem
from ultramem import MemoryConfig, ModelConfig
from ultramem.graph import Transformer
from ultramem.graph.value_table import ValueTable
from ultramem.optim import build_optimizers, clip_grad_norm_

VOCABULARY = 61


def build(
    dtype: torch.dtype = torch.float32, *, knum: int = 40, share_table: bool = False, experts: bool = False
) -> Transformer:
    torch.manual_seed(0)
    memory = MemoryConfig(
        hidden_size=32,
        num_layers=3,
        value_dim=16,
        key_dim=8,
        knum=knum,
        top_m=4,
        table="shared" if share_table else "own",
        expert_dim=32 if experts else 0,
    )
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        inner_size=48,
        num_heads=2,
        num_layers=3,
        dropout=0.0,
        memory=memory,
        insertions="1:2/3:3",
    )
    return ultramem.build_model(config).to(dtype)


def loss_of(model: Transformer) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        output = model(inputs)
        return F.cross_entropy(output.logits.flatten(0, 1), targets.flatten()) + output.aux_loss

    return loss


def batch(step: int, parts: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Inputs [1,8] and targets of a step: a fixed map of the vocabulary to itself."""
    mapping = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1000 + step)
    inputs = [torch.randint(VOCABULARY, (1, 8), generator=generator) for _ in range(parts)]
    return [(x, mapping[x]) for x in inputs]


def learning_rate(step: int) -> float:
    """Warm-up, then a slow fall: no two steps alike."""
    return 2e-3 * min(1.0, step / 10) * 0.99**step


def value_tables(model: Transformer) -> list[ValueTable]:
    return [module for module in model.modules() if isinstance(module, ValueTable)]


class Training:
    """A model with its optimisers; `run` takes steps and gives their losses, in float64."""

    def __init__(self, model: Transformer, *, loss: Any = None, parts: int = 1, max_norm: float = 1.0, **options: Any):
        self.model, self.parts, self.max_norm, self.done = model, parts, max_norm, 0
        self.optimizers = build_optimizers(model, lr=1e-3, **options)
        self.loss = loss or loss_of(model)

    def run(self, steps: int) -> Tensor:
        losses = []
        for _ in range(steps):
            self.done += 1
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(self.done) * (5 if group["name"] == "values" else 1)
            total = 0.0
            for inputs, targets in batch(self.done, self.parts):
                loss = self.loss(inputs, targets) / self.parts
                loss.backward()
                total += loss.item()
            clip_grad_norm_(self.model.parameters(), self.max_norm)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(total)
        return torch.tensor(losses, dtype=torch.float64)

    def tables(self) -> list[Tensor]:
        """The rows of every table."""
        return [p for table in value_tables(self.model) for p in table.parameters()]
