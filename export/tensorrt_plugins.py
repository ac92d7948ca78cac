"""TensorRT plugins for the nodes of this package, by `tensorrt.plugin`: our Triton kernels, compiled into the engine.

`aot_impl` hands TensorRT the PTX of one launch, so that an engine needs neither Python nor Triton where it runs. A
launch has no workspace, hence the scratch memory of a selection is two more outputs that nobody reads, and its plugins
have names of their own: a file whose nodes have two outputs is parsed by their bodies, or changed first by
`tensorrt_scratch`. LookupDot is left to its body.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ultramem.export import tensorrt_launch as launches
from ultramem.export.tensorrt_launch import Launch, Operand
from ultramem.ops.triton.ahead_of_time import compile_ahead
from ultramem.ops.triton.select import scratch_sizes

NAMESPACE = "ultramem"
SCRATCH_SUFFIX = "WithScratch"
# Type of Triton, name of a member of trt.DataType, name in an AutoTuneCombination.
TYPES = (
    ("fp32", "FLOAT", "FP32"),
    ("fp16", "HALF", "FP16"),
    ("bf16", "BF16", "BF16"),
    ("i64", "INT64", "INT64"),
    ("i8", "INT8", "INT8"),
)
MAX_SHARED_BYTES = 48 * 1024  # more must be asked of the driver before a launch, which TensorRT was not seen to do


@dataclass(frozen=True, kw_only=True, slots=True)
class Plugin:
    """A plugin as plain functions of shapes and types."""

    name: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, type]
    outputs: int
    describe: Callable[[Sequence[Operand], Mapping[str, Any]], tuple[Operand, ...]]
    """Shapes and types of the outputs."""
    tactics: Callable[[Sequence[Operand], Mapping[str, Any]], tuple[int, ...]]
    launch: Callable[[Sequence[Operand], Sequence[Operand], Mapping[str, Any], int, Any], Launch]

    @property
    def id(self) -> str:
        return f"{NAMESPACE}::{self.name}"


def _pooled(inputs: Sequence[Operand], attributes: Mapping[str, Any]) -> tuple[Operand, ...]:
    values, indices, _ = inputs
    return (Operand((indices.shape[0], attributes["num_blocks"], values.shape[1]), values.dtype),)


def _pooled_quantized(inputs: Sequence[Operand], attributes: Mapping[str, Any]) -> tuple[Operand, ...]:
    rows, _, indices, scores = inputs
    return (Operand((indices.shape[0], attributes["num_blocks"], rows.shape[1]), scores.dtype),)


def _same(inputs: Sequence[Operand], attributes: Mapping[str, Any]) -> tuple[Operand, ...]:
    return (inputs[0],)


def _best(inputs: Sequence[Operand], attributes: Mapping[str, Any]) -> tuple[Operand, ...]:
    """Scores, addresses, and the two scratch memories of the kernel."""
    row, k = inputs[0], attributes["k"]
    t, h = row.shape[:2]
    if len(inputs) == 2:
        scores, r, candidates = Operand((t, h, k), row.dtype), 1, "one_tailed"
    else:
        scores, r = Operand((t, h, k, inputs[2].shape[1]), row.dtype), row.shape[2]
        candidates = attributes["candidates"]
    tails, size, slots = scratch_sizes(k, candidates)
    found = Operand((t, h, (2 * tails + 1) * slots), "i64")
    chosen = Operand((t, h, (r + 1) * (2 * tails * size)), "fp32")
    return scores, Operand((t, h, k), "i64"), found, chosen


PLUGINS = (
    Plugin(
        name="LookupReduce",
        inputs=("values", "indices", "scores"),
        attributes={"num_blocks": int},
        outputs=1,
        describe=_pooled,
        tactics=launches.lookup_reduce_tactics,
        launch=launches.lookup_reduce,
    ),
    Plugin(
        name="LookupReduceQuantized",
        inputs=("rows", "scales", "indices", "scores"),
        attributes={"num_blocks": int, "bits": int},
        outputs=1,
        describe=_pooled_quantized,
        tactics=launches.lookup_reduce_quantized_tactics,
        launch=launches.lookup_reduce_quantized,
    ),
    Plugin(
        name="PermuteAddresses",
        inputs=("addresses",),
        attributes={"size": int, "seed": int},
        outputs=1,
        describe=_same,
        tactics=launches.one_tactic,
        launch=launches.permute_addresses,
    ),
    Plugin(
        name=f"ProductTopK{SCRATCH_SUFFIX}",
        inputs=("row_scores", "col_scores"),
        attributes={"k": int},
        outputs=4,
        describe=_best,
        tactics=launches.one_tactic,
        launch=launches.topk,
    ),
    Plugin(
        name=f"TuckerTopK{SCRATCH_SUFFIX}",
        inputs=("row_scores", "col_scores", "cores", "u", "t"),
        attributes={"k": int, "candidates": str},
        outputs=4,
        describe=_best,
        tactics=launches.one_tactic,
        launch=launches.topk,
    ),
)


def register_plugins(trt: Any, trtp: Any, *, capability: int | None = None) -> None:
    """Define the plugins in this process; those that it has are left as they are.

    Args:
        trt: the module `tensorrt`.
        trtp: the module `tensorrt.plugin`.
        capability: ten times the compute capability to compile for; None: of the current GPU.
    """
    defined = getattr(trtp.op, NAMESPACE, None)
    for each in PLUGINS:
        if defined is None or not hasattr(defined, each.name):
            _register(trt, trtp, each, capability)


def _register(trt: Any, trtp: Any, plugin: Plugin, capability: int | None) -> None:
    tensors = dict.fromkeys(plugin.inputs, trtp.TensorDesc)
    outputs = {"outputs": tuple[(trtp.TensorDesc,) * plugin.outputs]}  # type: ignore[misc]  # built at run time
    results = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]

    def describe(*descriptors: Any, **attributes: Any) -> Any:
        inputs = [Operand(tuple(each.shape_expr), _triton_type(trt, each.dtype)) for each in descriptors]
        found = plugin.describe(inputs, _cleaned(attributes))
        made = tuple(trtp.from_shape_expr(tuple(each.shape), _data_type(trt, each.dtype)) for each in found)
        return made[0] if plugin.outputs == 1 else made

    def autotune(*arguments: Any) -> Any:
        inputs, outputs, attributes = _sorted(trt, plugin, arguments)
        names = ",".join(_tuning_name(each.dtype) for each in (*inputs, *outputs))
        return [trtp.AutoTuneCombination(names, "LINEAR", list(plugin.tactics(inputs, attributes)))]

    def compile_one(*arguments: Any) -> Any:
        *rest, tactic = arguments
        inputs, outputs, attributes = _sorted(trt, plugin, rest)
        launch = plugin.launch(inputs, outputs, attributes, tactic, trtp.cdiv)
        compiled = compile_ahead(launch.kernel, launch.types, launch.constants, capability or _capability())
        if compiled.shared_bytes > MAX_SHARED_BYTES:
            raise ValueError(
                f"{plugin.id} must take at most {MAX_SHARED_BYTES} bytes of shared memory, got {compiled.shared_bytes}"
            )
        params = trtp.KernelLaunchParams()
        params.grid_x, params.grid_y = launch.grid
        params.block_x, params.shared_mem = compiled.threads, compiled.shared_bytes
        numbers = trtp.SymIntExprs(len(launch.numbers))
        for index, number in enumerate(launch.numbers):
            numbers[index] = trtp.SymInt32(number)
        return compiled.name, compiled.ptx, params, numbers

    returned = trtp.TensorDesc if plugin.outputs == 1 else outputs["outputs"]
    _sign(describe, {**tensors, **plugin.attributes}, returned)
    _sign(autotune, {**tensors, **plugin.attributes, **outputs}, list[trtp.AutoTuneCombination])
    _sign(compile_one, {**tensors, **plugin.attributes, **outputs, "tactic": int}, results)
    trtp.register(plugin.id)(describe)
    trtp.autotune(plugin.id)(autotune)
    trtp.aot_impl(plugin.id)(compile_one)


def _sign(function: Any, parameters: Mapping[str, Any], returned: Any) -> None:
    """The signature that TensorRT reads names and types from."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    listed = [inspect.Parameter(name, kind, annotation=each) for name, each in parameters.items()]
    function.__signature__ = inspect.Signature(listed, return_annotation=returned)


