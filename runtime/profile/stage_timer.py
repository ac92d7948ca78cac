"""The way of telling stages apart that each engine has."""

from __future__ import annotations

import torch

from ultramem.export.onnx_session import OnnxModel
from ultramem.graph import Transformer
from ultramem.runtime.profile.device_stages import eager_device_stages, kernel_device_stages
from ultramem.runtime.profile.eager_stages import eager_stages
from ultramem.runtime.profile.in_step import agreed
from ultramem.runtime.profile.inductor_stages import kernel_stages
from ultramem.runtime.profile.measure import Cell, percentile
from ultramem.runtime.profile.onnx_stages import StampedSessions, onnx_stages, open_stamped
from ultramem.runtime.profile.opening import Opened
from ultramem.runtime.profile.schema import StageTimes
from ultramem.runtime.profile.stages import not_separable

REPEATS = 60
SECONDS = 1.0
"""Time for the instrumented forwards of one engine, batch and phase; ten of them run in any case."""


class StageTimer:
    """Stages of one engine, cell after cell."""

    def __init__(self, model: Transformer, opened: Opened) -> None:
        self._model = model
        self._opened = opened
        self._stamped: StampedSessions | str | None = None
        """Opened at the first cell; a text says why it cannot be."""

    def stages(self, cell: Cell) -> StageTimes:
        engine = self._opened.engine
        device = self._model.embedding.weight.device
        repeats = agreed(max(10, min(REPEATS, int(1e6 * SECONDS / percentile(cell.samples_us, 0.5)))))
        on_gpu = device.type == "cuda"
        if engine.name == "eager":
            # The engine's own model, which is not `model` but shares its weights.
            model = getattr(engine, "model", self._model)
            timed = eager_device_stages if on_gpu else eager_stages
            return timed(model, cell, repeats=repeats, device=device)
        if engine.name == "tensorrt":
            return not_separable(cell, "an engine's kernels are TensorRT's own, which cross the stages")
        session = getattr(getattr(engine, "artifact", None), "run", None)
        if isinstance(session, OnnxModel):
            if device.type != "cpu":
                return not_separable(cell, f"ONNX Runtime's nodes are told apart on a CPU only, this is {device}")
            return self._onnx_stages(session, cell, repeats, device)
        if on_gpu:
            return kernel_device_stages(cell, engine, self._opened.graphs, repeats=repeats, device=device)
        return kernel_stages(cell, self._opened.graphs, repeats=repeats, device=device)

    def _onnx_stages(self, model: OnnxModel, cell: Cell, repeats: int, device: torch.device) -> StageTimes:
        if self._stamped is None:
            assert self._opened.folder is not None
            self._stamped = open_stamped(self._opened.folder / "model.onnx", model, cell)
        if isinstance(self._stamped, str):
            return not_separable(cell, self._stamped)
        return onnx_stages(self._stamped, cell, repeats=repeats, device=device)
