"""Converters of our ops for torch-tensorrt, node by node of captured models, against a stand-in of the network."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from exported import CONFIG, MEMORY, build

from benchmarks.tensorrt_stand_in import CALLS, stand_in
from benchmarks.tensorrt_stand_in.build import INetworkDefinition, ITensor
from ultramem import ops
from ultramem.export import ExportOptions, tensorrt_plugins
from ultramem.export.program import capture, weights
from ultramem.export.rounding import rounded
from ultramem.export.torch_tensorrt import CONVERTERS, register_converters

TYPES = {
    torch.float32: "FLOAT",
    torch.float16: "HALF",
    torch.bfloat16: "BF16",
    torch.int64: "INT64",
    torch.int8: "INT8",
}


@pytest.fixture
def registered(monkeypatch):
    """What torch-tensorrt was told: for each op its converter, validator and whether it takes free sizes."""
    table = {}

    def dynamo_tensorrt_converter(key, *, capability_validator=None, supports_dynamic_shapes=False):
        def register(converter):
            table[key] = (converter, capability_validator, supports_dynamic_shapes)
            return converter

        return register

    def get_trt_tensor(ctx, input_val, name):
        if isinstance(input_val, ITensor):
            return input_val
        assert isinstance(input_val, torch.Tensor), f"{name} must be a tensor or a weight, got {input_val}"
        return ITensor(name, trt.DataType[TYPES[input_val.dtype]], tuple(input_val.shape))

    conversion = ModuleType("torch_tensorrt.dynamo.conversion")
    conversion.dynamo_tensorrt_converter = dynamo_tensorrt_converter
    utilities = ModuleType("torch_tensorrt.dynamo.conversion.converter_utils")
    utilities.get_trt_tensor = get_trt_tensor
    for module in (ModuleType("torch_tensorrt"), ModuleType("torch_tensorrt.dynamo"), conversion, utilities):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(tensorrt_plugins, "_capability", lambda: 90)
    with stand_in() as trt:
        assert register_converters() == tuple(CONVERTERS)
        yield table, trt


def test_without_torch_tensorrt_one_line_says_so():
    with pytest.raises(ImportError, match="TensorRT is not installed") as error:
        register_converters()
    assert "\n" not in str(error.value)
    with stand_in(), pytest.raises(ImportError, match="torch-tensorrt cannot be imported: No module named") as error:
        register_converters()
    assert "\n" not in str(error.value)


def test_every_op_with_a_plugin_is_registered_for_free_sizes(registered):
    table, _ = registered
    assert set(table) == {getattr(torch.ops.ultramem, name).default for name in CONVERTERS}
    assert all(dynamic for _, _, dynamic in table.values())


def convert(registered, program):
    """The layers of all nodes of ours, which follow each other as the graph's do."""
    table, trt = registered
    context, constants, values = SimpleNamespace(net=INetworkDefinition()), weights(program.exported), {}
    seen = []

    def value_of(node):
        if node.name in constants:
            return constants[node.name]
        if node not in values:
            val = node.meta["val"]
            shape = tuple(size if isinstance(size, int) else "T" for size in val.shape)
            values[node] = ITensor(node.name, trt.DataType[TYPES[val.dtype]], shape)
        return values[node]

    for node in program.exported.graph.nodes:
        if node.target in table:
            converter, validate, _ = table[node.target]
            assert validate(node, None)
            args = tuple(value_of(each) if isinstance(each, torch.fx.Node) else each for each in node.args)
            made = converter(context, node.target, args, node.kwargs, node.name)
            outputs, expected = (made, node.meta["val"]) if isinstance(made, tuple) else ((made,), (node.meta["val"],))
            assert len(outputs) == len(expected)
            for output, val in zip(outputs, expected, strict=True):
                assert output.dtype is trt.DataType[TYPES[val.dtype]]
                sizes = [each.constant if each.is_constant else None for each in output.shape]
                assert sizes == [size if isinstance(size, int) else None for size in val.shape]
            seen.append(node)
    return context.net.layers, seen


@pytest.mark.parametrize(
    ("memory", "options", "expected"),
    [
        (MEMORY, ExportOptions(), ["TuckerTopKWithScratch", "PermuteAddresses", "LookupReduce"]),
        (
            replace(MEMORY, candidates="two_tailed", permutation="none"),
            ExportOptions(dtype="bf16"),
            ["TuckerTopKWithScratch", "LookupReduce"],
        ),
        (
            replace(MEMORY, rank=1, num_cores=1),
            ExportOptions(dtype="fp16", table="int8"),
            ["ProductTopKWithScratch", "PermuteAddresses", "LookupReduceQuantized"],
        ),
    ],
    ids=["ultramem", "two-tailed", "product-keys-int8"],
)
def test_a_captured_model_becomes_plugin_layers(registered, memory, options, expected):
    config = replace(CONFIG, memory=replace(memory, num_layers=1), num_layers=1, insertions="1:1")
    program = capture(rounded(build(config), options))
    layers, nodes = convert(registered, program)
    assert [layer.instance.definition.id for layer in layers] == [f"ultramem::{name}" for name in expected]
    for layer in layers:
        assert any(node.name in layer.name for node in nodes)
    added = [call.arguments[1] for call in CALLS if call.name == "add_plugin"]
    lookup = added[-1]
    assert lookup["num_blocks"] == memory.expansion
    assert added[0]["k"] == memory.top_m
    if "PermuteAddresses" in expected:
        table = next(each for name, each in weights(program.exported).items() if "table" in name and each.ndim == 2)
        assert added[1]["size"] == table.shape[0] * memory.expansion


def captured(function, *inputs):
    class Module(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    graph = torch.export.export(Module(), inputs).graph
    return next(node for node in graph.nodes if "ultramem" in str(node.target))


def test_what_no_plugin_serves_is_left_to_pytorch(registered):
    table, _ = registered
    side = torch.zeros(3, 2, 80)
    index, scores = torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4, 1)
    packed = ops.quantize_rows(torch.randn(9, 8), 4)
    refused = [
        captured(lambda x, y: tuple(ops.product_topk(x, y, 65)), side, side),
        captured(lambda x: ops.permute_addresses(x, 80, 1, inverse=True), index),
        captured(lambda r, s, i, w: ops.lookup_reduce_quantized(r, s, i, w), *packed, index, scores),
        captured(lambda v, i, w: ops.lookup_reduce(v, i, w), torch.zeros(9, 8).double(), index, scores.double()),
    ]
    for node in refused:
        assert not table[node.target][1](node, None), node
    accepted = captured(lambda x, y: tuple(ops.product_topk(x, y, 64)), side, side)
    assert table[accepted.target][1](accepted, None)
