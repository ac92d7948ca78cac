"""Lowering of a model to other engines: captured once, rewritten by named passes, compared with eager."""

from ultramem.export.artifact import ENGINES, Artifact, export_model, load_artifact
from ultramem.export.export_parts import export_parts
from ultramem.export.manifest import Manifest
from ultramem.export.onnx_plugin import register
from ultramem.export.onnx_stages import stage_of_node, stages_of_optimized_model
from ultramem.export.options import ExportOptions

__all__ = [
    "ENGINES",
    "Artifact",
    "ExportOptions",
    "Manifest",
    "export_model",
    "export_parts",
    "load_artifact",
    "register",
    "stage_of_node",
    "stages_of_optimized_model",
]
