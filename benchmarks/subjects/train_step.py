"""One training step of a memory layer: forward, backward, clipping, update; and the memory that it takes.

Shapes: B batch, S sequence, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.harness.contender import Case, Contender, Role, WrongResultError
from benchmarks.harness.row import Goal, Row, Suite
from benchmarks.subjects.layer import make_layer
from benchmarks.subjects.plain_layer import PlainLayer
from benchmarks.subjects.shapes import REHEARSAL, compiled
from ultramem import MemoryConfig
from ultramem.graph import UltraMemLayer
from ultramem.ops import Implementation, use_implementation
from ultramem.optim import TableOptimizer, build_optimizers, clip_grad_norm_

SIZE = "2^20 x 256"
CONFIG = MemoryConfig(hidden_size=512, num_layers=2, value_dim=256, key_dim=128, knum=1024)
SMALL_KNUM = 24  # of the table on which steps are compared with float64
CHECKED_STEPS, CHECKED_TOKENS = 4, 16
LOSS_TOLERANCE = 1e-4  # relative, of a float32 loss after a few steps; two slots may change places
SEQUENCES = 2
STATES = {"lazy_adamw": 2, "row_adagrad": 0, "adamw": 2}
"""Tensors of the table's size that the optimiser must keep."""

SPEED = Goal(text=">= 5x the dense-gradient path with AdamW", quantity="speedup", bound=5.0, against="dense gradient")
MEMORY = Goal(text="peak memory <= table + states + 10 %", quantity="peak_ratio", bound=1.1)


def rows(suite: Suite) -> list[Row]:
    on_cpu = suite == "cpu"
    goals = (SPEED,) if on_cpu else ()
    tokens = (1024,) if on_cpu else (4096,)
    found = [
        Row(
            subject="train_step",
            size=SIZE,
            tokens=t,
            dtype="float32",
            limit_s=240 if on_cpu else 90,
            goals=goals,
            priority=8,
        )
        for t in tokens
    ]
    found += [
        Row(
            subject="train_step",
            variant=f"memory-{tables}",
            size=SIZE,
            tokens=tokens[0],
            dtype="float32",
            limit_s=240 if on_cpu else 90,
            goals=(MEMORY,) if tables != "adamw" else (),
            priority=9,
        )
        for tables in STATES
    ]
    return found


class Trainer:
    """Steps of one layer on random hidden states."""

    def __init__(self, row: Row, layer: nn.Module, module: nn.Module, tables: str) -> None:
        self.layer, self.tables = layer, tables
        self.optimizers = build_optimizers(layer, lr=1e-3, tables=tables)
        for optimizer in self.optimizers:
            if isinstance(optimizer, TableOptimizer):
                _make_resident(optimizer)

        def loss(hidden_BSD: Tensor) -> Tensor:
            return (module(hidden_BSD) - hidden_BSD).square().mean() + layer.aux_loss()

        self.loss = compiled(row, loss)

    def step(self, hidden_BSD: Tensor) -> Tensor:
        loss = self.loss(hidden_BSD)
        loss.backward()
        clip_grad_norm_(self.layer.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()


def _make_resident(optimizer: TableOptimizer) -> None:
    """As after long training: no page of the state is touched for the first time in a timed step."""
    for state in optimizer.state.values():
        for name, tensor in state.items():
            if name not in ("step", "schedule"):
                tensor.fill_(0)


def build(row: Row, device: torch.device) -> Case:
    config = replace(CONFIG, hidden_size=32, value_dim=16, key_dim=16, knum=12) if row.size == REHEARSAL else CONFIG
    generator = torch.Generator(device).manual_seed(0)

    def draw() -> Tensor:
        sequences = 1 if row.size == REHEARSAL else SEQUENCES
        return torch.randn(sequences, row.tokens // sequences, config.hidden_size, device=device, generator=generator)

    def contender(role: Role, settings: str, tables: str, *, plain: bool = False) -> Contender:
        trainer = _trainer(row, config, tables, device, plain=plain)
        return Contender(
            role=role,
            settings=settings,
            draw=draw,
            run=trainer.step,
            check=lambda: check(row, config, tables, draw, plain=plain),
        )

    contenders: dict[str, Callable[[], Contender]] = {
        "LazyAdamW": lambda: contender("ours", "sparse gradient, the results of dense AdamW", "lazy_adamw"),
        "RowAdagrad": lambda: contender("ours", "sparse gradient, one accumulator a row", "row_adagrad"),
        "dense gradient, AdamW": lambda: contender("peer", "the same layer, fused dense AdamW", "adamw"),
        "dense gradient, AdamW, plain layer": lambda: contender(
            "peer", "the layer in plain PyTorch, fused dense AdamW", "adamw", plain=True
        ),
    }
    table_bytes = 4 * config.table_rows * config.value_dim
    shape: dict[str, int | str] = {
        "rows": config.table_rows,
        "value_dim": config.value_dim,
        "hidden_size": config.hidden_size,
        "slots": config.num_slots,
        "side": config.grid_side,
        "key_dim": config.key_dim,
        "table_bytes": table_bytes,
    }
    if not row.variant:
        return Case(contenders=contenders, shape=shape)
    tables = row.variant.removeprefix("memory-")
    # A dense gradient is no state: it is what the dense path takes besides.
    resident = table_bytes * (1 + STATES[tables])
    role: Role = "peer" if tables == "adamw" else "ours"
    return Case(
        contenders={tables: lambda: contender(role, f"all of one process, tables={tables!r}", tables)},
        shape=shape,
        resident_bytes=resident,
        measures="memory",
    )


def _trainer(row: Row, config: MemoryConfig, tables: str, device: torch.device, *, plain: bool) -> Trainer:
    torch.manual_seed(0)
    layer = make_layer(config, torch.float32, device).requires_grad_(True).train()
    layer.table.values_NV.data.mul_(0.02)
    return Trainer(row, layer, _plain(layer) if plain else layer, tables)


def _plain(layer: UltraMemLayer) -> nn.Module:
    """The plain layer; its convolution is a parameter of its own and stays as it is, one of 10^4 numbers."""
    return PlainLayer(layer).train()


def check(row: Row, config: MemoryConfig, tables: str, draw: Callable[[], Tensor], *, plain: bool) -> None:
    """Losses of the first steps on a small table against the same steps in float64, eager.

    Raises:
        WrongResultError: they differ by more than float32 explains.
    """
    device = draw().device
    with use_implementation(Implementation.ATEN):
        layer = UltraMemLayer(replace(config, knum=min(SMALL_KNUM, config.knum)))
        layer = layer.to(device)
        exact = copy.deepcopy(layer).double()
    eager = replace(row, size=REHEARSAL)
    under_test = Trainer(eager, layer, _plain(layer) if plain else layer, tables)
    with use_implementation(Implementation.ATEN):
        oracle = Trainer(eager, exact, _plain(exact) if plain else exact, tables)
    steps = 1 if row.size == REHEARSAL else CHECKED_STEPS
    hidden = [draw()[:, :CHECKED_TOKENS] for _ in range(steps)]
    losses = [under_test.step(each).item() for each in hidden]
    with use_implementation(Implementation.ATEN):
        expected = [oracle.step(each.double()).item() for each in hidden]
    for number, (loss, right) in enumerate(zip(losses, expected, strict=True), start=1):
        if not abs(loss - right) <= LOSS_TOLERANCE * abs(right):
            raise WrongResultError(f"loss of step {number} is {loss:.8g}, in float64 {right:.8g}")
