"""ONNX to a TensorRT engine: everything that is asked of TensorRT to build one, in one place.

`trt` is the module `tensorrt`, or in tests a stand-in that records what it is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ultramem.export.tensorrt_profiles import Profile

WORKSPACE_BYTES = 4 * 2**30  # that a layer may take while it runs; what is not used is not allocated


class Built(NamedTuple):
    """An engine, and how long its kernels took to run while they were chosen."""

    plan: bytes
    timing_cache: bytes
    plugin_layers: int
    """Layers that run kernels of this package."""


def build_engine(
    trt: Any,
    file: Path,
    profiles: Sequence[Profile],
    *,
    model: bytes | None = None,
    plugin_nodes: int = 0,
    timing_cache: bytes = b"",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Built:
    """Parse and build.

    Args:
        trt: the module `tensorrt`.
        file: the ONNX file.
        profiles: ranges of the input shapes.
        model: parsed in place of the file's own bytes; weights that it does not hold stand beside the file.
        plugin_nodes: how many nodes must become plugin layers.
        timing_cache: of an earlier build on this GPU; empty: none.
        workspace_bytes: that a layer may take while it runs.

    Raises:
        ValueError: TensorRT cannot parse the file, refuses a profile, runs a node of ours by its body although its
            plugin was asked for, or finds no engine.
    """
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    # From TensorRT 11 on every network is strongly typed, and the flag is ignored.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, logger, file, model)
    found = sum(network.get_layer(index).type == trt.LayerType.PLUGIN_V3 for index in range(network.num_layers))
    if found != plugin_nodes:
        raise ValueError(f"TensorRT made plugin layers of {found} nodes of {file.name}, {plugin_nodes} were asked for")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    config.clear_flag(trt.BuilderFlag.TF32)  # it keeps 10 of the 23 bits of a float32 product's factors
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names of layers stay in the engine, for profiles
    cache = config.create_timing_cache(timing_cache)
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        raise ValueError("TensorRT refuses the timing cache: it is of another GPU or version (build without it)")
    for each in profiles:
        _add_profile(builder, config, each)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ValueError(f"TensorRT finds no engine for {file.name}: its log above says why")
    return Built(bytes(plan), bytes(cache.serialize()), found)


def _parse(trt: Any, network: Any, logger: Any, file: Path, model: bytes | None) -> None:
    parser = trt.OnnxParser(network, logger)
    # The path is where weights are looked for that stand beside the file.
    if not (parser.parse_from_file(str(file)) if model is None else parser.parse(model, str(file))):
        errors = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise ValueError(f"TensorRT cannot parse {file.name}: {' '.join(errors.split())}")


def _add_profile(builder: Any, config: Any, wanted: Profile) -> None:
    profile = builder.create_optimization_profile()
    for name, (least, likely, most) in wanted.shapes.items():
        profile.set_shape(name, least, likely, most)
    if config.add_optimization_profile(profile) < 0:
        raise ValueError(f"TensorRT refuses the profile {wanted.name}: {dict(wanted.shapes)}")
