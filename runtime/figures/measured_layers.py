"""A memory layer, eager and compiled, and a mixture of experts of as many parameters, at one size of the table.

Shapes: B sequences, D hidden size, W convolution width.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ultramem.config import ModelConfig, MoEConfig
from ultramem.graph import fold_for_inference
from ultramem.graph.moe import MoE
from ultramem.presets import BYTE_VOCABULARY
from ultramem.runtime.figures.agreement import require_memory_layer, require_moe
from ultramem.runtime.figures.cases import Case
from ultramem.runtime.figures.expected import decode_costs, expected_used
from ultramem.runtime.figures.grown_table import (
    HIDDEN,
    INNER,
    ROW_WIDTH,
    memory_config,
    memory_layer,
    moe_layer,
    num_experts,
    rows_of,
)
from ultramem.runtime.figures.rates import cycle, inputs_for, random_rows
from ultramem.runtime.figures.seen_use import used_by
from ultramem.runtime.figures.small_models import tiny_twin
from ultramem.runtime.profile.arithmetic import MEMORY_STAGES, StageCost

MEMORY_SERIES, MOE_SERIES = "memory layer", "MoE layer"
ELEMENT_BYTES = 4
CHECKED = 3
USE_COUNTED = 16
MOE_INPUTS = 64

_PLAIN = ModelConfig(
    vocab_size=BYTE_VOCABULARY, hidden_size=HIDDEN, inner_size=INNER, num_heads=8, num_layers=1, dropout=0.0
)


def memory_model(rows: int) -> ModelConfig:
    """A model of one layer, of which the stages of the memory layer are the layer that is timed."""
    return replace(_PLAIN, memory=memory_config(rows), insertions="1:1")


def moe_model(rows: int) -> ModelConfig:
    """Likewise with experts of as many parameters as that many rows."""
    return replace(_PLAIN, moe=MoEConfig(num_experts=num_experts(rows)))


def twin_calls(rows: int, tokens: int, engines: Sequence[str], device: torch.device) -> dict[str, Callable[[], object]]:
    """The calls of the tiny twin of a memory layer by engine; the same for every number of rows."""
    config = tiny_twin(memory_model(rows)).memory
    assert config is not None
    values = torch.randn(config.num_values * config.value_dim, device=device)
    layer = fold_for_inference(memory_layer(config, values))
    past_BDW = torch.zeros(tokens, config.hidden_size, config.conv_width - 1, device=device)
    inputs = _hidden(tokens, config.hidden_size, USE_COUNTED, device)
    return {engine: _cycled(_run(layer, engine), inputs, past_BDW) for engine in engines}


def memory_cases(buffer: Tensor, rows: int, tokens: int, twins: dict[str, Callable[[], object]]) -> list[Case]:
    """A memory layer as it is run in inference, on every engine that there is a twin of."""
    config = memory_model(rows)
    memory = config.memory
    assert memory is not None
    device = buffer.device
    plain = memory_layer(memory, buffer)
    layer = fold_for_inference(plain)
    past_BDW = torch.zeros(tokens, HIDDEN, memory.conv_width - 1, device=device)
    row_bytes = ROW_WIDTH * ELEMENT_BYTES
    inputs = _hidden(tokens, HIDDEN, inputs_for(tokens * memory.num_slots * row_bytes), device)
    used = used_by(layer, [partial(layer, each, past_BDW) for each in inputs[:USE_COUNTED]])
    cases = []
    for engine, twin in twins.items():
        run = _run(layer, engine)
        require_memory_layer(f"{engine} memory layer of {rows} rows", plain, run, inputs[:CHECKED], past_BDW)
        cases.append(
            Case(
                series=MEMORY_SERIES,
                engine=engine,
                x=rows,
                batch=tokens,
                costs=_costs(config, tokens, MEMORY_STAGES),
                used_costs=_costs(config, tokens, MEMORY_STAGES, used),
                call=_cycled(run, inputs, past_BDW),
                table_rows=rows,
                row_bytes=row_bytes,
                used=used,
                used_expected=expected_used(config, tokens),
                twin=twin,
                twin_costs=_costs(tiny_twin(config), tokens, MEMORY_STAGES),
                rows=random_rows(rows_of(buffer, rows, ROW_WIDTH), tokens, memory.num_slots, seed=rows),
            )
        )
    return cases


def moe_case(buffer: Tensor, rows: int, tokens: int) -> Case:
    """A mixture of experts, two for a token."""
    config = moe_model(rows)
    twin_config = tiny_twin(config)
    assert config.moe is not None
    assert twin_config.moe is not None
    layer = moe_layer(rows, buffer)
    inputs = _hidden(tokens, HIDDEN, MOE_INPUTS, buffer.device)
    require_moe(f"MoE layer of {config.moe.num_experts} experts", layer, inputs[0])
    used = used_by(layer, [partial(layer, each) for each in inputs[:USE_COUNTED]])
    twin = MoE(twin_config.moe, twin_config.hidden_size, twin_config.inner_size).to(buffer.device).eval()
    twin.reset_parameters(residual_layers=1)
    twin_inputs = _hidden(tokens, twin_config.hidden_size, USE_COUNTED, buffer.device)
    return Case(
        series=MOE_SERIES,
        engine="eager",
        x=rows,
        batch=tokens,
        costs=_costs(config, tokens, ("mlp",)),
        used_costs=_costs(config, tokens, ("mlp",), used),
        call=_cycled(layer, inputs),
        experts=config.moe.num_experts,
        used=used,
        used_expected=expected_used(config, tokens),
        experts_per_token=config.moe.experts_per_token,
        twin=_cycled(twin, twin_inputs),
        twin_costs=_costs(twin_config, tokens, ("mlp",)),
    )


def _costs(config: ModelConfig, tokens: int, stages: Sequence[str], used: float | None = None) -> tuple[StageCost, ...]:
    costs = decode_costs(config, batch=tokens, cached_tokens=0, element_bytes=ELEMENT_BYTES, used=used)
    return tuple(cost for cost in costs if cost.stage in stages)


def _hidden(tokens: int, width: int, count: int, device: torch.device) -> list[Tensor]:
    """Normalised inputs [B,1,D] of decode steps."""
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(tokens, 1, width, generator=generator).to(device) for _ in range(count)]


def _cycled(run: Callable[..., object], inputs: Sequence[Tensor], *rest: Tensor) -> Callable[[], object]:
    return cycle([partial(run, each, *rest) for each in inputs])


def _run(layer: nn.Module, engine: str) -> Callable[..., Tensor]:
    """The layer as a function of tensors."""

    def forward(hidden_BSD: Tensor, past_conv_BDW: Tensor) -> Tensor:
        output_BSD: Tensor = layer(hidden_BSD, past_conv_BDW)
        return output_BSD

    if engine == "eager":
        return forward
    # The compiler counts graphs by code object, which closures share; a copy of the code is counted by itself.
    own = types.FunctionType(forward.__code__.replace(), forward.__globals__, "forward", None, forward.__closure__)
    compiled: Callable[..., Tensor] = torch.compile(own, fullgraph=True, dynamic=False)
    return compiled
