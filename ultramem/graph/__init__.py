"""The model families as nn.Modules, and compile-time work on them."""

from ultramem.graph.fold_for_inference import fold_for_inference
from ultramem.graph.memory_layer import UltraMemLayer
from ultramem.graph.parameter_groups import param_groups
from ultramem.graph.transformer import Cache, ModelOutput, Transformer, build_model
from ultramem.graph.weights import load

__all__ = [
    "Cache",
    "ModelOutput",
    "Transformer",
    "UltraMemLayer",
    "build_model",
    "fold_for_inference",
    "load",
    "param_groups",
]
