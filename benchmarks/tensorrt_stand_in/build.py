"""The stand-in for the builder, the network, the parser and the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx

from benchmarks.tensorrt_stand_in import plugin
from benchmarks.tensorrt_stand_in.enums import (
    BuilderFlag,
    DataType,
    LayerType,
    MemoryPoolType,
    NetworkDefinitionCreationFlag,
    ProfilingVerbosity,
)
from benchmarks.tensorrt_stand_in.record import Strict, record

MAGIC = b"stand-in for an engine\n"
TYPES = {1: DataType.FLOAT, 10: DataType.HALF, 16: DataType.BF16, 3: DataType.INT8, 7: DataType.INT64}
Dims = tuple[Any, ...]  # numbers, names, or expressions that a plugin gave


class Logger(Strict):
    """Of messages of a severity and above."""

    WARNING = 2
    __slots__ = ("severity",)

    def __init__(self, min_severity: int) -> None:
        self.severity = min_severity


class ITensor(Strict):
    """A tensor of a network."""

    __slots__ = ("dtype", "name", "shape")

    def __init__(self, name: str, dtype: DataType, shape: Dims) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape


class ILayer(Strict):
    """A layer of a network."""

    __slots__ = ("inputs", "instance", "name", "outputs", "type")

    def __init__(self, kind: LayerType, name: str, inputs: list[Any], outputs: list[Any], instance: Any = None) -> None:
        self.type, self.name, self.inputs, self.outputs, self.instance = kind, name, inputs, outputs, instance

    def get_output(self, index: int) -> Any:
        return self.outputs[index]


class INetworkDefinition(Strict):
    """Layers, in order; `model` is what the stand-in's engine runs."""

    __slots__ = ("inputs", "layers", "model")

    def __init__(self) -> None:
        self.layers: list[ILayer] = []
        self.inputs: dict[str, Dims] = {}
        self.model: Any = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, index: int) -> ILayer:
        return self.layers[index]

    def add_plugin(self, func: Any, aot: bool) -> ILayer:
        """Add a layer of a plugin of `tensorrt.plugin`, whose functions are called as TensorRT calls them."""
        assert aot is True, "this package defines no implementation in Python"
        tensors, shape_inputs, instance = func()
        assert shape_inputs == []
        outputs = described(instance, tensors)
        self.layers.append(ILayer(LayerType.PLUGIN_V3, "", tensors, outputs, instance))
        record("add_plugin", instance.definition.id, instance.attributes)
        return self.layers[-1]

    def add_cast(self, input: ITensor, to_type: DataType) -> ILayer:
        self.layers.append(ILayer(LayerType.CAST, "", [input], [ITensor(input.name, to_type, input.shape)]))
        record("add_cast", to_type)
        return self.layers[-1]


def sizes(shape: Dims, *, fake: bool = False) -> tuple[plugin.ShapeExpr, ...]:
    if fake:
        return tuple(plugin.ShapeExpr.fake() for _ in shape)
    return tuple(plugin.ShapeExpr.free(each) if isinstance(each, str) else plugin.ShapeExpr(each) for each in shape)


def described(instance: Any, tensors: list[ITensor]) -> list[ITensor]:
    """Outputs of a plugin; TensorRT asks for their types alone first, when nothing is known of the sizes."""
    definition, found = instance.definition, None
    for fake in (True, False):
        inputs = [plugin.TensorDesc(sizes(each.shape, fake=fake), each.dtype) for each in tensors]
        found = definition.register(*inputs, **instance.attributes)
        found = (found,) if definition.outputs == 1 else found
        assert len(found) == definition.outputs
    assert found is not None
    return [ITensor("", out.dtype, out.shape_expr) for out in found]


def compiled(layer: ILayer) -> dict[int, Any]:
    """What a plugin's layer launches, by tactic: name, PTX, launch parameters and numbers."""
    definition, values = layer.instance.definition, list(layer.instance.attributes.values())
    inputs = [plugin.TensorDesc(sizes(each.shape), each.dtype) for each in layer.inputs]
    found = definition.register(*inputs, **layer.instance.attributes)
    outputs = (found,) if definition.outputs == 1 else found
    (combination,) = definition.autotune(*inputs, *values, outputs)
    assert combination.types == tuple(each.dtype for each in (*inputs, *outputs)), "a network is strongly typed"
    made = {}
    for tactic in combination.tactics:
        name, ptx, params, numbers = definition.aot_impl(*inputs, *values, outputs, tactic)
        assert isinstance(params, plugin.KernelLaunchParams)
        assert isinstance(numbers, plugin.SymIntExprs)
        assert f".entry {name}(" in ptx
        made[tactic] = (name, ptx, params, numbers)
        record("compile", definition.id, tactic)
    return made


