"""Forward of one whole memory layer, beside what else one could spend the FLOPs or the parameters on.

Shapes: B batch, S sequence, T = B*S tokens, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness.check import require_tokens_as_exact_as_eager
from benchmarks.harness.contender import Case, Contender, Floor, Role
from benchmarks.harness.row import Goal, Row, Suite
from benchmarks.subjects.plain_layer import PlainLayer
from benchmarks.subjects.shapes import (
    BASE_GB,
    CPU_ROWS,
    REHEARSAL,
    compiled,
    dtype_of,
    gathered_gb,
    make_table,
    size_of,
    table_gb,
)
from ultramem import MemoryConfig, ModelConfig, MoEConfig
from ultramem.counts import count_memory
from ultramem.graph import UltraMemLayer, fold_for_inference
from ultramem.graph.moe import MoE
from ultramem.graph.transformer import MLP
from ultramem.ops import Implementation, use_implementation

CHECKED_TOKENS = 16  # at least, over as many draws as that takes
DECODE_TOKENS = 64  # up to so many, they are a batch of one token each; more are one sequence
WIDTH_MULTIPLE = 16  # of an MLP or expert: whole vectors on any device
EXPERTS_PER_TOKEN = 2
LAYERS = 32  # of a model: sets the scale of initial values alone

FLOOR = Goal(text="<= 1.35x floor, B <= 64", quantity="floor_ratio", bound=1.35)
LAUNCHES = Goal(text="<= 4 launches, B <= 64", quantity="launches", bound=4)


def rows(suite: Suite) -> list[Row]:
    if suite == "cpu":
        shapes = [("151m", t) for t in (1, 16, 64, 1024)] + [("680m", 16), ("1.6b", 1), ("1.6b", 64)]
        return [
            Row(subject="layer", size=size, tokens=t, dtype="float32", limit_s=180, quick=(size, t) == ("151m", 16))
            for size, t in shapes
        ]
    shapes = [("1.6b", 64), ("1.6b", 1), ("1.6b", 16), ("1.6b", 4), ("1.6b", 4096), ("151m", 64), ("680m", 64)]
    return [
        Row(
            subject="layer",
            size=size,
            tokens=t,
            dtype="bfloat16",
            graph=t <= DECODE_TOKENS,
            limit_s=120,
            goals=(FLOOR, LAUNCHES) if size == "1.6b" and t <= DECODE_TOKENS else (),
            device_gb=BASE_GB
            + 2.5 * table_gb(size)
            + 4 * gathered_gb(size, t),  # ours, experts as large, a half of them
            priority=2 if number < 2 else 4 if number < 4 else 7,
        )
        for number, (size, t) in enumerate(shapes)
    ]


def memory_config(row: Row, device: torch.device) -> MemoryConfig:
    """The paper's layer; on a CPU with a table of 2^20 rows."""
    size = size_of(row)
    on_cpu = device.type == "cpu" and row.size != REHEARSAL
    return MemoryConfig(
        hidden_size=size.hidden_size,
        num_layers=LAYERS,
        value_dim=size.value_dim,
        key_dim=size.key_dim,
        knum=round(CPU_ROWS**0.5) if on_cpu else size.knum,
        top_m=size.top_m,
    )


def make_layer(config: MemoryConfig, dtype: torch.dtype, device: torch.device) -> UltraMemLayer:
    """With rows of unit variance, which are drawn in a second at any size."""
    with use_implementation(Implementation.ATEN):  # initial scales are measured, which is no work for an interpreter
        layer = UltraMemLayer(config, own_table=False).to(device, dtype)
    with torch.device("meta"):
        layer.table = UltraMemLayer(config).table
    layer.table.values_NV = nn.Parameter(make_table(config.table_rows, config.value_dim, dtype, device))
    return layer.eval().requires_grad_(False)


def equal_mlp(config: MemoryConfig) -> int:
    """Width of the MLP that takes as many FLOPs as the layer."""
    active = count_memory(config).dense + config.num_slots * config.value_dim
    return _whole(active / (2 * config.hidden_size))


def equal_moe(config: MemoryConfig) -> tuple[int, int]:
    """Width and number of experts that take as many FLOPs and have as many parameters as the layer."""
    counts = count_memory(config)
    width = _whole(equal_mlp(config) / EXPERTS_PER_TOKEN)
    number = round((counts.dense + counts.table) / (2 * config.hidden_size * width))
    return width, max(number, EXPERTS_PER_TOKEN)


def _whole(width: float) -> int:
    return max(1, round(width / WIDTH_MULTIPLE)) * WIDTH_MULTIPLE


