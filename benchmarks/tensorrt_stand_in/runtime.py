"""The stand-in for the runtime: it reads and writes what lies at the addresses it was given, as an engine does."""

from __future__ import annotations

import ctypes
import json
import math
from typing import Any

import numpy as np
import onnx
import onnxruntime

from benchmarks.tensorrt_stand_in.build import MAGIC, Logger
from benchmarks.tensorrt_stand_in.record import Strict, record

TYPES = {1: np.dtype(np.float32), 10: np.dtype(np.float16), 7: np.dtype(np.int64)}


class Runtime(Strict):
    """Reads engines."""

    __slots__ = ()

    def __init__(self, logger: Logger) -> None:
        assert isinstance(logger, Logger)

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        return ICudaEngine(serialized_engine) if serialized_engine.startswith(MAGIC) else None


class ICudaEngine(Strict):
    """The ONNX model of an engine of the stand-in, and its profiles."""

    __slots__ = ("model", "names", "profiles", "session", "values")

    def __init__(self, plan: bytes) -> None:
        header, _, model = plan.removeprefix(MAGIC).partition(b"\n")
        self.profiles = json.loads(header)
        self.model = onnx.load_from_string(model)
        self.values = {each.name: each for each in (*self.model.graph.input, *self.model.graph.output)}
        self.names = list(self.values)
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(each) for each in self.profiles[profile_index][name]]

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self)


class IExecutionContext(Strict):
    """Addresses and shapes of one profile."""

    __slots__ = ("addresses", "engine", "profile", "shapes")

    def __init__(self, engine: ICudaEngine) -> None:
        self.engine, self.profile = engine, 0
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert isinstance(stream_handle, int)
        self.profile = profile_index
        return profile_index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        self.shapes[name] = shape
        return all(a <= size <= b for a, size, b in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert name in self.engine.values
        assert memory, f"{name} has no address"
        self.addresses[name] = memory
        return True

    def infer_shapes(self) -> list[str]:
        return [each.name for each in self.engine.model.graph.input if each.name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        free: dict[str, int] = {}
        for each in self.engine.model.graph.input:
            for size, value in zip(each.type.tensor_type.shape.dim, self.shapes[each.name], strict=True):
                if size.dim_param.isidentifier():
                    free[size.dim_param] = value
        sizes = self.engine.values[name].type.tensor_type.shape.dim
        return tuple(_size(each, free) for each in sizes)

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert isinstance(stream_handle, int)
        record("execute_async_v3", self.profile)
        feeds = {each.name: self._array(each.name, self.shapes[each.name]) for each in self.engine.model.graph.input}
        outputs = [each.name for each in self.engine.model.graph.output]
        for name, value in zip(outputs, self.engine.session.run(outputs, feeds), strict=True):
            shape = self.get_tensor_shape(name)
            assert value.shape == shape, (name, value.shape, shape)
            self._array(name, shape)[...] = value
        return True

    def _array(self, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        dtype = TYPES[self.engine.values[name].type.tensor_type.elem_type]
        count = math.prod(shape)
        if not count:
            return np.empty(shape, dtype)
        memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)


def _size(size: Any, free: dict[str, int]) -> int:
    if not size.dim_param:
        return int(size.dim_value)
    return sum(int(word) if word.isdecimal() else free[word] for word in size.dim_param.split(" + "))
