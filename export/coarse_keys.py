"""Which graphs of an export choose candidates by coarse keys."""

from __future__ import annotations

from ultramem.export.options import ExportOptions
from ultramem.graph.coarse_keys import CoarseScore
from ultramem.graph.fold_for_inference import fold_for_inference
from ultramem.graph.transformer import Transformer


def with_coarse_keys(model: Transformer, options: ExportOptions, *, seq: int | None) -> Transformer:
    """The model that a graph is captured from: `model` itself, or one with coarse keys that shares all else.

    Args:
        model: in eval mode.
        options: of the export.
        seq: number of new tokens of the graph; None: any.
    """
    wanted = options.coarse_keys
    if wanted is False or (wanted is None and (seq != 1 or options.device != "cpu")):
        return model
    folded = fold_for_inference(model, coarse_keys=wanted)
    return folded if any(isinstance(module, CoarseScore) for module in folded.modules()) else model
