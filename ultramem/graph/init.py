"""Initial weights: the paper's closed rule (section 3.2, Appendix A) and one that measures what the rule assumes.

Both aim at a mean kept score of 1 and an output variance of 1/(2L), an MLP's. The closed rule assumes independent
scores; with real keys and a random core the kept mean is far from 1, so the default measures it instead.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ultramem.graph.memory_layer import UltraMemLayer

SAMPLES = 512  # queries for the calibration: the mean kept score of a head is then known to about 1 %
_SEED = 20250


@torch.no_grad()
def init_memory_layer(layer: UltraMemLayer) -> None:
    """Draw the weights of `layer`; scales follow `config.init`. Does nothing on the meta device."""
    config, values = layer.config, layer.table.values_NV
    if values.is_meta:
        return
    init_linear(layer.query.proj)
    if layer.query.conv_DW is not None:  # identity: the last tap is the token itself
        layer.query.conv_DW.zero_()[:, -1] = 1
    nn.init.normal_(layer.score.keys_H2RNK, std=config.rank_key_dim**-0.5)
    if isinstance(layer.score.norm, nn.LayerNorm) and isinstance(layer.query.norm, nn.LayerNorm):
        nn.init.constant_(layer.score.norm.weight, config.rank_key_dim**-0.5)
        nn.init.constant_(layer.query.norm.weight, 1.0)
    if layer.select.cores_HCRR is not None:
        nn.init.uniform_(layer.select.cores_HCRR)
    if config.permutation == "stored":
        from ultramem.ops import address_table

        layer.lookup.address_table.copy_(address_table(layer.lookup.num_addresses, config.permutation_seed))
    nn.init.normal_(layer.expand.weight, std=(config.expansion * config.value_dim) ** -0.5)

    if config.init == "paper":
        if isinstance(layer.query.norm, nn.LayerNorm):
            top = mean_top_normal(config.top_m, config.grid_side)
            nn.init.constant_(layer.query.norm.weight, 1 / top if config.rank == 1 else top**-0.5)
        score_rms = 1.0
    else:
        scores_SHMC = kept_scores(layer)
        _scale_scores(layer, 1 / scores_SHMC.sum(-1).mean(dim=(0, 2)))
        score_rms = float(kept_scores(layer).square().mean().sqrt())
    variance = config.expansion / (2 * config.num_slots * config.num_layers)
    nn.init.normal_(values, std=math.sqrt(variance) / score_rms)


def _scale_scores(layer: UltraMemLayer, scale_H: Tensor) -> None:
    """Multiply the kept scores of each head (for additive scores: of all heads alike) by `scale_H`."""
    if layer.select.cores_HCRR is not None:
        layer.select.cores_HCRR.mul_(scale_H.view(-1, 1, 1, 1))
    elif isinstance(layer.query.norm, nn.LayerNorm):
        layer.query.norm.weight.mul_(scale_H.mean())
    else:
        layer.score.keys_H2RNK.mul_(scale_H.view(-1, 1, 1, 1, 1))


@torch.no_grad()
def kept_scores(layer: UltraMemLayer, samples: int = SAMPLES, seed: int = _SEED) -> Tensor:
    """Scores [samples,H,M,C] that the layer keeps for random normalised queries; leaves the global generator alone."""
    keys = layer.score.keys_H2RNK
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn((samples, *layer.query.shape), generator=generator).to(keys.device, keys.dtype)
    # In chunks: the scores of one query are 2 * H * r * n numbers.
    return torch.cat([layer.select(*layer.score(layer.query.norm(chunk))).scores for chunk in query.split(64)])


def mean_top_normal(m: int, n: int, samples: int = 2000) -> float:
    """E[Y]: the mean of the m largest of n standard normals, by sampling (Appendix A)."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(samples, n, generator=generator).topk(m).values.mean().item()


def init_linear(linear: nn.Linear, *, residual_layers: int | None = None) -> None:
    """N(0, 1/fan_in); for the output of a residual branch of a model with L layers, divided by sqrt(2L)."""
    std = linear.in_features**-0.5
    if residual_layers is not None:
        std /= math.sqrt(2 * residual_layers)
    nn.init.normal_(linear.weight, std=std)


__all__ = ["init_linear", "init_memory_layer", "kept_scores", "mean_top_normal"]
