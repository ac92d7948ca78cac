"""ONNX models of one node of this package, and the cases that every evaluator of such a node is held to."""

import onnxruntime
import torch
from onnx import TensorProto, helper

from ultramem.export import onnx_functions

DTYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
}


def model_of(op, inputs, outputs, candidates="one_tailed", **attributes):
    """A model whose node `op` takes `inputs` (tensors by name) and gives `outputs` ((dtype, rank) by name).

    What numpy has no type for comes in and goes out as float32.
    """
    if op == "TuckerTopK":
        attributes["candidates"] = candidates
    kinds = {name: x.dtype for name, x in inputs.items()} | {name: dtype for name, (dtype, _) in outputs.items()}
    ranks = {name: x.ndim for name, x in inputs.items()} | {name: rank for name, (_, rank) in outputs.items()}
    narrow = {name for name, dtype in kinds.items() if dtype == torch.bfloat16}
    inner = {name: f"{name}_narrow" if name in narrow else name for name in kinds}
    node = helper.make_node(
        op,
        [inner[name] for name in inputs],
        [inner[name] for name in outputs],
        name=f"memories.0.lookup/{op}",
        domain="ultramem",
        plugin_namespace="ultramem",
        plugin_version="1",
        **attributes,
    )
    before = [helper.make_node("Cast", [x], [inner[x]], to=TensorProto.BFLOAT16) for x in inputs if x in narrow]
    after = [helper.make_node("Cast", [inner[x]], [x], to=TensorProto.FLOAT) for x in outputs if x in narrow]

    def value(name):
        dtype = torch.float32 if name in narrow else kinds[name]
        return helper.make_tensor_value_info(name, DTYPES[dtype], [None] * ranks[name])

    graph = helper.make_graph(
        [*before, node, *after], "one_node", [value(name) for name in inputs], [value(name) for name in outputs]
    )
    bodies = onnx_functions.function_protos(
        candidates, bits=attributes.get("bits", 8), double=torch.float64 in kinds.values()
    )
    return helper.make_model(
        graph,
        functions=[bodies[op]],
        opset_imports=[helper.make_opsetid("", onnx_functions.OPSET), helper.make_opsetid("ultramem", 1)],
        ir_version=10,
    )


def feeds_of(inputs):
    return {name: (x.float() if x.dtype == torch.bfloat16 else x).numpy() for name, x in inputs.items()}


def run_session(model, inputs, options=None):
    """Outputs of ONNX Runtime on the CPU."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return tuple(torch.from_numpy(each) for each in session.run(None, feeds_of(inputs)))


def widened(x):
    """What an op computes with: float32 at least."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def assert_rounded(actual, wide, dtype):
    """`actual` is `wide`, to the rounding of sums and one rounding to `dtype`."""
    assert not actual.isnan().any()
    if dtype in (torch.float16, torch.bfloat16):
        torch.testing.assert_close(actual.to(wide.dtype), wide, rtol=torch.finfo(dtype).eps, atol=1e-5)
    elif dtype == torch.float64:
        torch.testing.assert_close(actual, wide)
    else:
        torch.testing.assert_close(actual, wide, rtol=1e-5, atol=1e-5)


def integers(*shape):
    """Few different values, so that there are many ties; sums of their products are exact in every dtype."""
    return torch.randint(-2, 3, shape).float()


def lookup_case(dtype, score_dtype, tokens, blocks, cores, n=25, d=12, k=6):
    """Inputs of LookupReduce: rows that are met twice, of any block."""
    indices = torch.randint(n * blocks, (tokens, k))
    indices[:, 1:2] = indices[:, :1]
    return {
        "values": torch.randn(n, d, dtype=torch.float64).to(dtype),
        "indices": indices,
        "scores": torch.randn(tokens, k, cores, dtype=torch.float64).to(score_dtype),
    }


def tucker_case(dtype, tokens, heads, n, rank, cores, draw):
    """Inputs of TuckerTopK; weights have the dtype in which scores are added up."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "row_scores": draw(tokens, heads, rank, n).to(dtype),
        "col_scores": draw(tokens, heads, rank, n).to(dtype),
        "cores": draw(heads, cores, rank, rank).to(wide),
        "u": draw(heads, rank).to(wide),
        "t": draw(heads, rank).to(wide),
    }
