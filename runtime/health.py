"""Health of a model's memory: which rows of its tables are used, and what its layers score and put out.

The rows are counted in the training graph itself (`ValueTable.row_use_N`); scores and outputs come from one batch of
held-out text, run eagerly in eval mode, so that training does not notice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ultramem.graph import Transformer
from ultramem.graph.memory_layer import UltraMemLayer
from ultramem.graph.sharded_table import ShardedValueTable
from ultramem.graph.value_table import ValueTable
from ultramem.ops.parts import local_part
from ultramem.runtime.data import IGNORE, Batch
from ultramem.runtime.distributed import ALONE, Ranks


class MemoryHealth:
    """Counts the use of every table of `model` from now on; make it before the model is compiled.

    Of several `ranks` each counts what it reads, of the rows that it holds; reports are of all of them.
    """

    def __init__(self, model: Transformer, ranks: Ranks = ALONE) -> None:
        self.model, self.ranks = model, ranks
        self.layers = {name: each for name, each in model.named_modules() if isinstance(each, UltraMemLayer)}
        self.tables = {name: each for name, each in model.named_modules() if isinstance(each, ValueTable)}
        self.ever_used_N: dict[str, Tensor] = {}
        for name, table in self.tables.items():
            table.count_row_use()
            self.ever_used_N[name] = torch.zeros(len(table.values_NV), dtype=torch.bool, device=table.values_NV.device)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs to report the same figures."""
        counts = {f"{name}.row_use_N": self._total_use(table) for name, table in self.tables.items()}
        ever = {f"{name}.ever_used_N": ever_N.clone() for name, ever_N in self.ever_used_N.items()}
        tensors = counts | ever
        for name, table in self.tables.items():
            if isinstance(table, ShardedValueTable) and table.shard.placement == "rows":
                for key in (f"{name}.row_use_N", f"{name}.ever_used_N"):
                    tensors[key] = table.shard.as_dtensor(tensors[key], (table.rows,))
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `state`."""
        for name, table in self.tables.items():
            use_N, ever_N = (local_part(tensors[f"{name}.{key}"]) for key in ("row_use_N", "ever_used_N"))
            self.ever_used_N[name].copy_(ever_N)
            # The counts of all copies of a row add up.
            _row_use(table).copy_(use_N if self._copies(table).rank == 0 else torch.zeros_like(use_N))

    def report(self, batch: Batch) -> list[dict[str, Any]]:
        """A dict for every table and every layer; what is "lately" begins anew.

        Args:
            batch: text to run the layers on; targets of IGNORE mark tokens that do not count.
        """
        tables = [
            {"kind": "value_table", "name": name, **self._table_report(name, table)}
            for name, table in self.tables.items()
        ]
        if not self.layers:
            return tables
        device = self.model.embedding.weight.device
        figures: dict[str, dict[str, Any]] = {name: {} for name in self.layers}
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), _watched(self.layers, figures, (batch.targets_BS != IGNORE).to(device)):
                self.model(batch.inputs_BS.to(device))
        finally:
            self.model.train(was_training)
        return tables + [{"kind": "memory_layer", "name": name, **figures[name]} for name in self.layers]

    def _table_report(self, name: str, table: ValueTable) -> dict[str, Any]:
        use_N, ever_N = self._total_use(table), self.ever_used_N[name]
        ever_N |= use_N > 0
        parts = self._parts(table)
        figures = torch.stack([use_N.new_tensor(len(use_N)), use_N.sum(), (use_N > 0).sum(), ever_N.sum()])
        rows, reads, lately, ever = parts.add_up(figures).tolist()
        divergence = _divergence(use_N, reads, rows)
        _row_use(table).zero_()
        return {
            "rows": rows,
            "reads": reads,
            "used_lately": lately / rows,
            "used_ever": ever / rows,
            "dead_rows": rows - ever,
            "kl_from_uniform_nats": float(parts.add_up(divergence)) if reads else None,
        }

    def _copies(self, table: ValueTable) -> Group:
        """The ranks that count reads of the same rows."""
        mesh = self.ranks.mesh
        if mesh is None:
            return Group(None)
        return Group(mesh.get_group("copies") if isinstance(table, ShardedValueTable) else dist.group.WORLD)

    def _parts(self, table: ValueTable) -> Group:
        """The ranks that hold different rows."""
        if isinstance(table, ShardedValueTable) and table.shard.placement == "rows":
            assert self.ranks.mesh is not None
            return Group(self.ranks.mesh.get_group("shards"))
        return Group(None)

    def _total_use(self, table: ValueTable) -> Tensor:
        """Reads of the rows that this rank holds, by all ranks."""
        return self._copies(table).add_up(_row_use(table).clone())


def kl_from_uniform(use_N: Tensor) -> float | None:
    """`sum_n p_n ln(p_n N)` in nats of the shares `p` of the counts [N]: 0 for even use, `ln N` for a single row.

    None where nothing was counted. Fewer counts than rows can't be even: `n` reads of as many rows give `ln(N/n)`.
    """
    total = int(use_N.sum())
    if total == 0:
        return None
    return float(_divergence(use_N, total, len(use_N)))


def _divergence(use_N: Tensor, total: int, rows: int) -> Tensor:
    """The part of these rows in the divergence of `rows` with `total` reads, float64."""
    share_N = use_N.double() / max(total, 1)
    divergence: Tensor = torch.special.xlogy(share_N, share_N * rows).sum()
    return divergence


class Group(NamedTuple):
    """Ranks that add up; None: this one alone."""

    group: dist.ProcessGroup | None

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.group is not None and self.group.size() > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor


def _row_use(table: ValueTable) -> Tensor:
    assert table.row_use_N is not None
    return table.row_use_N


@contextmanager
def _watched(
    layers: dict[str, UltraMemLayer], figures: dict[str, dict[str, Any]], counted_BS: Tensor
) -> Iterator[None]:
    """Figures of one forward of `layers`, in here."""

    def watch_scores(into: dict[str, Any], output: Any) -> None:
        scores_X = output.scores.float().sum(-1)[counted_BS.flatten()]  # over cores: what a slot counts in all
        variance, mean = torch.var_mean(scores_X, correction=0)
        into |= {"score_mean": float(mean), "score_variance": float(variance)}

    def watch_output(into: dict[str, Any], output_TD: Tensor) -> None:
        into["output_rms"] = math.sqrt(float(output_TD[counted_BS.flatten()].float().square().mean()))

    handles = []
    for name, layer in layers.items():
        into = figures[name]
        handles += [
            layer.select.register_forward_hook(lambda _, __, output, into=into: watch_scores(into, output)),
            layer.expand.register_forward_hook(lambda _, __, output, into=into: watch_output(into, output)),
        ]
        if isinstance(cores_HCRR := layer.select.cores_HCRR, nn.Parameter):
            values_HR = torch.linalg.svdvals(cores_HCRR.detach().float().sum(1))
            into["singular_values"] = values_HR.tolist()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
