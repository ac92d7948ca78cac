"""Our ops in torch-tensorrt: converters that add the plugin layers of `tensorrt_plugins`, registered by one call.

    import torch_tensorrt
    from ultramem.export.torch_tensorrt import register_converters

    register_converters()
    engine = torch_tensorrt.dynamo.compile(exported_program, arg_inputs=..., require_full_compilation=True)

An op that no plugin serves is left to PyTorch by its validator, and then splits the graph.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from ultramem.export.tensorrt_library import INSTALL, require_tensorrt
from ultramem.export.tensorrt_plugins import NAMESPACE, SCRATCH_SUFFIX, register_plugins
from ultramem.ops.triton.select import fits_one_launch

TYPES = (torch.float32, torch.float16, torch.bfloat16)
Arguments = Mapping[str, Any]


def register_converters() -> tuple[str, ...]:
    """Define the plugins, and tell torch-tensorrt how each op becomes layers of them.

    Returns:
        The names of the ops.

    Raises:
        ImportError: TensorRT or torch-tensorrt is missing.
    """
    trt = require_tensorrt()
    try:
        conversion = importlib.import_module("torch_tensorrt.dynamo.conversion")
        utilities = importlib.import_module("torch_tensorrt.dynamo.conversion.converter_utils")
    except ImportError as error:
        raise ImportError(
            f"torch-tensorrt cannot be imported: {error} (pip install ultramem[tensorrt]; {INSTALL})"
        ) from error
    trtp = importlib.import_module("tensorrt.plugin")
    register_plugins(trt, trtp)
    layers = Layers(trtp, utilities.get_trt_tensor)
    for name, (build, supports) in CONVERTERS.items():
        op = getattr(torch.ops.ultramem, name).default
        register = conversion.dynamo_tensorrt_converter(
            op, capability_validator=_validator(op, supports), supports_dynamic_shapes=True
        )
        register(_converter(op, build, layers))
    return tuple(CONVERTERS)


class Layers:
    """Adds plugin layers to the network of a conversion."""

    def __init__(self, trtp: Any, get_tensor: Callable[..., Any]) -> None:
        self._trtp, self._get_tensor = trtp, get_tensor

    def add(self, ctx: Any, name: str, plugin: str, tensors: Mapping[str, Any], attributes: Arguments) -> Any:
        """The layer of a plugin on tensors, or on weights that become constants."""
        definition = getattr(getattr(self._trtp.op, NAMESPACE), plugin)
        inputs = [self._get_tensor(ctx, tensor, f"{name}_{label}") for label, tensor in tensors.items()]
        layer = ctx.net.add_plugin(definition(*inputs, **attributes), aot=True)
        if layer is None:
            raise ValueError(f"TensorRT made no layer of {NAMESPACE}::{plugin} for {name}")
        layer.name = f"[{NAMESPACE}::{plugin}]-[{name}]"
        return layer


def _lookup_reduce(layers: Layers, ctx: Any, name: str, given: Arguments) -> Any:
    tensors = {"values": given["values_ND"], "indices": _permuted(layers, ctx, name, given, "values_ND")}
    tensors["scores"] = given["scores_TKC"]
    return layers.add(ctx, name, "LookupReduce", tensors, {"num_blocks": int(given["num_blocks"])}).get_output(0)


def _lookup_reduce_quantized(layers: Layers, ctx: Any, name: str, given: Arguments) -> Any:
    tensors = {"rows": given["rows_NB"], "scales": given["scales_N"]}
    tensors |= {"indices": _permuted(layers, ctx, name, given, "rows_NB"), "scores": given["scores_TKC"]}
    attributes = {"num_blocks": int(given["num_blocks"]), "bits": 8}
    return layers.add(ctx, name, "LookupReduceQuantized", tensors, attributes).get_output(0)


def _permuted(layers: Layers, ctx: Any, name: str, given: Arguments, table: str) -> Any:
    """The slots' addresses, by a layer of their own if they are permuted: a lookup's kernel has no memory for them."""
    if given["permutation_seed"] is None:
        return given["indices_TK"]
    attributes = {"size": int(given[table].shape[0]) * int(given["num_blocks"]), "seed": int(given["permutation_seed"])}
    permute = {"addresses": given["indices_TK"]}
    return layers.add(ctx, f"{name}_permute", "PermuteAddresses", permute, attributes).get_output(0)


def _permute_addresses(layers: Layers, ctx: Any, name: str, given: Arguments) -> Any:
    attributes = {"size": int(given["size"]), "seed": int(given["seed"])}
    return layers.add(ctx, name, "PermuteAddresses", {"addresses": given["addresses"]}, attributes).get_output(0)


def _product_topk(layers: Layers, ctx: Any, name: str, given: Arguments) -> Any:
    tensors = {"row_scores": given["row_scores_THN"], "col_scores": given["col_scores_THN"]}
    layer = layers.add(ctx, name, f"ProductTopK{SCRATCH_SUFFIX}", tensors, {"k": int(given["k"])})
    return layer.get_output(0), layer.get_output(1)


def _tucker_topk(layers: Layers, ctx: Any, name: str, given: Arguments) -> Any:
    names = ("row_scores_THRN", "col_scores_THRN", "cores_HCRR", "u_HR", "t_HR")
    tensors = {each.rpartition("_")[0]: given[each] for each in names}
    attributes = {"k": int(given["k"]), "candidates": str(given["candidates"])}
    layer = layers.add(ctx, name, f"TuckerTopK{SCRATCH_SUFFIX}", tensors, attributes)
    return layer.get_output(0), layer.get_output(1)


def _has_lookup(given: Arguments) -> bool:
    return given["values_ND"].dtype in TYPES and given["scores_TKC"].dtype in TYPES


def _has_quantized_lookup(given: Arguments) -> bool:
    return given["rows_NB"].dtype == torch.int8 and given["scores_TKC"].dtype in TYPES


def _has_permutation(given: Arguments) -> bool:
    return given["inverse"] is False


def _has_selection(given: Arguments) -> bool:
    scores = given["row_scores_THRN" if "row_scores_THRN" in given else "row_scores_THN"]
    side = int(scores.shape[-1])
    return scores.dtype in TYPES and given["k"] <= side and fits_one_launch(side, given["k"])


# For each op: what adds its layers, and whether the plugins serve these arguments.
CONVERTERS: dict[str, tuple[Callable[[Layers, Any, str, Arguments], Any], Callable[[Arguments], bool]]] = {
    "lookup_reduce": (_lookup_reduce, _has_lookup),
    "lookup_reduce_quantized": (_lookup_reduce_quantized, _has_quantized_lookup),
    "permute_addresses": (_permute_addresses, _has_permutation),
    "product_topk": (_product_topk, _has_selection),
    "tucker_topk": (_tucker_topk, _has_selection),
}


def _by_name(op: Any, args: tuple[Any, ...], kwargs: Arguments) -> dict[str, Any]:
    """The arguments of a call by the names of the op's schema, those that are left out included."""
    given = {}
    for index, argument in enumerate(op._schema.arguments):
        given[argument.name] = args[index] if index < len(args) else kwargs.get(argument.name, argument.default_value)
    return given


def _validator(op: Any, supports: Callable[[Arguments], bool]) -> Callable[[Node, Any], bool]:
    def validate(node: Node, settings: Any = None) -> bool:
        given = _by_name(op, node.args, node.kwargs)
        return supports({key: each.meta["val"] if isinstance(each, Node) else each for key, each in given.items()})

    return validate


def _converter(op: Any, build: Callable[..., Any], layers: Layers) -> Callable[..., Any]:
    def convert(ctx: Any, target: Any, args: tuple[Any, ...], kwargs: Arguments, name: str) -> Any:
        return build(layers, ctx, name, _by_name(op, args, kwargs))

    return convert
