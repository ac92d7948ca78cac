"""Bytes and FLOPs of the kernels that Inductor generates, which it knows while it compiles them.

A kernel's description is written beside what Inductor itself keeps of it (with the graph in its cache, and in an
AOTInductor package), in the sizes that the graph leaves free; the sizes of a call make numbers of it. A generated
kernel reads each element of a buffer once that its loops reach, and writes each result that another kernel needs. Its
FLOPs are those of the products among the captured graph's operators that it was made of.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import SymInt, Tensor

from ultramem.runtime.profile.operator_work import NO_WORK, Operand, Work, has_products, operator_work
from ultramem.runtime.profile.replaced import replaced

DESCRIPTION = "ultramem_work"
"""Key of a kernel's description in what Inductor writes down of the kernel."""
DESCRIPTIONS = "ultramem_work_of_kernels"
"""Key of all of a graph's, by kernel, where Inductor maps kernels to the graph's nodes."""

_INDUCTORS = (
    "set_kernel_post_grad_provenance_tracing",
    "create_kernel_information_json",
    "dump_inductor_provenance_info",
)
"""Of `torch._inductor.debug`: what names a kernel, tells of the kernels of a package, and of those of a graph."""

Sizes = Sequence[int | tuple[int, ...]]
"""Of a graph's inputs: a number, or a tensor's shape."""


@cache
def descriptions_tag() -> str:
    """Of this file's contents, which descriptions follow from."""
    return hashlib.blake2b(Path(__file__).read_bytes(), digest_size=8).hexdigest()


@contextlib.contextmanager
def described_kernels() -> Iterator[None]:
    """Kernels that are compiled in here have a description."""
    from torch._inductor import debug
    from torch._inductor.codegen import cpp, simd, triton

    name_kernel, tell_kernels, map_kernels = (getattr(debug, name, None) for name in _INDUCTORS)
    if name_kernel is None or tell_kernels is None or map_kernels is None:
        yield  # a version of torch that has other names for them: nodes have no work
        return
    graphs = _Graphs()

    def named(kernel: Any, kernel_name: str, *args: Any, **kwargs: Any) -> int | None:
        handle: int | None = name_kernel(kernel, kernel_name, *args, **kwargs)
        graphs.add(f"{kernel_name}:{handle}", kernel)
        return handle

    def told() -> dict[str, Any]:
        descriptions = graphs.descriptions()
        return {key: {**entry, DESCRIPTION: descriptions.get(key)} for key, entry in tell_kernels().items()}

    def mapped() -> dict[str, Any]:
        return {**map_kernels(), DESCRIPTIONS: graphs.descriptions()}

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(debug, **dict(zip(_INDUCTORS, (named, told, mapped), strict=True))))
        for importer in (cpp, simd, triton):
            if hasattr(importer, _INDUCTORS[0]):
                stack.enter_context(replaced(importer, **{_INDUCTORS[0]: named}))
        yield


class GraphCall(NamedTuple):
    """A call of a compiled graph."""

    graph: Any
    """Inductor's object of it."""
    sizes: Sizes


