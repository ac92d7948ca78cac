"""The export to TensorRT with the stand-in for it, whose device memory is the CPU's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

from benchmarks.tensorrt_stand_in import stand_in
from ultramem.config import ModelConfig
from ultramem.export import ExportOptions, tensorrt, tensorrt_plugins
from ultramem.export.signature import tensor_specs
from ultramem.export.tensorrt_run import PLAN, TensorrtModel

CAPABILITY = 90


@contextlib.contextmanager
def rehearsal() -> Iterator[ModuleType]:
    """Inside the block an export to TensorRT goes its whole way, for an H100 that is not there."""
    with stand_in() as trt:

        def load(folder: Path, config: ModelConfig, options: ExportOptions) -> TensorrtModel:
            inputs, outputs = tensor_specs(config, options, seq=options.seq)
            plan = (folder / PLAN).read_bytes()
            return TensorrtModel(trt, plan, inputs, outputs, device=torch.device("cpu"), stream=lambda: 0)

        with (
            mock.patch.object(tensorrt, "require_gpu"),
            mock.patch.object(tensorrt, "load_tensorrt", load),
            mock.patch.object(tensorrt_plugins, "_capability", return_value=CAPABILITY),
        ):
            yield trt
