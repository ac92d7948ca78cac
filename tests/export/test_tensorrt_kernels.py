"""Plugin kernels: their launches are the ops' own, and an engine's PTX takes exactly what an engine gives."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.tensorrt_stand_in import build as parts
from benchmarks.tensorrt_stand_in import plugin as stand_in_plugin
from benchmarks.tensorrt_stand_in import stand_in
from ultramem.export import tensorrt_launch, tensorrt_plugins
from ultramem.export.tensorrt_launch import FEW, MANY, PRODUCT
from ultramem.ops.triton import (
    ahead_of_time,
    lookup_product,
    lookup_product_quantized,
    lookup_reduce,
    lookup_reduce_quantized,
    permute_addresses,
    select,
)
from ultramem.ops.triton.ahead_of_time import Compiled
from ultramem.ops.triton.dispatch import FEW_TOKENS, PRODUCT_TOKENS

ROOT = Path(__file__).resolve().parents[2]
TOKENS = (1, 7, 64, 65, 2048, 2049)
N, D, K, C, E, H, R = 40, 48, 6, 2, 5, 2, 3


@pytest.fixture
def launched(monkeypatch):
    """What the ops launch: kernel, grid, arguments and constants, without running it."""
    found = []

    def wrap(kernel):
        class Launcher:
            def __getitem__(self, grid):
                return lambda *given, **constants: found.append((kernel, grid, given, constants))

        return Launcher()

    modules = (lookup_reduce, lookup_product, lookup_reduce_quantized, lookup_product_quantized, permute_addresses)
    for module in (*modules, select):
        monkeypatch.setattr(module, "wrap_triton", wrap)
    return found


@pytest.fixture
def plugins(monkeypatch):
    """The plugins as the stand-in has them, and what they asked to be compiled."""
    asked = []

    def compile_ahead(kernel, types, constants, capability):
        asked.append((kernel, types, constants, capability))
        return Compiled("k", ".entry k(", b"", 32 * constants["num_warps"], 1024)

    monkeypatch.setattr(tensorrt_plugins, "compile_ahead", compile_ahead)
    with stand_in() as trt:
        tensorrt_plugins.register_plugins(trt, trt.plugin, capability=90)
        yield trt, asked


def usual_tactic(tokens, *, has_product):
    """The way that the ops themselves take for so many tokens."""
    if has_product and tokens <= PRODUCT_TOKENS:
        return PRODUCT
    return FEW if tokens <= FEW_TOKENS else MANY


def layer_of(trt, name, tensors, attributes):
    """The layer of a plugin whose tensors have T tokens."""
    types = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BF16", torch.int64: "INT64"}
    types[torch.int8] = "INT8"
    inputs = []
    for label, tensor, free in tensors:
        shape = ("T", *tensor.shape[1:]) if free else tuple(tensor.shape)
        inputs.append(parts.ITensor(label, trt.DataType[types[tensor.dtype]], shape))
    network = parts.INetworkDefinition()
    return network.add_plugin(getattr(trt.plugin.op.ultramem, name)(*inputs, **attributes), aot=True)


def check(plugins, launched, name, tensors, attributes, tactic, tokens, own_numbers):
    """The launch of the plugin, for so many tokens, is the one that the op made."""
    trt, asked = plugins
    layer = layer_of(trt, name, tensors, attributes)
    asked.clear()
    made = parts.compiled(layer)
    kernel, _, constants, capability = asked[list(made).index(tactic)]
    _, _, params, numbers = made[tactic]
    own_kernel, grid, given, own_constants = launched.pop()
    assert own_kernel is kernel
    assert capability == 90
    names = kernel.arg_names if hasattr(kernel, "arg_names") else list(inspect.signature(kernel.fn).parameters)
    own_constants |= {key: value for key, value in zip(names, given, strict=False) if value is None}
    assert constants == own_constants
    sizes = {"T": tokens}
    assert [params.grid_x.evaluate(sizes), params.grid_y.evaluate(sizes)] == [*grid, 1][:2]
    assert params.grid_z.evaluate(sizes) == params.block_y.evaluate(sizes) == params.block_z.evaluate(sizes) == 1
    assert params.block_x.evaluate(sizes) == 32 * own_constants["num_warps"]
    assert params.shared_mem.evaluate(sizes) == 1024
    assert [each.evaluate(sizes) for each in numbers] == own_numbers(given)
    return layer


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lookups_are_launched_as_the_op_launches_them(plugins, launched, dtype, tokens):
    values, indices = torch.zeros(N, D, dtype=dtype), torch.zeros(tokens, K, dtype=torch.int64)
    scores = torch.zeros(tokens, K, C, dtype=dtype)
    lookup_reduce.lookup_reduce(values, indices, scores, E, None)
    tensors = [("values", values, False), ("indices", indices, True), ("scores", scores, True)]
    tactic = usual_tactic(tokens, has_product=dtype != torch.float32)
    layer = check(
        plugins, launched, "LookupReduce", tensors, {"num_blocks": E}, tactic, tokens, lambda given: list(given[-2:])
    )
    (pooled,) = layer.outputs
    assert [each.evaluate({"T": tokens}) for each in pooled.shape] == [tokens, E, D]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_quantised_lookups_are_launched_as_the_op_launches_them(plugins, launched, dtype, tokens):
    rows, scales = torch.zeros(N, D, dtype=torch.int8), torch.zeros(N)
    indices, scores = torch.zeros(tokens, K, dtype=torch.int64), torch.zeros(tokens, K, C, dtype=dtype)
    lookup_reduce_quantized.lookup_reduce_quantized(rows, scales, indices, scores, E, None)
    tensors = [("rows", rows, False), ("scales", scales, False), ("indices", indices, True), ("scores", scores, True)]
    tactic = usual_tactic(tokens, has_product=dtype != torch.float32)
    attributes = {"num_blocks": E, "bits": 8}
    check(
        plugins, launched, "LookupReduceQuantized", tensors, attributes, tactic, tokens, lambda given: list(given[-2:])
    )


@pytest.mark.parametrize("tokens", TOKENS)
def test_permutations_are_launched_as_the_op_launches_them(plugins, launched, tokens):
    addresses = torch.zeros(tokens, K, dtype=torch.int64)
    permute_addresses.permute_addresses(addresses, 1600, 7, False)
    tensors = [("addresses", addresses, True)]
    check(
        plugins, launched, "PermuteAddresses", tensors, {"size": 1600, "seed": 7}, MANY, tokens,
        lambda given: [given[2]],
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [129, 1000])  # of few, an engine takes the same launch, the op another
@pytest.mark.parametrize("rule", ["product", "one_tailed", "two_tailed"])
def test_selections_are_launched_as_the_op_launches_them(plugins, launched, rule, tokens):
    tactic = MANY
    if rule == "product":
        side = torch.zeros(tokens, H, N, dtype=torch.bfloat16)
        select.product_topk(side, side, K)
        tensors, attributes = [("row_scores", side, True), ("col_scores", side, True)], {"k": K}
        name, shape = "ProductTopKWithScratch", [tokens, H, K]
    else:
        side, pair, cores = torch.zeros(tokens, H, R, N), torch.zeros(H, R), torch.zeros(H, C, R, R)
        select.tucker_topk(side, side, cores, pair, pair, K, rule)
        tensors = [("row_scores", side, True), ("col_scores", side, True), ("cores", cores, False)]
        tensors += [("u", pair, False), ("t", pair, False)]
        name, attributes, shape = "TuckerTopKWithScratch", {"k": K, "candidates": rule}, [tokens, H, K, C]
    _, _, given, _ = launched[-1]
    found, chosen, scores, addresses = given[5:9]
    layer = check(plugins, launched, name, tensors, attributes, tactic, tokens, lambda given: [given[9]])
    sizes = {"T": tokens}
    assert [each.evaluate(sizes) for each in layer.outputs[0].shape] == shape == list(scores.shape)
    assert [each.evaluate(sizes) for each in layer.outputs[1].shape] == list(addresses.shape)
    for memory, own in ((layer.outputs[2], found), (layer.outputs[3], chosen)):
        elements = 1
        for each in memory.shape:
            elements *= each.evaluate(sizes)
        assert elements == own.numel()
    kinds = [each.dtype.name for each in layer.outputs]
    assert kinds == ["BF16" if rule == "product" else "FLOAT", "INT64", "INT64", "FLOAT"]


@pytest.mark.parametrize(
    ("dtype", "tactics"), [("fp32", (MANY, FEW)), ("fp16", (MANY, FEW, PRODUCT)), ("bf16", (MANY, FEW, PRODUCT))]
)
def test_an_engine_times_every_way_that_a_type_has(dtype, tactics):
    operands = [tensorrt_launch.Operand((9, 8), dtype), tensorrt_launch.Operand(("T", 4), "i64")]
    assert tensorrt_launch.lookup_reduce_tactics([*operands, operands[0]], {}) == tactics
    if dtype != "fp32":
        wide = tensorrt_launch.Operand(("T", 4, 2), "fp32")
        assert tensorrt_launch.lookup_reduce_tactics([*operands, wide], {}) == (MANY, FEW)


def test_definitions_are_made_once_and_refuse_what_no_engine_has(plugins):
    trt, _ = plugins
    before = dict(stand_in_plugin.definitions())
    tensorrt_plugins.register_plugins(trt, trt.plugin)
    assert stand_in_plugin.definitions() == before
    assert set(before) == {each.id for each in tensorrt_plugins.PLUGINS}
    tensors = [("addresses", torch.zeros(3, 4, dtype=torch.int8), True)]
    with pytest.raises(KeyError):
        trt.plugin.AutoTuneCombination("FP8X", "LINEAR", [1])
    layer = layer_of(trt, "PermuteAddresses", tensors, {"size": 1600, "seed": 7})
    layer.inputs[0].dtype = trt.DataType.BOOL
    with pytest.raises(ValueError, match=r"takes tensors of fp32, fp16, bf16, i64, i8, got DataType\.BOOL"):
        parts.compiled(layer)
    rows, scores = tensorrt_launch.Operand((9, 8), "i8"), tensorrt_launch.Operand((3, 4, 2), "fp32")
    slots, scales = tensorrt_launch.Operand((3, 4), "i64"), tensorrt_launch.Operand((9,), "fp32")
    with pytest.raises(ValueError, match="bits must be 8: an engine has no unsigned bytes inside"):
        tensorrt_launch.lookup_reduce_quantized(
            [rows, scales, slots, scores], [scores], {"num_blocks": 1, "bits": 4}, MANY, None
        )


def test_arguments_of_an_entry_are_put_in_order_and_none_that_is_read_is_left_out():
    parameters = ",".join(
        f"\n\t.param .{kind} k_param_{index}" for index, kind in enumerate(("u64", "u64", "u32", "u64", "u64", "u64"))
    )
    ptx = f".visible .entry k({parameters}\n)\n{{ ld.param.b64 %r, [k_param_0]; ld.param.b32 %s, [k_param_2]; }}"
    made = ahead_of_time.with_arguments(ptx, "k", [2, 0])
    assert ahead_of_time.argument_types(made, "k") == ["u32", "u64"]
    assert made.index(".param .u32 k_param_2") < made.index(".param .u64 k_param_0")
    assert made.endswith("{ ld.param.b64 %r, [k_param_0]; ld.param.b32 %s, [k_param_2]; }")
    with pytest.raises(ValueError, match="k must not read its argument 2, which a launch does not give it"):
        ahead_of_time.with_arguments(ptx, "k", [0, 1])
    with pytest.raises(ValueError, match="k must take 7 arguments, got 6"):
        ahead_of_time.with_arguments(ptx, "k", [6])
    with pytest.raises(ValueError, match="must have an entry other, got none"):
        ahead_of_time.with_arguments(ptx, "other", [0])


@pytest.mark.parametrize("part", ["LookupReduce", "TopK", "Permute"])
def test_kernels_of_every_architecture_spill_nothing_and_take_what_an_engine_gives(part):
    """One type here, all types by `python -m benchmarks.tensorrt_kernels`."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    dtype = "i64" if part == "Permute" else "bf16"
    words = ["--plugin", part, "--dtype", dtype, "--json"]
    if part == "TopK":
        words += ["--capability", "90", "--capability", "120"]  # seconds each
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.tensorrt_kernels", *words],
        cwd=ROOT, env=environment, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    made = json.loads(result.stdout.splitlines()[-1])
    assert {each["arch"] for each in made} >= {"sm_90a", "sm_120a"}
    if part != "TopK":
        assert {each["arch"] for each in made} == {"sm_80", "sm_90a", "sm_100a", "sm_120a"}
    for each in made:
        assert each["spills"] == each["stack_bytes"] == 0
        assert each["arguments"] == each["wanted_arguments"]
