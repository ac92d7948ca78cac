"""The stand-in for `tensorrt.plugin`: definitions with TensorRT's rules, and symbolic sizes that can be evaluated."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from benchmarks.tensorrt_stand_in.enums import DataType
from benchmarks.tensorrt_stand_in.record import Strict, record

BUILT_IN = (int, float, bytes, bool, str)
Value = Callable[[Mapping[str, int]], int]


class SymInt32(Strict):
    """A 32-bit number: of a constant, or an expression of free sizes."""

    __slots__ = ("_fake", "_value", "constant")

    def __init__(self, value: Any = None) -> None:
        self._fake = isinstance(value, SymInt32) and value._fake
        self.constant = value if isinstance(value, int) else getattr(value, "constant", None)
        self._value: Value = (lambda sizes: value) if isinstance(value, int) else getattr(value, "_value", None)
        if not isinstance(value, (int, SymInt32)):
            raise TypeError(f"a symbolic number is made of a number or another one, got {type(value)}")

    def evaluate(self, sizes: Mapping[str, int]) -> int:
        """For tests: the number, given the free sizes."""
        found = self._value(sizes)
        assert -(2**31) <= found < 2**31, f"{found} does not fit 32 bits"
        return found


class ShapeExpr(SymInt32):
    """A size of a tensor: number, free size or expression; of no known kind ("fake") while only types are asked for."""

    __slots__ = ()

    @classmethod
    def free(cls, name: str) -> ShapeExpr:
        """For tests: a size that a call decides."""
        return cls._made(lambda sizes: sizes[name], None, fake=False)

    @classmethod
    def fake(cls) -> ShapeExpr:
        """For tests: a size of which nothing may be asked."""
        return cls._made(_unknown, None, fake=True)

    @classmethod
    def _made(cls, value: Value, constant: int | None, *, fake: bool) -> ShapeExpr:
        made = cls(0)
        made._value, made.constant, made._fake = value, constant, fake
        return made

    @property
    def is_fake(self) -> bool:
        return self._fake

    @property
    def is_constant(self) -> bool:
        if self._fake:
            raise RuntimeError("Not accessible for fake 'ShapeExpr's.")
        return self.constant is not None

    def constant_value(self) -> int:
        if not self.is_constant:
            raise RuntimeError("Not accessible for non-constant shape expressions.")
        assert self.constant is not None
        return self.constant

    def _operation(self, other: int | ShapeExpr, function: Callable[[int, int], int]) -> ShapeExpr:
        right = ShapeExpr(other) if isinstance(other, int) else other
        both = self.constant is not None and right.constant is not None
        constant = function(self.constant, right.constant) if both else None  # type: ignore[arg-type]  # both are there
        return ShapeExpr._made(
            lambda sizes: function(self._value(sizes), right._value(sizes)), constant, fake=self._fake or right._fake
        )

    # An expression stands on the left: TensorRT defines no reflected operators.
    def __add__(self, other: int | ShapeExpr) -> ShapeExpr:
        return self._operation(other, lambda a, b: a + b)

    def __sub__(self, other: int | ShapeExpr) -> ShapeExpr:
        return self._operation(other, lambda a, b: a - b)

    def __mul__(self, other: int | ShapeExpr) -> ShapeExpr:
        return self._operation(other, lambda a, b: a * b)

    def __floordiv__(self, other: int | ShapeExpr) -> ShapeExpr:
        return self._operation(other, lambda a, b: a // b)


def _unknown(sizes: Mapping[str, int]) -> int:
    raise RuntimeError("a fake size has no value")


def cdiv(first: int | ShapeExpr, second: int | ShapeExpr) -> ShapeExpr:
    if isinstance(first, int) and isinstance(second, int):
        raise ValueError("Both arguments cannot be 'int's")
    left = ShapeExpr(first) if isinstance(first, int) else first
    return left._operation(second, lambda a, b: -(-a // b))


class SymIntExprs(Strict):
    """A fixed number of numbers."""

    __slots__ = ("_items",)

    def __init__(self, length: int) -> None:
        self._items: list[Any] = [None] * length

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Any:
        return iter(self._items)

    def __getitem__(self, index: int) -> Any:
        return self._items[index]

    def __setitem__(self, index: int, value: Any) -> None:
        assert isinstance(value, SymInt32), "Extra args must be a 'tensorrt.plugin.SymInt32'."
        self._items[index] = value


class TensorDesc(Strict):
    """A tensor without data."""

    __slots__ = ("dtype", "shape_expr")

    def __init__(self, shape_expr: tuple[ShapeExpr, ...], dtype: DataType) -> None:
        self.shape_expr, self.dtype = shape_expr, dtype


def from_shape_expr(shape_expr: tuple[Any, ...], dtype: DataType) -> TensorDesc:
    assert isinstance(shape_expr, tuple)
    assert isinstance(dtype, DataType)
    return TensorDesc(tuple(each if isinstance(each, ShapeExpr) else ShapeExpr(each) for each in shape_expr), dtype)


class KernelLaunchParams:
    """Grid, block and dynamic shared memory; nothing else can be set."""

    NAMES = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")

    def __init__(self) -> None:
        for name in self.NAMES:
            setattr(self, name, 0 if name == "shared_mem" else 1)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.NAMES:
            raise AttributeError(f"KernelLaunchParams object has no attribute '{name}'")
        self.__dict__[name] = SymInt32(value)


class AutoTuneCombination(Strict):
    """Types and layouts of all inputs and outputs, and the tactics to be timed."""

    __slots__ = ("layouts", "tactics", "types")

    def __init__(self, io_types: str, layouts: str, tactics: Iterable[int]) -> None:
        names = {"FP32": DataType.FLOAT, "FP16": DataType.HALF}
        self.types = tuple(names.get(word) or DataType[word] for word in io_types.replace(" ", "").split(","))
        assert layouts == "LINEAR"
        self.layouts, self.tactics = layouts, list(tactics)
        assert all(type(each) is int and each > 0 for each in self.tactics), "tactics must be positive integers"


class PluginDef(Strict):
    """A definition: what `tensorrt.plugin.op.<namespace>.<name>` is."""

    __slots__ = ("aot_impl", "attributes", "autotune", "id", "inputs", "outputs", "register")

    def __call__(self, *tensors: Any, **attributes: Any) -> Any:
        """What `INetworkDefinition.add_plugin` takes."""
        if len(tensors) != len(self.inputs) or list(attributes) != list(self.attributes):
            raise ValueError(f"Unexpected schema: {len(tensors)} tensors, {list(attributes)}")
        for name, value in attributes.items():
            if type(value) is not self.attributes[name]:
                raise ValueError(f"Unexpected type '{type(value)}' for attribute '{name}'.")
        return lambda request=None: (list(tensors), [], Instance(self, attributes))


class Instance(Strict):
    """A plugin of a layer."""

    __slots__ = ("attributes", "definition")

    def __init__(self, definition: PluginDef, attributes: dict[str, Any]) -> None:
        self.definition, self.attributes = definition, attributes


class Names:
    """`tensorrt.plugin.op`, or a namespace in it."""


_REGISTRY: dict[str, PluginDef] = {}
_OP = [Names()]


def new_registry() -> Names:
    _REGISTRY.clear()
    _OP[0] = Names()
    return _OP[0]


def definitions() -> dict[str, PluginDef]:
    return _REGISTRY


def register(plugin_id: str, lazy_register: bool = False) -> Callable[..., Any]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        namespace, name = plugin_id.split("::")
        space = _OP[0].__dict__.setdefault(namespace, Names())
        if name in space.__dict__:
            raise ValueError(f"there already is a definition for '{name}'")
        signature, made = inspect.signature(function), PluginDef()
        made.id, made.register, made.autotune, made.aot_impl = plugin_id, function, None, None
        made.inputs, made.attributes = [], {}
        for each in signature.parameters.values():
            assert each.annotation is not each.empty, f"{each.name} does not have a type annotation"
            assert each.default is each.empty, f"{each.name} has a default value"
            if each.annotation is TensorDesc:
                assert not made.attributes, "tensors come before attributes"
                made.inputs.append(each.name)
            else:
                assert each.annotation in BUILT_IN, f"{each.annotation} is not a serializable type"
                assert each.name not in ("outputs", "stream", "tactic")
                made.attributes[each.name] = each.annotation
        made.outputs = _outputs(signature.return_annotation)
        _REGISTRY[plugin_id] = space.__dict__[name] = made
        record("register", plugin_id)
        return function

    return decorate


def _outputs(annotation: Any) -> int:
    if annotation is TensorDesc:
        return 1
    assert typing.get_origin(annotation) is tuple
    assert all(each is TensorDesc for each in typing.get_args(annotation))
    return len(typing.get_args(annotation))


def autotune(plugin_id: str) -> Callable[..., Any]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        made = _REGISTRY[plugin_id]
        _check(made, function, ["outputs"])
        assert inspect.signature(function).return_annotation == list[AutoTuneCombination]
        made.autotune = function
        record("autotune", plugin_id)
        return function

    return decorate


def aot_impl(plugin_id: str) -> Callable[..., Any]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        made = _REGISTRY[plugin_id]
        _check(made, function, ["outputs", "tactic"])
        returned = typing.get_args(inspect.signature(function).return_annotation)
        assert returned == (str, str, KernelLaunchParams, SymIntExprs)
        made.aot_impl = function
        record("aot_impl", plugin_id)
        return function

    return decorate


def _check(made: PluginDef, function: Callable[..., Any], more: list[str]) -> None:
    parameters = inspect.signature(function).parameters
    assert list(parameters) == [*made.inputs, *made.attributes, *more], list(parameters)
    for name, kind in made.attributes.items():
        assert parameters[name].annotation is kind
    assert _outputs(parameters["outputs"].annotation) == made.outputs


PUBLIC = [
    SymInt32, ShapeExpr, SymIntExprs, TensorDesc, KernelLaunchParams, AutoTuneCombination, PluginDef,
    cdiv, from_shape_expr, register, autotune, aot_impl,
]  # fmt: skip
