"""The plugin library of ONNX Runtime: this package's kernels for the nodes of domain `ultramem`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ultramem.ops.native import build
from ultramem.ops.native.library import NO_VARIANT, variant

DEVICES = ("cpu", "cuda")
# Read by ops/native/onnx/library.cc.
_THREADS_ENTRY = "ultramem.intra_op_num_threads"
_DEVICE_ENTRY = "ultramem.device"


class Plugin(NamedTuple):
    """The library for this processor, or why there is none."""

    file: Path | None
    problem: str
    """Empty if the file is there; else what is wrong and what mends it."""


def find_plugin() -> Plugin:
    """The plugin library that was built from the sources that are here, for this processor.

    A program in another language registers `file` with its session options, by `RegisterCustomOpsLibrary_V2` in C.
    """
    kind = variant()
    if kind is None:
        return Plugin(None, NO_VARIANT)
    file = build.library_file(build.ONNX_PLUGIN, kind)
    if file.is_file():
        return Plugin(file, "")
    state = "were built from other sources" if build.other_libraries(build.ONNX_PLUGIN) else "are not built"
    return Plugin(None, f"the kernels for ONNX Runtime {state}: build them with {build.COMMAND}")


def register(session_options: Any, *, device: str = "cpu") -> Path:
    """Have sessions with these options run the nodes of domain `ultramem` by this package's kernels.

    Without it ONNX Runtime runs the nodes' bodies of standard operators.

    Args:
        session_options: an `onnxruntime.SessionOptions` whose `intra_op_num_threads` is set already, if it is to be.
        device: "cpu": every node has a kernel. "cuda", for sessions with the CUDA provider: `LookupReduce` and
            `LookupReduceQuantized` have one, and the other nodes' bodies run beside them on the GPU. No GPU has run
            these kernels yet. They make a token NaN that has an index outside of the table.

    Returns:
        The registered library.

    Raises:
        ValueError: the device is unknown.
        RuntimeError: the library is not built, or ONNX Runtime does not take it.
    """
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    plugin = find_plugin()
    if plugin.file is None:
        raise RuntimeError(plugin.problem)
    if device == "cuda":
        if not build.library_file(build.CUDA_PLUGIN, build.CUDA_VARIANT).is_file():
            raise RuntimeError(f"the kernels for GPUs are not built: where nvcc is, build them with {build.COMMAND}")
        session_options.add_session_config_entry(_DEVICE_ENTRY, device)
    if session_options.intra_op_num_threads > 0:
        session_options.add_session_config_entry(_THREADS_ENTRY, str(session_options.intra_op_num_threads))
    try:
        session_options.register_custom_ops_library(str(plugin.file))
    except Exception as error:  # onnxruntime's own classes, which are known to it alone
        raise RuntimeError(f"ONNX Runtime does not take {plugin.file}: {error}") from error
    return plugin.file
