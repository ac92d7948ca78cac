"""Weights of the layer that the paper's authors released, as ours and back, bit for bit.

Names and shapes are those of `UltraMemLayerV1` in olmo/ultramem_layer.py of
https://github.com/ZihaoHuang-notabot/Ultra-Sparse-Memory-Network (commit 6da52aa).

Their layer keeps the leading singular pair (u, v) of the summed core in buffers, with a sign that follows its history;
ours computes the pair and fixes the sign. Where a head's stored pair is the negative of ours, all its keys are negated:
norms are odd, so every score of its grid stays what it was, and the same rows and columns become candidates.

What stays different: their code rounds value rows to bfloat16 as it reads them, and its stored pair is that of the
cores before the last training step.

Shapes: D hidden size, K key width, H heads, R ranks, N side of the grid, C cores, V value dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ultramem.config import MemoryConfig
from ultramem.graph.singular import leading_singular_pair

_CORE = "tucker_core."
_MIN_COSINE = 0.9  # a step of training moves the pair by far less; a pair of other cores has another direction
_SWITCHES: dict[str, Any] = {
    "permutation": "stored",
    "conv_width": 1,
    "shared_query": True,
    "rank_layout": "full",
    "candidates": "one_tailed",
    "candidate_ratio": 1.0,
    "score_function": "none",
    "output": "project",
    "project_bias": False,
    "table": "own",
    "expert_dim": 0,
}


class ImportedLayer(NamedTuple):
    """`weights`: a state dict of `UltraMemLayer`. `singular_pair`: the buffers as found, to export the same bits."""

    weights: dict[str, Tensor]
    singular_pair: tuple[Tensor, Tensor]


def authors_config(
    state: Mapping[str, Tensor],
    *,
    top_m: int,
    num_layers: int,
    norm: Literal["rms", "layer"] = "rms",
    norm_eps: float = 1e-5,
) -> MemoryConfig:
    """The configuration of a layer of theirs: sizes from its weights, the rest from their training configuration.

    Args:
        state: a state dict of their layer.
        top_m: their `knn`, slots kept per head.
        num_layers: transformer layers of the model.
        norm: their `layer_norm_type`.
        norm_eps: their `layer_norm_eps`.

    Raises:
        ValueError: names are missing, or sizes do not fit each other.
    """
    _require_names(state, {*_fixed_names(), f"{_CORE}0"}, _cores(state))
    heads, _, side, key_dim, rank = state["keys"].shape
    rows, value_dim = state["values_for_look_up"].shape
    return MemoryConfig(
        hidden_size=state["query_proj.weight"].shape[1],
        num_layers=num_layers,
        value_dim=value_dim,
        key_dim=key_dim,
        knum=math.isqrt(rows),
        num_heads=heads,
        top_m=top_m,
        rank=rank,
        num_cores=len(_cores(state)),
        expansion=(side // math.isqrt(rows)) ** 2,
        permutation="stored",
        conv_width=1,
        qk_norm=norm,
        qk_norm_eps=norm_eps,
        init="released",
    )


def import_authors_layer(state: Mapping[str, Tensor], config: MemoryConfig) -> ImportedLayer:
    """Weights for `UltraMemLayer(config).load_state_dict` from a state dict of their layer.

    Args:
        state: names as their layer has them, without the prefix that their model puts before.
        config: of the layer; `authors_config` reads it off the weights.

    Raises:
        ValueError: a switch of `config` is not as in their layer, a name is missing, unknown or of another shape or
            dtype, the shuffle is not a permutation, or the stored pair is not that of the cores.
    """
    _require_switches(config)
    _require_state(state, _authors_shapes(config))
    shuffle = state["shuffle_index"]
    if not torch.equal(shuffle.sort().values, torch.arange(len(shuffle), device=shuffle.device)):
        raise ValueError(f"shuffle_index must hold each of 0..{len(shuffle) - 1} once")
    cores_HCRR = torch.stack([state[f"{_CORE}{core}"] for core in range(config.num_cores)], dim=1)
    pair = state["tucker_core_u"], state["tucker_core_v"]
    keys_H2RNK = state["keys"].permute(0, 1, 4, 2, 3)
    weights = {
        "query.proj.weight": state["query_proj.weight"],
        "query.norm.weight": state["query_norm.weight"],
        "score.keys_H2RNK": _with_signs(keys_H2RNK, _signs(cores_HCRR, pair)),
        "score.norm.weight": state["keys_norm.weight"],
        "select.cores_HCRR": cores_HCRR,
        "lookup.address_table": shuffle,
        "table.values_NV": state["values_for_look_up"],
        "expand.weight": state["values_proj.weight"],
    }
    return ImportedLayer({name: tensor.detach().clone() for name, tensor in weights.items()}, pair)


def export_authors_layer(
    weights: Mapping[str, Tensor], config: MemoryConfig, singular_pair: tuple[Tensor, Tensor] | None = None
) -> dict[str, Tensor]:
    """A state dict of their layer from one of `UltraMemLayer`.

    Args:
        weights: a state dict of ours.
        config: of the layer.
        singular_pair: what `import_authors_layer` returned, for the same bits; None: the pair is computed.

    Raises:
        ValueError: as `import_authors_layer`.
    """
    _require_switches(config)
    _require_state(weights, _our_shapes(config))
    cores_HCRR, keys_H2RNK = weights["select.cores_HCRR"], weights["score.keys_H2RNK"]
    if singular_pair is None:
        u_HR, t_HR = leading_singular_pair(cores_HCRR.sum(1))
        singular_pair = u_HR[None, :, None].to(cores_HCRR.dtype), t_HR[None, :, None].to(cores_HCRR.dtype)
    keys_H2RNK = _with_signs(keys_H2RNK, _signs(cores_HCRR, singular_pair))
    state = {
        "query_proj.weight": weights["query.proj.weight"],
        "keys": keys_H2RNK.permute(0, 1, 3, 4, 2),
        "values_for_look_up": weights["table.values_NV"],
        "values_proj.weight": weights["expand.weight"],
        "query_norm.weight": weights["query.norm.weight"],
        "keys_norm.weight": weights["score.norm.weight"],
        **{f"{_CORE}{core}": cores_HCRR[:, core] for core in range(config.num_cores)},
        "shuffle_index": weights["lookup.address_table"],
        "tucker_core_u": singular_pair[0],
        "tucker_core_v": singular_pair[1],
    }
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def _signs(cores_HCRR: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
    """[H], -1 where the stored pair is the negative of ours; zeros, as before their first step of training, count as 1.

    Raises:
        ValueError: a stored pair is neither.
    """
    ours = leading_singular_pair(cores_HCRR.sum(1))
    stored = [vector.detach().float().reshape(vector_HR.shape) for vector, vector_HR in zip(pair, ours, strict=True)]
    cosine_H = torch.stack([(a * b).sum(1) for a, b in zip(stored, ours, strict=True)]).mean(0)
    unset_H = torch.stack([vector.abs().sum(1) for vector in stored]).sum(0) == 0
    for head, (cosine, unset) in enumerate(zip(cosine_H.tolist(), unset_H.tolist(), strict=True)):
        if not unset and not abs(cosine) >= _MIN_COSINE:
            raise ValueError(
                f"tucker_core_u and tucker_core_v must be the leading singular pair of the cores, but those of head "
                f"{head} have a cosine of {cosine:.3f} with it"
            )
    return torch.where(cosine_H < 0, -1, 1)


def _with_signs(keys_H2RNK: Tensor, signs_H: Tensor) -> Tensor:
    return torch.where(signs_H.view(-1, 1, 1, 1, 1) < 0, -keys_H2RNK, keys_H2RNK)


def _require_switches(config: MemoryConfig) -> None:
    for name, value in _SWITCHES.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name} must be {value!r} as in the authors' layer, got {getattr(config, name)!r}")
    if config.qk_norm == "none":
        raise ValueError("qk_norm must be 'rms' or 'layer' as in the authors' layer, got 'none'")
    if config.rank < 2:
        raise ValueError(f"rank must be at least 2 as in the authors' layer, got {config.rank}")


def _authors_shapes(config: MemoryConfig) -> dict[str, tuple[int, ...]]:
    h, r, k, n = config.num_heads, config.rank, config.key_dim, config.grid_side
    return {
        "query_proj.weight": (2 * k, config.hidden_size),
        "keys": (h, 2, n, k, r),
        "values_for_look_up": (config.table_rows, config.value_dim),
        "values_proj.weight": (config.hidden_size, config.expansion * config.value_dim),
        "query_norm.weight": (k,),
        "keys_norm.weight": (k,),
        **{f"{_CORE}{core}": (h, r, r) for core in range(config.num_cores)},
        "shuffle_index": (config.expansion * config.num_values,),
        "tucker_core_u": (1, h, 1, r),
        "tucker_core_v": (1, h, 1, r),
    }


def _our_shapes(config: MemoryConfig) -> dict[str, tuple[int, ...]]:
    h, c, r, k, n = config.num_heads, config.num_cores, config.rank, config.key_dim, config.grid_side
    return {
        "query.proj.weight": (2 * k, config.hidden_size),
        "query.norm.weight": (k,),
        "score.keys_H2RNK": (h, 2, r, n, k),
        "score.norm.weight": (k,),
        "select.cores_HCRR": (h, c, r, r),
        "lookup.address_table": (config.expansion * config.num_values,),
        "table.values_NV": (config.table_rows, config.value_dim),
        "expand.weight": (config.hidden_size, config.expansion * config.value_dim),
    }


def _fixed_names() -> set[str]:
    return {
        "query_proj.weight", "keys", "values_for_look_up", "values_proj.weight", "query_norm.weight",
        "keys_norm.weight", "shuffle_index", "tucker_core_u", "tucker_core_v",
    }  # fmt: skip


def _cores(state: Mapping[str, Tensor]) -> set[str]:
    return {name for name in state if name.startswith(_CORE)}


def _require_names(state: Mapping[str, Tensor], expected: set[str], also: set[str] = frozenset()) -> None:  # type: ignore[assignment]  # an empty set
    if missing := sorted(expected - state.keys()):
        raise ValueError(f"the layer's weights lack {', '.join(missing)}, got {', '.join(sorted(state)) or 'nothing'}")
    if unknown := sorted(state.keys() - expected - also):
        raise ValueError(f"unknown weights {', '.join(unknown)}, accepted: {', '.join(sorted(expected))}")


def _require_state(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    _require_names(state, {*shapes})
    for name, shape in shapes.items():
        tensor = state[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        is_index = name in ("shuffle_index", "lookup.address_table")
        if (tensor.dtype != torch.int64) if is_index else not tensor.is_floating_point():
            raise ValueError(f"{name} must be {'int64' if is_index else 'floating point'}, got {tensor.dtype}")
