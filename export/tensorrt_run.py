"""A TensorRT engine as a function of the model's inputs: buffers are CUDA tensors of PyTorch's, the cache stays there.

Written against TensorRT's documented interface and tested with a stand-in for it; not yet run (docs/tensorrt.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultramem.config import ModelConfig
from ultramem.export.options import ExportOptions
from ultramem.export.signature import TensorSpec, tensor_specs
from ultramem.export.tensorrt_library import require_gpu, require_tensorrt

PLAN = "model.plan"


class TensorrtModel:
    """The model as a function of its inputs, in order; one execution context for each profile.

    A call returns tensors on the CPU; `step` leaves the cache on the device, where the next step takes it.
    """

    def __init__(
        self,
        trt: Any,
        plan: bytes,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        device: torch.device,
        stream: Callable[[], int],
    ) -> None:
        """`stream` gives the handle of the CUDA stream to run on, or 0 for the default one."""
        self._inputs, self._outputs, self._device, self._stream = tuple(inputs), tuple(outputs), device, stream
        # The runtime must outlive its engine, and the engine its contexts.
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ValueError("TensorRT does not take the engine: it is of another version or GPU (export it again)")
        self._names = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}
        wanted = {each.name for each in (*self._inputs, *self._outputs)}
        if not wanted.issuperset(self._names) or not {each.name for each in self._outputs}.issubset(self._names):
            raise ValueError(f"the engine must have tensors of {', '.join(sorted(wanted))}, got {sorted(self._names)}")
        self._contexts: list[Any] = []
        for index in range(self._engine.num_optimization_profiles):
            context = self._engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(index, stream()):
                raise ValueError(f"TensorRT makes no context for profile {index}: is there too little memory?")
            self._contexts.append(context)

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(each.cpu() for each in self._run(inputs))

    def step(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """As a call, but only the logits leave the device."""
        logits, *state = self._run(inputs)
        return logits.cpu(), *state

    def profile_of(self, inputs: Sequence[Tensor]) -> int:
        """The last profile that the shapes fit, as decode comes after prefill.

        Raises:
            ValueError: they fit none; the message names an input, its shape and the ranges.
        """
        problem = ""
        for index in reversed(range(len(self._contexts))):
            problem = next(
                filter(None, (self._problem(*each, index) for each in zip(self._inputs, inputs, strict=True))), ""
            )
            if not problem:
                return index
        raise ValueError(problem)

    def _problem(self, spec: TensorSpec, tensor: Tensor, profile: int) -> str:
        if spec.name not in self._names:
            return ""
        least, _, most = self._engine.get_tensor_profile_shape(spec.name, profile)
        if all(a <= size <= b for a, size, b in zip(least, tensor.shape, most, strict=True)):
            return ""
        return (
            f"{spec.name} must have a shape from {list(least)} to {list(most)}, which the engine was built for, "
            f"got {list(tensor.shape)}"
        )

    def _run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        context = self._contexts[self.profile_of(inputs)]
        kept = []  # until the outputs are there
        for spec, tensor in zip(self._inputs, inputs, strict=True):
            if spec.name in self._names:
                moved = tensor.to(self._device).contiguous()
                # An address must be one, even of a cache without tokens.
                kept.append(moved if moved.numel() else moved.new_empty(1))
                if not context.set_input_shape(spec.name, tuple(tensor.shape)):
                    raise ValueError(f"{spec.name}: TensorRT refuses the shape {list(tensor.shape)}")
                context.set_tensor_address(spec.name, kept[-1].data_ptr())
        if missing := context.infer_shapes():
            raise ValueError(f"TensorRT cannot tell the shapes of the outputs: {', '.join(missing)} are not set")
        outputs = []
        for spec in self._outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            outputs.append(torch.empty(shape, dtype=getattr(torch, spec.dtype), device=self._device))
            context.set_tensor_address(spec.name, outputs[-1].data_ptr())
        if not context.execute_async_v3(self._stream()):
            raise RuntimeError("TensorRT did not run the engine: its log above says why")
        return tuple(outputs)


def load_tensorrt(folder: Path, config: ModelConfig, options: ExportOptions) -> TensorrtModel:
    """Open `model.plan` of an export folder on the current GPU.

    Raises:
        ImportError: TensorRT is missing.
        ValueError: there is no GPU, or the engine is for another one or another version.
    """
    trt = require_tensorrt()
    require_gpu()
    inputs, outputs = tensor_specs(config, options, seq=options.seq)
    return TensorrtModel(
        trt,
        (folder / PLAN).read_bytes(),
        inputs,
        outputs,
        device=torch.device("cuda"),
        stream=lambda: torch.cuda.current_stream().cuda_stream,
    )