class ParserError(Strict):
    """Of a node."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def desc(self) -> str:
        return self.text


class OnnxParser(Strict):
    """Takes the plugin of a node that names one which is defined, and its body otherwise, as TensorRT's parser does."""

    __slots__ = ("errors", "network")

    def __init__(self, network: INetworkDefinition, logger: Logger) -> None:
        assert isinstance(logger, Logger)
        self.network, self.errors = network, [ParserError("")] * 0

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> ParserError:
        return self.errors[index]

    def parse_from_file(self, model: str) -> bool:
        record("parse_from_file", Path(model).name)
        return self._parse(Path(model).read_bytes())

    def parse(self, model: bytes, path: str | None = None) -> bool:
        record("parse", None if path is None else Path(path).name)
        return self._parse(model)

    def _parse(self, data: bytes) -> bool:
        try:
            model = onnx.load_from_string(data)
        except Exception as error:  # protobuf's own classes
            self.errors.append(ParserError(f"Failed to parse the ONNX model: {error}"))
            return False
        bodies = {(each.domain, each.name) for each in model.functions}
        tensors = {each.name: _tensor(each) for each in (*model.graph.input, *model.graph.value_info)}
        tensors |= {each.name: ITensor(each.name, TYPES[each.data_type], tuple(each.dims)) for each in
                    model.graph.initializer if each.data_type in TYPES}  # fmt: skip
        self.network.inputs = {each.name: _tensor(each).shape for each in model.graph.input}
        for node in model.graph.node:
            attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
            namespace = attributes.get("plugin_namespace", b"").decode()
            definition = plugin.definitions().get(f"{namespace}::{node.op_type}")
            if definition is not None and attributes["plugin_version"] == b"1":
                tensors |= dict(zip(node.output, self._add(definition, node, attributes, tensors), strict=True))
            elif not node.domain or (node.domain, node.op_type) in bodies:
                self.network.layers.append(ILayer(LayerType.OTHER, node.name, [], []))
            else:
                self.errors.append(ParserError(f"Plugin not found, are the plugin name, version, and namespace correct?"
                                               f" ({node.op_type})"))  # fmt: skip
                return False
        self.network.model = _with_bodies(model)
        return True

    def _add(self, definition: Any, node: Any, attributes: dict[str, Any], tensors: dict[str, Any]) -> list[ITensor]:
        given = {}
        for name, kind in definition.attributes.items():
            value = attributes[name]
            given[name] = value.decode() if kind is str else kind(value)
        layer = self.network.add_plugin(definition(*(tensors[name] for name in node.input), **given), aot=True)
        layer.name = node.name
        assert len(layer.outputs) == len(node.output), f"{node.op_type} has {len(node.output)} outputs"
        return layer.outputs


def _tensor(value: Any) -> ITensor:
    kind = value.type.tensor_type
    shape = tuple(each.dim_param or each.dim_value for each in kind.shape.dim)
    return ITensor(value.name, TYPES.get(kind.elem_type, DataType.BOOL), shape)


def _with_bodies(model: Any) -> Any:
    """The model as it is on disk, for ONNX Runtime."""
    for node in model.graph.node:
        if node.domain and node.op_type.endswith("WithScratch"):
            node.op_type = node.op_type.removesuffix("WithScratch")
            del node.output[2:]
    return model


class IOptimizationProfile(Strict):
    """Ranges of the inputs' shapes."""

    __slots__ = ("shapes",)

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
        assert all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)), (input, min, opt, max)
        self.shapes[input] = (min, opt, max)


class ITimingCache(Strict):
    """Bytes of an earlier build, and a mark of this one."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> memoryview:
        return memoryview(self.data + b"timed\n")


class IBuilderConfig(Strict):
    """What a build may do."""

    __slots__ = ("_verbosity", "profiles")

    def __init__(self) -> None:
        self.profiles: list[IOptimizationProfile] = []
        self._verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY

    @property
    def profiling_verbosity(self) -> ProfilingVerbosity:
        return self._verbosity

    @profiling_verbosity.setter
    def profiling_verbosity(self, value: ProfilingVerbosity) -> None:
        assert isinstance(value, ProfilingVerbosity)
        record("profiling_verbosity", value)
        self._verbosity = value

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        assert isinstance(pool, MemoryPoolType)
        record("set_memory_pool_limit", pool, pool_size)

    def clear_flag(self, flag: BuilderFlag) -> None:
        assert isinstance(flag, BuilderFlag)
        record("clear_flag", flag)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        record("create_timing_cache", serialized_timing_cache)
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        assert isinstance(cache, ITimingCache)
        record("set_timing_cache", ignore_mismatch)
        return not cache.data.startswith(b"of another GPU")

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        record("add_optimization_profile", dict(profile.shapes))
        self.profiles.append(profile)
        return len(self.profiles) - 1


class Builder(Strict):
    """Makes everything else."""

    __slots__ = ()

    def __init__(self, logger: Logger) -> None:
        assert isinstance(logger, Logger)

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        record("create_network", flags)
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> memoryview | None:
        for profile in config.profiles:
            if profile.shapes.keys() != network.inputs.keys():
                return None  # TensorRT wants ranges of every input that has a free size
        for layer in network.layers:
            if layer.type is LayerType.PLUGIN_V3:
                compiled(layer)
        record("build_serialized_network", len(config.profiles))
        header = json.dumps([each.shapes for each in config.profiles]).encode()
        return memoryview(MAGIC + header + b"\n" + network.model.SerializeToString())