def build(row: Row, device: torch.device) -> Case:
    config, dtype = memory_config(row, device), dtype_of(row)
    d, t = config.hidden_size, row.tokens
    shape_BSD = (t, 1, d) if t <= DECODE_TOKENS else (1, t, d)
    generator = torch.Generator(device).manual_seed(0)
    layer = make_layer(config, dtype, device)
    plain = PlainLayer(layer)

    def draw() -> Tensor:
        return torch.randn(shape_BSD, device=device, generator=generator).to(dtype)

    def contender(role: Role, settings: str, module: nn.Module, low: nn.Module, exact: nn.Module) -> Contender:
        graph = compiled(row, module)
        run = torch.no_grad()(lambda hidden_BSD: _output(graph(hidden_BSD)))
        tokens = 1 if row.size == REHEARSAL else CHECKED_TOKENS
        return Contender(
            role=role, settings=settings, draw=draw, run=run, check=lambda: check(draw, run, low, exact, tokens)
        )

    def memory(role: Role, settings: str, module: nn.Module) -> Contender:
        return contender(role, settings, module, plain, in_float64(plain))

    def dense() -> Contender:
        width = equal_mlp(config)
        module = _frozen(MLP(_model_config(d, width)), dtype, device)
        settings = f"two products, GELU between, width {width}: the same FLOPs; torch.compile"
        return contender("yardstick", settings, module, module, in_float64(module))

    def moe() -> Contender:
        width, number = equal_moe(config)
        with torch.device("meta"):
            module = MoE(MoEConfig(num_experts=number, experts_per_token=EXPERTS_PER_TOKEN), d, width)
        module = module.to_empty(device=device).to(dtype)
        for weight in module.parameters():
            weight.data.view(-1, weight.shape[-1]).copy_(
                make_table(weight[..., 0].numel(), weight.shape[-1], dtype, device)
            )
            weight.data.mul_(weight.shape[-2] ** -0.5)
        _frozen(module, dtype, device)
        settings = (
            f"{EXPERTS_PER_TOKEN} of {number} experts of width {width}: the same FLOPs and parameters; torch.compile"
        )
        return contender("peer", settings, module, module, ChosenExperts(module))

    contenders = {
        "ultramem": lambda: memory(
            "ours", "UltraMemLayer, its constants folded, under torch.compile", fold_for_inference(layer)
        ),
        "plain PyTorch, compiled": lambda: memory(
            "peer", "topk, gather, einsum, a stored permutation; torch.compile", plain
        ),
        "MoE": moe,
        "dense MLP": dense,
    }
    facts: dict[str, int | str] = {
        "batch": shape_BSD[0],
        "sequence": shape_BSD[1],
        "hidden_size": d,
        "rows": config.table_rows,
        "value_dim": config.value_dim,
        "slots": config.num_slots,
        "side": config.grid_side,
        "key_dim": config.key_dim,
    }
    return Case(contenders=contenders, floor=_floor(config, t, dtype), shape=facts)


def _model_config(hidden_size: int, inner_size: int) -> ModelConfig:
    return ModelConfig(vocab_size=1, hidden_size=hidden_size, inner_size=inner_size, num_heads=1, num_layers=1)


def _frozen(module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    return module.to(device, dtype).eval().requires_grad_(False)


def _output(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Of a mixture of experts, what is not its balance loss."""
    return output if isinstance(output, Tensor) else output[0]


def in_float64(module: nn.Module) -> nn.Module:
    """A copy in float64, but for the table, whose rows become float64 when they meet their scores."""
    table = getattr(module, "values_NV", None)
    known = {} if table is None else {id(table): table}
    exact = copy.deepcopy(module, known)
    for owner in exact.modules():
        for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            if tensor is not table and tensor.is_floating_point():
                setattr(
                    owner,
                    name,
                    nn.Parameter(tensor.double(), requires_grad=False)
                    if name in owner._parameters
                    else tensor.double(),
                )
    return exact


class ChosenExperts(nn.Module):
    """The oracle of a mixture of experts: float64, of the chosen experts alone."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        moe, hidden_TD = self.moe, hidden_BSD.flatten(0, 1)
        logits_TE = hidden_TD @ moe.router.weight.double().T
        best = logits_TE.topk(moe.config.experts_per_token, dim=1)
        gate_TK = best.values.softmax(1)
        rows = []
        for hidden_D, experts, gates in zip(hidden_TD, best.indices.tolist(), gate_TK, strict=True):
            outputs = [
                nn.functional.gelu(hidden_D @ moe.up_EDI[e].double()) @ moe.down_EID[e].double() for e in experts
            ]
            rows.append(sum(gate * output for gate, output in zip(gates, outputs, strict=True)))
        return torch.stack(rows).view(hidden_BSD.shape)


def check(
    draw: Callable[[], Tensor], run: Callable[[Tensor], Tensor], low: nn.Module, exact: nn.Module, tokens: int
) -> None:
    """Outputs of `tokens` tokens against float64, by the error of plain PyTorch in the dtype that is timed."""
    results = []
    seen = 0
    while seen < tokens:
        hidden_BSD = draw()
        actual_BSD = run(hidden_BSD)
        hidden_BSD = hidden_BSD[:tokens, :tokens]  # causal: later tokens do not matter
        with torch.no_grad():
            few = [actual_BSD[:tokens, :tokens], _output(low(hidden_BSD)), exact(hidden_BSD.double())]
        results.append(tuple(each.flatten(0, 1) for each in few))
        seen += results[-1][0].shape[0]
    require_tokens_as_exact_as_eager("output of the layer", results)


def _floor(config: MemoryConfig, tokens: int, dtype: torch.dtype) -> Floor:
    """Dense weights once, rows once a slot but never more than there are, hidden states in and out."""
    counts = count_memory(config)
    rows = min(tokens * config.num_slots, config.table_rows) * config.value_dim
    hidden = tokens * config.hidden_size
    return Floor(
        read_bytes=(counts.dense + rows + hidden) * dtype.itemsize,
        write_bytes=hidden * dtype.itemsize,
        flops=2 * tokens * (counts.dense + config.num_slots * config.value_dim),
    )
