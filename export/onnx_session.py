"""An exported file in ONNX Runtime on the CPU, by this package's kernels or by standard operators alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultramem.export.extras import require
from ultramem.export.onnx_plugin import find_plugin, register

FILE = "model.onnx"


class OnnxModel:
    """The model as a function of its inputs, in order."""

    def __init__(self, session: Any, kernels: str) -> None:
        self.session = session
        """An `onnxruntime.InferenceSession`."""
        self.kernels = kernels
        """What runs the nodes of this package: the plugin library, or standard operators and why."""
        self._names = [each.name for each in session.get_inputs()]

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        feeds = {name: tensor.numpy() for name, tensor in zip(self._names, inputs, strict=True)}
        return tuple(torch.from_numpy(output) for output in self.session.run(None, feeds))


def load_onnx(folder: Path, *, threads: int | None = None, plugin: bool | None = False) -> OnnxModel:
    """Open `model.onnx` of an export folder.

    Args:
        folder: of the export.
        threads: within a node; None: as ONNX Runtime chooses.
        plugin: True: the plugin library's kernels run the nodes of this package; False: their bodies of standard
            operators do; None: the kernels where they are built.

    Raises:
        ImportError: onnxruntime is missing.
        RuntimeError: `plugin` is True and the plugin library is not built.
    """
    runtime = require("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # it warns of each half precision constant that it cannot fold
    if threads is not None:
        options.intra_op_num_threads = threads
    kernels = _kernels(options, plugin)
    session = runtime.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])
    return OnnxModel(session, kernels)


def _kernels(options: Any, plugin: bool | None) -> str:
    if plugin is False:
        return "standard operators"
    if plugin is None and (problem := find_plugin().problem):
        return f"standard operators ({problem})"
    return f"the kernels of {register(options).name}"
