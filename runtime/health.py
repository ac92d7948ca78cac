"""Health of a model's memory: which rows of its tables are used, and what its layers score and put out.

The rows are counted in the training graph itself (`ValueTable.row_use_N`); scores and outputs come from one batch of
held-out text, run eagerly in eval mode, so that training does not notice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ultramem.graph import Transformer
from ultramem.graph.memory_layer import UltraMemLayer
from ultramem.graph.value_table import ValueTable
from ultramem.runtime.data import IGNORE, Batch


class MemoryHealth:
    """Counts the use of every table of `model` from now on; make it before the model is compiled."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.layers = {name: each for name, each in model.named_modules() if isinstance(each, UltraMemLayer)}
        self.tables = {name: each for name, each in model.named_modules() if isinstance(each, ValueTable)}
        self.ever_used_N: dict[str, Tensor] = {}
        for name, table in self.tables.items():
            table.count_row_use()
            self.ever_used_N[name] = torch.zeros(len(table.values_NV), dtype=torch.bool, device=table.values_NV.device)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs to report the same figures."""
        return {f"{name}.row_use_N": _row_use(table) for name, table in self.tables.items()} | {
            f"{name}.ever_used_N": ever_N for name, ever_N in self.ever_used_N.items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `state`."""
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])

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
        use_N, ever_N = _row_use(table), self.ever_used_N[name]
        ever_N |= use_N > 0
        rows, reads = len(use_N), int(use_N.sum())
        ever = int(ever_N.sum())
        report = {
            "rows": rows,
            "reads": reads,
            "used_lately": int((use_N > 0).sum()) / rows,
            "used_ever": ever / rows,
            "dead_rows": rows - ever,
            "kl_from_uniform_nats": kl_from_uniform(use_N),
        }
        use_N.zero_()
        return report


def kl_from_uniform(use_N: Tensor) -> float | None:
    """`sum_n p_n ln(p_n N)` in nats of the shares `p` of the counts [N]: 0 for even use, `ln N` for a single row.

    None where nothing was counted. Fewer counts than rows can't be even: `n` reads of as many rows give `ln(N/n)`.
    """
    total = int(use_N.sum())
    if total == 0:
        return None
    share_N = use_N.double() / total
    return float(torch.special.xlogy(share_N, share_N * len(use_N)).sum())


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

    def watch_output(into: dict[str, Any], output_BSD: Tensor) -> None:
        into["output_rms"] = math.sqrt(float(output_BSD[counted_BS].float().square().mean()))

    handles = []
    for name, layer in layers.items():
        into = figures[name]
        handles += [
            layer.select.register_forward_hook(lambda _, __, output, into=into: watch_scores(into, output)),
            layer.register_forward_hook(lambda _, __, output, into=into: watch_output(into, output)),
        ]
        if isinstance(cores_HCRR := layer.select.cores_HCRR, nn.Parameter):
            values_HR = torch.linalg.svdvals(cores_HCRR.detach().float().sum(1))
            into["singular_values"] = values_HR.tolist()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
