"""TensorRT: the ONNX file of every other runtime, and an engine that is built from it on this GPU."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ultramem.config import ModelConfig
from ultramem.export import onnx
from ultramem.export.backend import Backend, Run
from ultramem.export.extras import require
from ultramem.export.onnx import FILE as ONNX_FILE
from ultramem.export.options import ExportOptions
from ultramem.export.program import PassRecord
from ultramem.export.signature import tensor_specs
from ultramem.export.tensorrt_build import WORKSPACE_BYTES, Built, build_engine
from ultramem.export.tensorrt_library import require_gpu, require_tensorrt
from ultramem.export.tensorrt_profiles import Profile, parse_ranges, profiles, sizes_of
from ultramem.export.tensorrt_run import PLAN, load_tensorrt
from ultramem.export.tensorrt_trtexec import build_line, time_line
from ultramem.graph.transformer import Transformer

TIMING_CACHE = "model.timing_cache"
LINES = "trtexec.txt"


class TensorrtBackend(Backend):
    """Says before any work that TensorRT or a GPU is missing."""

    def check(self, options: ExportOptions) -> None:
        """Raise unless TensorRT is here and has what the options ask for.

        Raises:
            ValueError: an option is not accepted, or there is no GPU.
            ImportError: TensorRT is missing, or Triton, whose kernels the plugins are.
        """
        super().check(options)
        if options.sizes is not None:
            parse_ranges(options.sizes)
        require_tensorrt()
        if options.kernels != "body":
            require("triton", "triton")
        require_gpu()


def engine_profiles(config: ModelConfig, options: ExportOptions) -> tuple[Profile, ...]:
    """The profiles of an export's engine."""
    inputs, _ = tensor_specs(config, options, seq=options.seq)
    return profiles(inputs, options, sizes_of(options, config))


def write_tensorrt(model: Transformer, options: ExportOptions, folder: Path) -> tuple[PassRecord, ...]:
    """Write the ONNX file, the engine, its timing cache, and the lines of trtexec that do the same by hand."""
    wanted = engine_profiles(model.config, options)
    passes = onnx.write_onnx(model, options, folder)
    built = engine_of(require_tensorrt(), folder / ONNX_FILE, wanted, kernels=options.kernels or "plugin")
    (folder / PLAN).write_bytes(built.plan)
    (folder / TIMING_CACHE).write_bytes(built.timing_cache)
    (folder / LINES).write_text("\n".join(trtexec_lines(wanted)) + "\n")
    return passes


def engine_of(trt: Any, file: Path, wanted: tuple[Profile, ...], *, kernels: str, timing_cache: bytes = b"") -> Built:
    """Build the engine of an ONNX file with the kernels of this package ("plugin") or by bodies alone ("body")."""
    from ultramem.export.tensorrt_scratch import prepare

    if kernels == "plugin":
        from ultramem.export.tensorrt_plugins import register_plugins

        register_plugins(trt, importlib.import_module(f"{trt.__name__}.plugin"))
    prepared = prepare(file, plugins=kernels == "plugin")
    return build_engine(
        trt, file, wanted, model=prepared.model, plugin_nodes=prepared.plugin_nodes, timing_cache=timing_cache
    )


def trtexec_lines(wanted: tuple[Profile, ...]) -> tuple[str, ...]:
    """Lines for a shell in the export's folder: one builds (nodes of ours by their bodies), the others time."""
    build = build_line(
        wanted,
        onnx=ONNX_FILE,
        plan="by_hand.plan",
        timing_cache="by_hand.timing_cache",
        workspace_bytes=WORKSPACE_BYTES,
    )
    return (build, *(time_line(wanted, index, plan=PLAN) for index in range(len(wanted))))


def _load(folder: Path, config: ModelConfig, options: ExportOptions, plugin: bool | None) -> Run:
    return load_tensorrt(folder, config, options)


def _how_to_load(options: ExportOptions, files: frozenset[str]) -> tuple[str, ...]:
    return (
        "import tensorrt as trt",
        "runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))",
        'engine = runtime.deserialize_cuda_engine(open("model.plan", "rb").read())  # on this GPU, by this version',
        "context = engine.create_execution_context()  # profile 0 is the prefill, 1 the decode, where there are two",
    )


BACKEND = TensorrtBackend(
    name="tensorrt",
    files=(PLAN, TIMING_CACHE, LINES, ONNX_FILE, f"{ONNX_FILE}.data"),
    write=write_tensorrt,
    load=_load,
    how_to_load=_how_to_load,
    tables=("int8",),
    lacks={"int4": "a network has no unsigned bytes inside, in which int4 is packed"},
    builds_for_ranges=True,
)
