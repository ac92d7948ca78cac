"""The weights of an export: those of a trained model, rounded as the options say."""

from __future__ import annotations

import torch

from ultramem.export.options import TABLE_BITS, ExportOptions
from ultramem.graph.gathered_table import rounded_to
from ultramem.graph.quantized_table import quantize_tables
from ultramem.graph.transformer import Transformer


def rounded(model: Transformer, options: ExportOptions) -> Transformer:
    """The model itself if nothing is to be rounded; else one with new weights, `model` unchanged.

    Raises:
        ValueError: the model is not float32 in eval mode on the CPU, or has no tables to be quantised.
    """
    if model.training:
        raise ValueError("the model must be in eval mode to be exported (call model.eval())")
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise ValueError(
                f"the model must be float32 on the CPU to be exported (dtype rounds it), "
                f"{name} is {str(parameter.dtype).removeprefix('torch.')} on {parameter.device}"
            )
    if options.table is not None:
        if model.config.memory is None:
            raise ValueError(f"table must be None for a model without memory layers, got {options.table!r}")
        model = quantize_tables(model, TABLE_BITS[options.table])
    return model if options.dtype == "fp32" else rounded_to(model, options.torch_dtype)