def graph_calls(call: Callable[[], object]) -> list[GraphCall]:
    """Of the compiled graphs that `call` runs, in order."""
    from torch._inductor.output_code import CompiledFxGraph
    from torch.export.pt2_archive._package import AOTICompiledModel
    from torch.utils._pytree import tree_leaves

    found: list[GraphCall] = []
    compiled, packaged = CompiledFxGraph.__call__, AOTICompiledModel.__call__

    def call_compiled(self: Any, inputs: Sequence[Any]) -> Any:
        found.append(GraphCall(self, _sizes(inputs)))
        return compiled(self, inputs)

    def call_packaged(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(GraphCall(self, _sizes(tree_leaves((args, kwargs)))))
        return packaged(self, *args, **kwargs)

    with (
        replaced(CompiledFxGraph, __call__=call_compiled),
        replaced(AOTICompiledModel, __call__=call_packaged),
    ):
        call()
    return found


def kernel_work(description: Mapping[str, Any], sizes: Sizes) -> Work | None:
    """Work of a kernel in a call of its graph with inputs of these sizes.

    None if it depends on values too, as that of one expert of a mixture does.
    """
    values = {}
    for symbol, (place, axis) in description["symbols"].items():
        size = sizes[place]
        values[symbol] = size if isinstance(size, int) else size[axis]
    try:
        return _work(description, _Numbers(values))
    except _NotAnInputSizeError:
        return None


def _work(description: Mapping[str, Any], number: _Numbers) -> Work:
    works = [
        operator_work(
            name, [number.operand(*each) for each in inputs], [number.operand(*each) for each in outputs], arguments
        )
        for name, inputs, outputs, arguments in description["operators"]
    ]
    if description["accesses"] is None:
        return sum(works, NO_WORK)
    moved = sum(number(elements) * element_bytes for elements, element_bytes in description["accesses"])
    return Work(sum(work.flops for work in works), moved)


def _sizes(inputs: Iterable[Any]) -> Sizes:
    return [tuple(each.shape) if isinstance(each, Tensor) else int(each) for each in inputs]


class _NotAnInputSizeError(Exception):
    """A size that does not follow from those of the inputs."""


class _Numbers:
    """Numbers from the texts of a description."""

    def __init__(self, values: Mapping[str, int]) -> None:
        import sympy  # type: ignore[import-untyped]
        from torch.utils._sympy import functions

        self._parse = sympy.sympify
        # A name that sympy has a meaning of its own for stays what it is here.
        self._names = {name: sympy.Integer(value) for name, value in values.items()} | {
            name: getattr(functions, name) for name in ("CeilDiv", "FloorDiv", "Max", "Min", "Mod", "PythonMod")
        }

    def __call__(self, text: int | str) -> int:
        if isinstance(text, int):
            return text
        number = self._parse(text, locals=self._names)
        if number.free_symbols:
            raise _NotAnInputSizeError(text)
        return int(number)

    def operand(self, shape: Sequence[int | str], element_bytes: int, expanded: Sequence[int]) -> Operand:
        numbers = tuple(self(each) for each in shape)
        different = math.prod(size for axis, size in enumerate(numbers) if axis not in expanded or not size)
        return Operand(numbers, element_bytes, different)


class _Graphs:
    """Descriptions of the kernels of the graph that is being compiled."""

    def __init__(self) -> None:
        self._graph: Any = None
        self._found: dict[str, dict[str, Any]] = {}
        self._nodes: dict[str, list[Any]] = {}
        """Of a kernel, the graph's operators whose products it computes."""

    def add(self, key: str, kernel: Any) -> None:
        from torch._inductor.virtualized import V

        if V.graph is not self._graph:
            self._graph, self._found, self._nodes = V.graph, {}, {}
        symbols = _symbols(V.graph)
        if isinstance(kernel, list):
            nodes = [node for each in kernel if hasattr(each, "get_nodes") for node in each.get_nodes()]
            operators = [origin for node in nodes if node.node is not None for origin in node.node.origins]
            self._nodes[key] = [each for each in dict.fromkeys(operators) if has_products(_operator_name(each))]
            self._found[key] = {"symbols": symbols, "operators": [], "accesses": _accesses(V.graph, nodes)}
        elif (origin := _origin(kernel)) is not None and (operator := _operator(origin)) is not None:
            self._nodes[key] = [origin]
            self._found[key] = {"symbols": symbols, "operators": [operator], "accesses": None}

    def descriptions(self) -> dict[str, dict[str, Any]]:
        """By "name:number" of the kernel. An operator's product is counted once: where it is a call, there."""
        called = {node for key, nodes in self._nodes.items() if self._found[key]["accesses"] is None for node in nodes}
        for key, nodes in self._nodes.items():
            if self._found[key]["accesses"] is not None:
                operators = (_operator(node) for node in nodes if node not in called)
                self._found[key]["operators"] = [each for each in operators if each is not None]
                called.update(nodes)
        found, self._graph, self._nodes = self._found, None, {}
        return found


def _symbols(graph: Any) -> dict[str, tuple[int, int]]:
    """Where each free size of the graph stands among its inputs: which input, and which axis of it."""
    import sympy

    found: dict[str, tuple[int, int]] = {}
    for place, each in enumerate(graph.graph_inputs.values()):
        sizes = each.get_size() if hasattr(each, "get_size") else [each]
        for axis, size in enumerate(sizes):
            if isinstance(size, sympy.Symbol):
                found.setdefault(str(size), (place, axis))
    return found


def _accesses(graph: Any, nodes: Sequence[Any]) -> list[tuple[int | str, int]]:
    """Elements and bytes of an element of each buffer that a generated kernel reads, and of each that it writes."""
    import sympy
    from torch._inductor.dependencies import MemoryDep

    names = {node.get_name() for node in nodes}
    made = {buffer.get_name(): buffer for node in nodes for buffer in node.get_outputs()}
    kept_inside = {name for name, each in made.items() if all(user.get_name() in names for user in each.users)}
    found = []
    for side, left_out in (("reads", set(made)), ("writes", kept_inside)):
        reached: dict[str, dict[str, Any]] = {}
        for node in nodes:
            for dependency in getattr(node.read_writes, side):
                if dependency.name not in left_out and isinstance(dependency, MemoryDep):
                    reached.setdefault(dependency.name, {})[str(dependency.index)] = _elements(dependency)
        for name, elements in reached.items():
            most = sympy.Min(sum(elements.values()), graph.get_numel(name))
            found.append((_text(graph, most), graph.get_dtype(name).itemsize))
    return found


def _elements(dependency: Any) -> Any:
    """That a loop reaches; a loop variable that the index lacks reaches the same ones again."""
    free = dependency.index.free_symbols
    indirect = any(str(symbol).startswith(("tmp", "indirect")) for symbol in free)
    return math.prod(
        size for name, size in zip(dependency.var_names, dependency.size, strict=True) if indirect or name in free
    )


def _text(graph: Any, expression: Any) -> int | str:
    expression = graph.sizevars.remove_precomputed_replacements(expression)
    return int(expression) if expression.is_number else str(expression)


def _origin(kernel: Any) -> Any:
    """The graph's node that is this call of a library's kernel; one with several results does not say it outright."""
    if kernel.origin_node is not None:
        return kernel.origin_node
    operator = getattr(kernel.op_overload, "overloadpacket", None)  # lowering may take another overload of it
    called = [node for node in kernel.origins if operator and getattr(node.target, "overloadpacket", None) is operator]
    return called[0] if len(called) == 1 else None


def _operator_name(node: Any) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None else ""


def _operator(node: Any) -> tuple[Any, ...] | None:
    """Name, inputs, outputs and other arguments of a node of the graph; None if it does not say its sizes."""
    from torch.fx import Node
    from torch.utils._pytree import tree_leaves

    schema, result = getattr(node.target, "_schema", None), node.meta.get("val")
    if schema is None or result is None:
        return None
    given = dict(zip((each.name for each in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    inputs = [leaf for leaf in tree_leaves(list(given.values())) if isinstance(leaf, Node)]
    tensors = [each.meta.get("val") for each in dict.fromkeys(inputs)]
    arguments = {name: value for name, value in given.items() if isinstance(value, bool | int | str)}
    sides = ([_described(each) for each in tree_leaves(side) if isinstance(each, Tensor)] for side in (tensors, result))
    return schema.name, *sides, arguments


def _described(tensor: Tensor) -> tuple[list[int | str], int, list[int]]:
    """Shape, bytes of an element, and axes along which the elements are the same."""
    sizes: Sequence[Any] = tensor.shape
    shape = [str(size.node.expr) if isinstance(size, SymInt) else int(size) for size in sizes]
    expanded = [axis for axis, stride in enumerate(tensor.stride()) if isinstance(stride, int) and stride == 0]
    return shape, tensor.element_size(), expanded
