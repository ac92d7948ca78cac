"""Inductor's CUDA code of a graph, written on a machine without a GPU.

A graph is traced on fake CPU tensors with the Triton kernels forced, moved to a fake CUDA device, and given to
Inductor's code generator, which never launches anything. What the generator asks of a device is answered for an H100.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torch.utils._triton import has_triton
from triton.backends.compiler import GPUTarget


class _Properties:
    name = "H100"
    major, minor = 9, 0
    multi_processor_count = 132
    total_memory = 80 << 30
    regs_per_multiprocessor = 65536
    max_threads_per_multi_processor, max_threads_per_block = 2048, 1024
    warp_size = 32
    shared_memory_per_block, shared_memory_per_block_optin = 49152, 232448
    L2_cache_size = 50 << 20
    gcnArchName = uuid = ""


_HINTS = DeviceProperties(
    type="cuda",
    index=0,
    multi_processor_count=_Properties.multi_processor_count,
    cc=90,
    major=_Properties.major,
    regs_per_multiprocessor=_Properties.regs_per_multiprocessor,
    max_threads_per_multi_processor=_Properties.max_threads_per_multi_processor,
    max_threads_per_block=_Properties.max_threads_per_block,
    warp_size=_Properties.warp_size,
)


class _Driver:
    """What tracing and code generation ask of Triton's driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


def fake_driver() -> AbstractContextManager[Any]:
    """Triton sees an H100 inside the block: enough to trace its kernels."""
    return mock.patch.object(triton.runtime.driver, "_active", _Driver())


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Torch and Triton see an H100 inside the block: enough to generate code."""
    rng_state = torch.zeros(16, dtype=torch.uint8)
    answers: dict[str, Any] = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.is_initialized": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.get_device_properties": lambda *_: _Properties,
        "torch.cuda.get_device_capability": lambda *_: (9, 0),
        "torch.cuda.get_rng_state": lambda *_: rng_state,
        "torch.cuda.set_rng_state": lambda *_: None,
        "torch.cuda.synchronize": lambda *_: None,
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda._exchange_device": lambda _: 0,
        "torch.cuda._maybe_exchange_device": lambda _: 0,
        "torch._C._cuda_getDevice": lambda: 0,
        "torch._C._cuda_setDevice": lambda _: None,
        "torch._C._cuda_exchangeDevice": lambda _: 0,
        "torch._C._cuda_maybeExchangeDevice": lambda _: 0,
        "torch._C._cuda_getCurrentRawStream": lambda _: 0,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(fake_driver())
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, answer, create=True))
        for owner, name, replacement in (
            (DeviceProperties, "create", classmethod(lambda cls, device: _HINTS)),
            (CudaInterface, "get_device_properties", staticmethod(lambda *_: _Properties)),
            (CudaInterface.Worker, "get_device_properties", staticmethod(lambda *_: _Properties)),
            (CudaInterface, "get_compute_capability", staticmethod(lambda *_: 90)),
            (CudaInterface, "is_available", staticmethod(lambda *_: True)),
            # The method guards the device in C++ before any fake tensor is asked; the op does not.
            (torch.Tensor, "copy_", lambda self, source: torch.ops.aten.copy_.default(self, source)),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(torch._inductor.config.patch(compile_threads=1))
        has_triton.cache_clear()  # it may have been asked before
        stack.callback(has_triton.cache_clear)
        yield


def cuda_code(
    graph: GraphModule,
    inputs: list[Any],
    mode: FakeTensorMode,
    *,
    is_backward: bool = False,
    is_inference: bool = False,
) -> str:
    """Inductor's Python wrapper for a graph of AOTAutograd, whose fake CPU `inputs` are moved to CUDA."""
    with mode, fake_cuda():
        inputs = to_cuda(graph, inputs)
        view_to_reshape(graph)
        with V.set_fake_mode(mode):
            post_grad_passes(graph, is_inference)
            lowering = GraphLowering(
                graph,
                shape_env=mode.shape_env,
                example_inputs=inputs,
                is_backward=is_backward,
                is_inference=is_inference,
            )
            with (
                V.set_graph_handler(lowering),
                V.set_extern_kernel_nodes([]),
                V.set_debug_handler(DebugContext()),
                V.set_real_inputs(inputs),
            ):
                lowering.run(*inputs)
                wrapper, _ = lowering.codegen()
    code: str = wrapper.value
    return code


def to_cuda(graph: GraphModule, inputs: list[Any]) -> list[Any]:
    """Move a graph's fake values to CUDA, in place, and return the fake inputs there; inside of `fake_cuda`."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="cuda")

    for node in graph.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(move, node.meta["val"])
        node.kwargs = {
            key: torch.device("cuda", 0) if isinstance(value, torch.device) else value
            for key, value in node.kwargs.items()
        }
    graph.recompile()
    return [move(each) for each in inputs]
