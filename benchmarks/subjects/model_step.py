"""One decode step of whole models of the paper's 1.6B row: UltraMem x12, a mixture of experts, dense. GPU alone.

Half of each model's layers, so that all three are in memory beside each other: what a step streams halves alike.

Shapes: B batch, P cached tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.harness.contender import Case, Contender, Role, WrongResultError
from benchmarks.harness.row import Goal, Row, Suite
from benchmarks.subjects.shapes import REHEARSAL, compiled, dtype_of
from ultramem import ModelConfig, preset
from ultramem.counts import count
from ultramem.graph import Cache, Transformer, fold_for_inference

CACHED_TOKENS = 128
LAYERS = 16
TOLERANCE = 0.1  # relative difference of all logits: bfloat16 moves them by some percent
VALUE_STD = 0.01  # pooled rows come out at about 1
INSERTIONS = "3:7/8:12/11:16"  # three memory layers of the six
PRESETS = {"ultramem": "ultramem-1.6b-x12", "MoE": "moe-1.6b-2in34", "dense": "dense-1.6b"}
TINY = {"ultramem": "ultramem-tiny", "MoE": "moe-tiny", "dense": "dense-tiny"}

OVER_MOE = Goal(text="1.6B-x12 step >= 6x MoE at B = 64", quantity="speedup", bound=6.0, against="MoE")
OVER_DENSE = Goal(text="1.6B-x12 step <= 1.20x dense", quantity="slowdown", bound=1.2, against="dense")


def rows(suite: Suite) -> list[Row]:
    if suite == "cpu":
        return []
    goals = (OVER_MOE, OVER_DENSE)
    return [
        Row(
            subject="model_step",
            size="1.6b",
            tokens=64,
            dtype="bfloat16",
            graph=True,
            goals=goals,
            priority=5,
            limit_s=200,
            device_gb=55.0,  # the weights of three models are 45
        )
    ]


def build(row: Row, device: torch.device) -> Case:
    dtype = dtype_of(row)
    tiny = row.size == REHEARSAL
    cached = 2 if tiny else CACHED_TOKENS
    generator = torch.Generator(device).manual_seed(0)

    def contender(role: Role, name: str) -> Contender:
        config = preset(TINY[name]) if tiny else _half(preset(PRESETS[name]))
        model = fold_for_inference(make_model(config, dtype, device))
        heads = (row.tokens, config.num_heads, cached, config.head_dim)
        keys = tuple(torch.randn(heads, device=device, generator=generator).to(dtype) for _ in range(config.num_layers))
        convs = (torch.zeros(row.tokens, config.hidden_size, config.conv_length, device=device, dtype=dtype),)
        cache = Cache(keys, keys, convs * config.num_convs)

        def draw() -> Tensor:
            return torch.randint(config.vocab_size, (row.tokens, 1), device=device, generator=generator)

        def step(ids_B1: Tensor) -> Tensor:
            return model(ids_B1, cache=cache).logits

        graph = compiled(row, step)
        run = torch.no_grad()(graph)

        settings = f"{name}, {config.num_layers} layers, {count(config).total / 1e9:.2f} B parameters; torch.compile"
        return Contender(role=role, settings=settings, draw=draw, run=run, check=lambda: check(draw, run, step))

    contenders = {
        "ultramem": lambda: contender("ours", "ultramem"),
        "MoE": lambda: contender("peer", "MoE"),
        "dense": lambda: contender("yardstick", "dense"),
    }
    return Case(contenders=contenders, shape={"batch": row.tokens, "cached_tokens": cached, "layers": LAYERS})


def _half(config: ModelConfig) -> ModelConfig:
    if config.memory is None:
        return replace(config, num_layers=LAYERS)
    return replace(config, num_layers=LAYERS, memory=replace(config.memory, num_layers=LAYERS), insertions=INSERTIONS)


@torch.no_grad()
def make_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Transformer:
    """With random weights, drawn on the device in the dtype that they keep: there is no room for a float32 copy."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model = model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        kind = name.rsplit(".", 1)[-1]
        if kind == "conv_DW":  # identity: the last tap is the token itself
            parameter.zero_()[:, -1] = 1
        elif kind == "cores_HCRR":
            nn.init.uniform_(parameter)
        elif parameter.ndim == 1:
            nn.init.constant_(parameter, parameter.shape[0] ** -0.5 if "score.norm" in name else 1.0)
        else:
            fan_in = parameter.shape[-2] if kind in ("up_EDI", "down_EID") else parameter.shape[-1]
            nn.init.normal_(parameter, std=VALUE_STD if kind == "values_NV" else fan_in**-0.5)
    return model.eval().requires_grad_(False)


def check(draw: Callable[[], Tensor], run: Callable[[Tensor], Tensor], step: Callable[[Tensor], Tensor]) -> None:
    """Logits against eager PyTorch: weights in float64 would not fit beside each other.

    Raises:
        WrongResultError: they differ by more than the dtype explains.
    """
    ids_B1 = draw()
    with torch.no_grad():
        eager = step(ids_B1).float()
    difference = ((run(ids_B1).float() - eager).norm() / eager.norm()).item()
    if not difference <= TOLERANCE:
        raise WrongResultError(f"logits differ from eager by {difference:.3g} of their norm, accepted {TOLERANCE}")
