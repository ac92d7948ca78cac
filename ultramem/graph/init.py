"""Initial weights: the paper's closed rule (section 3.2, Appendix A) and one that measures what the rule assumes.

Both aim at a mean kept score of 1 and an output variance of 1/(2L), an MLP's. The closed rule assumes independent
scores; with real keys and a random core the kept mean is far from 1, so the default measures it instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  # the name that everybody uses
from torch import Tensor, nn

from ultramem.config import MemoryConfig
from ultramem.graph.memory_output import GatedOutput, Project

if TYPE_CHECKING:
    from ultramem.graph.memory_layer import UltraMemLayer
    from ultramem.graph.value_table import ValueTable

SAMPLES = 512  # queries for the calibration: the mean kept score of a head is then known to about 1 %
_SEED = 20250
_RELEASED_STD = 0.02
_RELEASED_NORM_EXPONENT = -0.33


@torch.no_grad()
def init_memory_layer(layer: UltraMemLayer) -> None:
    """Draw the weights of `layer`; scales follow `config.init`. Does nothing on the meta device."""
    config, keys = layer.config, layer.score.keys_H2RNK
    if keys.is_meta:
        return
    init_linear(layer.query.proj)
    if layer.query.conv_DW is not None:  # identity: the last tap is the token itself
        layer.query.conv_DW.zero_()[:, -1] = 1
    if isinstance(layer.lookup.expert_query, nn.Linear):
        init_linear(layer.lookup.expert_query)
    if config.permutation == "stored":
        from ultramem.ops import address_table

        layer.lookup.address_table.copy_(address_table(layer.lookup.num_addresses, config.permutation_seed))
    _init_output(layer.expand)
    _init_scores(layer)
    if layer.table is not None:
        init_table(layer.table, [layer])


def _init_output(output: nn.Module) -> None:
    if isinstance(output, Project):
        nn.init.normal_(output.weight, std=output.weight.shape[1] ** -0.5)
        if output.block_bias_ED is not None:
            nn.init.zeros_(output.block_bias_ED)
    elif isinstance(output, GatedOutput):
        for linear in (output.gate, output.out):
            init_linear(linear)
            nn.init.zeros_(linear.bias)


def _init_scores(layer: UltraMemLayer) -> None:
    """Keys, norms and cores."""
    config, keys = layer.config, layer.score.keys_H2RNK
    if config.init == "memory_plus":  # keys of both sides are one key of twice the width there
        bound = (2 * config.rank_key_dim) ** -0.5
        nn.init.uniform_(keys, -bound, bound)
    else:
        nn.init.normal_(keys, std=config.rank_key_dim**-0.5)
    if layer.select.cores_HCRR is not None:
        nn.init.uniform_(layer.select.cores_HCRR)
    key_weight, query_weight = config.rank_key_dim**-0.5, 1.0
    if config.init == "released":
        key_weight = query_weight = config.rank_key_dim**_RELEASED_NORM_EXPONENT
    elif config.init == "paper":
        top = mean_top_normal(config.top_m, config.grid_side)
        query_weight = 1 / top if config.rank == 1 else top**-0.5
    for norm, weight in ((layer.score.norm, key_weight), (layer.query.norm, query_weight)):
        if isinstance(norm, nn.LayerNorm | nn.RMSNorm):
            nn.init.constant_(norm.weight, weight)
    if config.init == "calibrated" and config.score_function == "none":
        _scale_scores(layer, 1 / kept_scores(layer).sum(-1).mean(dim=(0, 2)))


def _scale_scores(layer: UltraMemLayer, scale_H: Tensor) -> None:
    """Multiply the kept scores of each head (for additive scores: of all heads alike) by `scale_H`."""
    if layer.select.cores_HCRR is not None:
        layer.select.cores_HCRR.mul_(scale_H.view(-1, 1, 1, 1))
    elif isinstance(layer.query.norm, nn.LayerNorm | nn.RMSNorm):
        layer.query.norm.weight.mul_(scale_H.mean())
    else:
        layer.score.keys_H2RNK.mul_(scale_H.view(-1, 1, 1, 1, 1))


@torch.no_grad()
def init_table(table: ValueTable, layers: Sequence[UltraMemLayer]) -> None:
    """Draw the rows that `layers` read. Does nothing on the meta device."""
    if table.values_NV.is_meta:
        return
    variances = [value_variance(layer) for layer in layers]
    table.draw_(values_std=math.sqrt(sum(variances) / len(variances)), experts_std=max(table.expert_dim, 1) ** -0.5)


def value_variance(layer: UltraMemLayer) -> float:
    """Variance of the value rows that `config.init` asks for, with the layer's own scores where it measures."""
    config = layer.config
    if config.init == "released":
        return _RELEASED_STD**2
    if config.init == "memory_plus":
        return 1 / config.hidden_size
    score_square = float(kept_scores(layer).square().mean()) if config.init == "calibrated" else 1.0
    return 1 / (2 * config.num_layers * config.num_slots * score_square * _output_gain(config))


def _output_gain(config: MemoryConfig) -> float:
    """Variance of the output over that of the pooled rows, summed over blocks, for an input of unit variance."""
    normal = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-normal.square() / 2) / math.sqrt(2 * math.pi) * (normal[1] - normal[0])
    gain = 1 / config.expansion
    if config.output == "gated":
        gain *= float((F.silu(normal).square() * density).sum())
    if config.expert_dim and config.expert_activation == "gelu":
        gain *= float((F.gelu(normal).square() * density).sum())
    return gain


@torch.no_grad()
def kept_scores(layer: UltraMemLayer, samples: int = SAMPLES, seed: int = _SEED) -> Tensor:
    """Scores [samples,H,M,C] that the layer keeps for random normalised queries; leaves the global generator alone."""
    keys = layer.score.keys_H2RNK
    generator = torch.Generator("cpu").manual_seed(seed)
    query = torch.randn((samples, *layer.query.shape), generator=generator, device="cpu").to(keys.device, keys.dtype)
    # In chunks: the scores of one query are 2 * H * r * n numbers.
    return torch.cat([layer.select(*layer.score(layer.query.norm(chunk))).scores for chunk in query.split(64)])


def mean_top_normal(m: int, n: int, samples: int = 2000) -> float:
    """E[Y]: the mean of the m largest of n standard normals, by sampling (Appendix A)."""
    generator = torch.Generator("cpu").manual_seed(_SEED)
    return torch.randn(samples, n, generator=generator, device="cpu").topk(m).values.mean().item()


def init_linear(linear: nn.Linear, *, residual_layers: int | None = None) -> None:
    """N(0, 1/fan_in); for the output of a residual branch of a model with L layers, divided by sqrt(2L)."""
    std = linear.in_features**-0.5
    if residual_layers is not None:
        std /= math.sqrt(2 * residual_layers)
    nn.init.normal_(linear.weight, std=std)


__all__ = ["init_linear", "init_memory_layer", "init_table", "kept_scores", "mean_top_normal", "value_variance"]
