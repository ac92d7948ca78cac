"""The lookup's node in ONNX Runtime: its body of standard operators, and the plugin library's kernel.

Shapes: N rows, D value dim, T tokens, K slots a token, C cores, E blocks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.contender import Case, Contender, Role, UnavailableError
from benchmarks.harness.row import Goal, Row, Suite
from benchmarks.subjects import quantised
from benchmarks.subjects.lookup import Inputs, Problem
from ultramem.ops import lookup_reduce, lookup_reduce_quantized, quantize_rows, reference

BODY = "standard operators"
GOAL = Goal(text=">= 1.5x the node's standard operators", quantity="speedup", bound=1.5, against=BODY)
BITS = {"float32": 0, "int8": 8, "int4": 4}


def rows(suite: Suite) -> list[Row]:
    if suite == "gpu":  # the CUDA provider of ONNX Runtime is not installed where that suite runs
        return []
    return [
        Row(
            subject="onnx_lookup",
            variant=variant,
            size="d256",
            tokens=t,
            indices="uniform",
            dtype="float32",
            limit_s=150,
            goals=(GOAL,),
            quick=(variant, t) == ("float32", 16),
        )
        for variant in BITS
        for t in (1, 16, 64)
    ]


def build(row: Row, device: torch.device) -> Case:
    runtime, onnx = _require("onnxruntime"), _require("onnx")
    problem, bits = Problem(row, device), BITS[row.variant]
    e = problem.size.blocks
    table = list(quantize_rows(problem.values_ND, bits)) if bits else [problem.values_ND]

    @cache
    def values() -> list[Any]:
        return [runtime.OrtValue.ortvalue_from_numpy(each.numpy()) for each in table]

    def contender(
        role: Role, settings: str, run: Callable[[Any], Any], prepare: Callable[[Inputs], Any], result: Callable
    ) -> Contender:
        def check() -> None:
            def pool(given: Any) -> Tensor:
                return result(run(given))

            if bits:
                quantised.check(problem, "peer", pool, prepare, rows_of)
            else:
                problem.check(pool, prepare)

        return Contender(role=role, settings=settings, draw=lambda: prepare(problem.draw()), run=run, check=check)

    def rows_of(rows: Tensor) -> Tensor:
        weights = torch.ones(rows.numel(), 1, 1)
        return reference.lookup_reduce_quantized(*table, rows.unsqueeze(1), weights).squeeze(1)

    def in_runtime(role: Role, plugin: bool) -> Contender:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads of a session wait for its next call at full speed: here the next call is another session's.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if plugin:
            from ultramem.export.onnx_plugin import find_plugin, register

            if problem_there := find_plugin().problem:
                raise UnavailableError(problem_there)
            register(options)
        model = _one_node(onnx, bits, e).SerializeToString()
        session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]

        def prepare(inputs: Inputs) -> dict[str, Any]:
            drawn = [runtime.OrtValue.ortvalue_from_numpy(each.numpy()) for each in inputs]
            return dict(zip(names, [*values(), *drawn], strict=True))

        return contender(
            role,
            f"onnxruntime {runtime.__version__}, " + ("the plugin library" if plugin else "the node's function body"),
            lambda feeds: session.run_with_ort_values(["pooled"], feeds),
            prepare,
            lambda pooled: torch.from_numpy(pooled[0].numpy()),
        )

    def in_torch() -> Contender:
        pool = lookup_reduce_quantized if bits else lookup_reduce
        run = torch.no_grad()(lambda inputs: pool(*table, *inputs, num_blocks=e))
        return contender("yardstick", f"ops.{pool.__name__}, AUTO", run, lambda inputs: inputs, lambda pooled: pooled)

    contenders = {
        "plugin": lambda: in_runtime("ours", True),
        BODY: lambda: in_runtime("peer", False),
        "PyTorch op": in_torch,
    }
    floor = quantised.floor(problem, bits) if bits else problem.floor()
    return Case(contenders=contenders, floor=floor, shape=problem.shape() | ({"bits": bits} if bits else {}))


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{module} is not installed (pip install ultramem[onnx])") from error


def _one_node(onnx: Any, bits: int, blocks: int) -> Any:
    """A model of the lookup's node with its body; the table is an input, so that sessions share it."""
    from ultramem.export import onnx_functions

    types = onnx.TensorProto
    table = [("values", types.FLOAT)]
    if bits:
        table = [("rows", types.INT8 if bits == 8 else types.UINT8), ("scales", types.FLOAT)]
    inputs = [*table, ("indices", types.INT64), ("scores", types.FLOAT)]
    ranks = {"scales": 1, "scores": 3}
    op = "LookupReduceQuantized" if bits else "LookupReduce"
    attributes = {"num_blocks": blocks} | ({"bits": bits} if bits else {})
    make = onnx.helper
    graph = make.make_graph(
        [make.make_node(op, [name for name, _ in inputs], ["pooled"], domain=onnx_functions.DOMAIN, **attributes)],
        "lookup",
        [make.make_tensor_value_info(name, kind, [None] * ranks.get(name, 2)) for name, kind in inputs],
        [make.make_tensor_value_info("pooled", types.FLOAT, [None] * 3)],
    )
    opsets = [("", onnx_functions.OPSET), (onnx_functions.DOMAIN, onnx_functions.VERSION)]
    return make.make_model(
        graph,
        functions=[onnx_functions.function_protos(bits=bits or 8)[op]],
        opset_imports=[make.make_opsetid(*each) for each in opsets],
        ir_version=10,
    )
