"""Inputs and outputs of an exported model: names, sizes, types, and what a call must look like.

Shapes: B batch, S new tokens, P cached tokens, A attention heads, X head dim, D hidden size, W convolution width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ultramem.config import ModelConfig
from ultramem.export.options import ExportOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """An input or output; a free size is a name or a sum of a name and a name or number."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


def input_names(num_layers: int, num_convs: int) -> tuple[str, ...]:
    """The names that Optimum made common; `past_conv.{j}` for the query convolution of memory layer j."""
    return (
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past_key_values.{i}.{side}" for i in range(num_layers) for side in ("key", "value")),
        *(f"past_conv.{j}" for j in range(num_convs)),
    )


def output_names(num_layers: int, num_convs: int) -> tuple[str, ...]:
    return (
        "logits",
        *(f"present.{i}.{side}" for i in range(num_layers) for side in ("key", "value")),
        *(f"present_conv.{j}" for j in range(num_convs)),
    )


def tensor_specs(
    config: ModelConfig, options: ExportOptions, *, seq: int | None
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of an exported model, in order; `seq` is the fixed number of new tokens, if it is fixed."""
    dtype = str(options.torch_dtype).removeprefix("torch.")
    batch: int | str = options.batch or "batch"
    new: int | str = seq or "seq"
    total = f"past + {new}"

    def state(length: str) -> list[tuple[int | str, ...]]:
        keys = (batch, config.num_heads, length, config.head_dim)
        conv = (batch, config.hidden_size, config.conv_length)
        return [keys] * (2 * config.num_layers) + [conv] * config.num_convs

    shapes = ((batch, new), (batch, total), (batch, new))
    names = input_names(config.num_layers, config.num_convs)
    inputs = [TensorSpec(name=name, shape=shape, dtype="int64") for name, shape in zip(names, shapes, strict=False)]
    inputs += [
        TensorSpec(name=name, shape=shape, dtype=dtype) for name, shape in zip(names[3:], state("past"), strict=True)
    ]
    outputs = [
        TensorSpec(name=name, shape=shape, dtype=dtype)
        for name, shape in zip(
            output_names(config.num_layers, config.num_convs),
            [(batch, new, config.vocab_size), *state(total)],
            strict=True,
        )
    ]
    return tuple(inputs), tuple(outputs)


def check_inputs(specs: Sequence[TensorSpec], inputs: Sequence[Tensor], vocab_size: int) -> None:
    """Raise unless `inputs` are what the specs say, sizes of one name agree, and every token is in the vocabulary.

    Engines read memory by these sizes and ids, some of them unchecked.

    Raises:
        ValueError: the message names the input, what it is and what is accepted.
    """
    if len(inputs) != len(specs):
        raise ValueError(f"the model takes {len(specs)} inputs ({', '.join(s.name for s in specs)}), got {len(inputs)}")
    sizes: dict[str, int] = {}
    for spec, tensor in zip(specs, inputs, strict=True):
        if not isinstance(tensor, Tensor) or tensor.dtype != getattr(torch, spec.dtype):
            found = str(tensor.dtype).removeprefix("torch.") if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{spec.name} must be a {spec.dtype} tensor, got {found}")
        if tensor.device.type != "cpu":
            raise ValueError(f"{spec.name} must be on the CPU, got {tensor.device}")
        if tensor.ndim != len(spec.shape):
            raise ValueError(f"{spec.name} must have shape {_text(spec)}, got {tuple(tensor.shape)}")
        for wanted, size in zip(spec.shape, tensor.shape, strict=True):
            if isinstance(wanted, str) and wanted.isidentifier():
                sizes.setdefault(wanted, size)
    for spec, tensor in zip(specs, inputs, strict=True):
        shape = tuple(_size(each, sizes) for each in spec.shape)
        if tuple(tensor.shape) != shape:
            names = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(f"{spec.name} must have shape {_text(spec)} with {names}, got {tuple(tensor.shape)}")
    ids = inputs[0]
    if ids.numel() == 0:
        raise ValueError(f"{specs[0].name} must hold at least one token, got shape {tuple(ids.shape)}")
    least, most = (int(each) for each in ids.aminmax())
    if least < 0 or most >= vocab_size:
        raise ValueError(f"{specs[0].name} must be tokens in 0..{vocab_size - 1}, got {least if least < 0 else most}")


def _text(spec: TensorSpec) -> str:
    return f"[{', '.join(map(str, spec.shape))}]"


def _size(wanted: int | str, sizes: dict[str, int]) -> int:
    if isinstance(wanted, int):
        return wanted
    return sum(int(word) if word.isdecimal() else sizes[word] for word in wanted.split(" + "))