def _sorted(trt: Any, plugin: Plugin, arguments: Sequence[Any]) -> tuple[list[Operand], list[Operand], dict[str, Any]]:
    """Inputs and outputs, whose constant sizes are ints, and attributes, of the arguments in TensorRT's order."""
    count = len(plugin.inputs)
    inputs, values, outputs = arguments[:count], arguments[count:-1], arguments[-1]
    attributes = dict(zip(plugin.attributes, values, strict=True))
    operands = [_operand(trt, each) for each in (*inputs, *outputs)]
    return operands[:count], operands[count:], _cleaned(attributes)


def _operand(trt: Any, descriptor: Any) -> Operand:
    sizes = tuple(each.constant_value() if each.is_constant else each for each in descriptor.shape_expr)
    return Operand(sizes, _triton_type(trt, descriptor.dtype))


def _cleaned(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """A string that comes out of an ONNX file may end with its zero byte."""
    return {name: each.rstrip("\0") if isinstance(each, str) else each for name, each in attributes.items()}


def _triton_type(trt: Any, dtype: Any) -> str:
    for ours, theirs, _ in TYPES:
        if dtype == getattr(trt.DataType, theirs):
            return ours
    raise ValueError(f"a plugin of {NAMESPACE} takes tensors of {', '.join(each[0] for each in TYPES)}, got {dtype}")


def _data_type(trt: Any, dtype: str) -> Any:
    return next(getattr(trt.DataType, theirs) for ours, theirs, _ in TYPES if ours == dtype)


def _tuning_name(dtype: str) -> str:
    return next(name for ours, _, name in TYPES if ours == dtype)


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor
