"""Bytes and FLOPs of single nodes: by hand, against PyTorch's own counter, and against the arithmetic of stages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from profile_cases import Eager, make_model, make_profile
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ultramem import MemoryConfig
from ultramem.runtime.profile import Profile
from ultramem.runtime.profile.arithmetic import stage_costs
from ultramem.runtime.profile.eager_work import WorkSeen
from ultramem.runtime.profile.inductor_kernels import kernels_of, recorded_compilation
from ultramem.runtime.profile.inductor_work import graph_calls, kernel_work
from ultramem.runtime.profile.onnx_work import NO_REPACKING, onnx_work
from ultramem.runtime.profile.operator_work import NO_WORK, Operand, Work, operand, operator_work

FLOAT, INT64 = 4, 8


def floats(*shape: int) -> Operand:
    return operand(shape, FLOAT)


def indices(*shape: int) -> Operand:
    return operand(shape, INT64)


# The tables: N = 100 rows of D = 6, T = 3 tokens that read K = 5 rows each.
@pytest.mark.parametrize(
    ("name", "inputs", "outputs", "arguments", "expected"),
    [
        ("aten::mm", [floats(3, 4), floats(4, 5)], [floats(3, 5)], {}, Work(2 * 3 * 4 * 5, 4 * (12 + 20 + 15))),
        ("aten::addmm", [floats(5), floats(3, 4), floats(4, 5)], [floats(3, 5)], {}, Work(120, 4 * (5 + 47))),
        ("MatMul", [floats(2, 3, 4), floats(4, 5)], [floats(2, 3, 5)], {}, Work(240, 4 * (24 + 20 + 30))),
        ("Gemm", [floats(4, 3), floats(4, 5)], [floats(3, 5)], {"transA": 1}, Work(120, 4 * 47)),
        (
            "Einsum", [floats(3, 2, 4), floats(2, 4, 5)], [floats(3, 2, 5)], {"equation": "t h d, h d n -> t h n"},
            Work(2 * 3 * 2 * 4 * 5, 4 * (24 + 40 + 30)),
        ),
        ("aten::gelu", [floats(3, 4)], [floats(3, 4)], {}, Work(0, 4 * 24)),
        ("Reshape", [floats(3, 4), indices(1)], [floats(12)], {}, NO_WORK),
        ("aten::embedding", [floats(100, 6), indices(3)], [floats(3, 6)], {}, Work(0, 4 * 18 * 2 + 8 * 3)),
        # More indices than rows: each row once.
        ("Gather", [floats(2, 6), indices(9)], [floats(9, 6)], {}, Work(0, 4 * (12 + 54) + 8 * 9)),
        (
            "ultramem_native::lookup_reduce", [floats(100, 6), indices(3, 5), floats(3, 5)], [floats(3, 1, 6)], {},
            Work(2 * 15 * 6, 4 * (15 * 6 + 15 + 18) + 8 * 15),
        ),
        (
            "LookupReduceQuantized", [operand((100, 6), 1), floats(100), indices(3, 5), floats(3, 5)],
            [floats(3, 1, 6)], {}, Work(2 * 15 * 6, 15 * (6 + 4) + 4 * (15 + 18) + 8 * 15),
        ),
        (
            "ultramem_native::lookup_dot", [floats(100, 6), indices(3, 5), floats(3, 6)], [floats(3, 5)], {},
            Work(2 * 15 * 6, 4 * (15 * 6 + 18 + 15) + 8 * 15),
        ),
        (
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            [floats(1, 2, 3, 8), floats(1, 2, 7, 8), floats(1, 2, 7, 8)], [floats(1, 2, 3, 8)], {},
            Work(2 * 2 * 3 * 7 * 16, 4 * (48 + 112 + 112 + 48)),
        ),
        # A GPU's, with a mask for all heads.
        (
            "aten::_scaled_dot_product_efficient_attention",
            [floats(1, 2, 3, 8), floats(1, 2, 7, 8), floats(1, 2, 7, 8), Operand((1, 2, 3, 7), FLOAT, 21)],
            [floats(1, 2, 3, 8)], {}, Work(2 * 2 * 3 * 7 * 16, 4 * (48 + 112 + 112 + 21 + 48)),
        ),
        # One expert's weights are read where there is one token, whatever the number of experts.
        (
            "GroupedMM", [floats(1, 4), floats(8, 4, 5), operand((8,), 4)], [floats(1, 5)], {},
            Work(40, 4 * (4 + 20 + 8 + 5)),
        ),
    ],
)  # fmt: skip
def test_work_of_an_operator(
    name: str, inputs: list[Operand], outputs: list[Operand], arguments: dict[str, Any], expected: Work
) -> None:
    assert operator_work(name, inputs, outputs, arguments) == expected


def test_an_expanded_axis_is_one_element() -> None:
    with WorkSeen() as seen, torch.no_grad():
        torch.ones(1).expand(1000) + torch.ones(1000)
    assert seen.found[-1].bytes == FLOAT * (1 + 1000 + 1000)


def test_views_move_nothing_and_writes_are_counted() -> None:
    cache, new = torch.zeros(100, 8), torch.ones(2, 8)
    with WorkSeen() as seen, torch.no_grad():
        cache.view(50, 16).transpose(0, 1).unsqueeze(0)
        assert set(seen.found) == {NO_WORK}
        cache[3:5].copy_(new)
        assert seen.found[-1].bytes == 2 * new.numel() * FLOAT  # read, and written to where they belong
        cache.index_copy_(0, torch.tensor([7, 9]), new)
        assert seen.found[-1].bytes == 2 * new.numel() * FLOAT + 2 * INT64
        cache.add_(1.0)
        assert seen.found[-1].bytes == 2 * cache.numel() * FLOAT


def test_what_an_operator_is_made_of_is_seen_in_its_place() -> None:
    """In inference mode a linear layer reaches the mode whole."""
    with WorkSeen() as seen, torch.inference_mode():
        torch.nn.functional.linear(torch.ones(2, 3, 4), torch.ones(5, 4))
    assert sum(each.flops for each in seen.found) == 2 * 6 * 4 * 5


# Eager


@pytest.fixture(scope="module")
def eager_profile() -> Profile:
    return make_profile()


def test_flops_of_eager_nodes_are_those_of_the_stages(eager_profile: Profile) -> None:
    """Attention computes the pairs that its mask hides too, and a convolution of four taps is no product."""
    config = make_model().config
    assert isinstance(config.memory, MemoryConfig)
    for times in eager_profile.stages:
        new, cached = (7, 0) if times.phase == "prefill" else (1, 7)
        costs = stage_costs(config, batch=times.batch, new_tokens=new, cached_tokens=cached)
        for cost in costs:
            nodes = [row for row in times.nodes if row.stages == (cost.stage,) and row.kind != "module"]
            assert all(row.flops is not None and row.bytes is not None for row in nodes)
            found = sum(row.flops or 0 for row in nodes)
            moved = sum(row.bytes or 0 for row in nodes)
            if cost.stage == "attention":
                assert found >= cost.flops
            elif cost.stage == "query":
                kernel = config.memory.conv_width * config.hidden_size * len(config.parsed_insertions)
                assert found == cost.flops - 2 * kernel * times.batch * new
            else:
                assert found == cost.flops, (times.phase, cost.stage)
            # The arithmetic is a lower bound, but for weights of a convolution that operators read one tap at a time.
            assert moved > 0.99 * cost.total_bytes, (times.phase, cost.stage)
            if cost.stage in ("lookup", "expand", "head"):
                assert moved < 1.02 * cost.total_bytes, (times.phase, cost.stage)


def test_eager_nodes_are_what_runs_without_a_profiler(eager_profile: Profile) -> None:
    """Where nobody looks, ops of this package are their bodies."""
    kinds = {row.kind for times in eager_profile.stages for row in times.nodes}
    assert "aten::linear" in kinds
    assert not any(kind.startswith("ultramem::") for kind in kinds)


def test_nodes_have_shares_of_the_roofs(eager_profile: Profile) -> None:
    machine = eager_profile.machine
    rows = [row for times in eager_profile.stages for row in times.nodes if row.bytes and row.time_us]
    assert len(rows) > 100
    for row in rows:
        assert row.flops_per_byte == pytest.approx(row.flops / row.bytes)
        seconds = row.time_us * 1e-6
        assert row.bandwidth_share == pytest.approx(row.bytes / seconds / machine.bytes_per_second)
        assert row.compute_share == pytest.approx(row.flops / seconds / machine.gemm_flops_per_second)


def test_flops_are_those_of_pytorchs_own_counter(eager_profile: Profile) -> None:
    """Which knows no ops of this package, and attention on a GPU alone."""
    engine = Eager(make_model())
    prompt = torch.zeros(3, 7, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        engine.prefill(prompt)
    (times,) = [each for each in eager_profile.stages if (each.phase, each.batch) == ("prefill", 3)]
    unknown = ("attention::", "tucker_topk", "lookup", "scaled_dot_product")
    known = sum(row.flops or 0 for row in times.nodes if not any(name in row.node for name in unknown))
    assert known == counter.get_total_flops() > 0


# Generated kernels


def compiled_calls(sizes: list[int]) -> list[tuple[list[str], list[Work | None]]]:
    """Names and work of the kernels of a small graph whose first axis is free, for each of its sizes."""
    torch.manual_seed(0)
    weight, table = torch.randn(16, 32), torch.randn(50, 32)

    def graph(inputs_TD: Tensor, rows_T: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.nn.functional.gelu(inputs_TD @ weight)
        return (hidden * table[rows_T] + table[0]).topk(3).values, hidden

    found = []
    torch._dynamo.reset()
    with recorded_compilation(), torch.no_grad():
        compiled = torch.compile(graph, fullgraph=True, dynamic=True)
        for size in sizes:
            inputs = (torch.randn(size, 16), torch.arange(size) % 50)
            compiled(*inputs)
            (call,) = graph_calls(lambda inputs=inputs: compiled(*inputs))
            kernels = kernels_of(call.graph)
            assert kernels is not None
            assert all(kernel.description is not None for kernel in kernels)
            works = [kernel_work(kernel.description or {}, call.sizes) for kernel in kernels]
            found.append(([kernel.name for kernel in kernels], works))
    return found


TRITON = """
    import json, torch
    from torch._inductor import config, debug
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from benchmarks.fake_cuda import cuda_code
    from ultramem.runtime.profile.inductor_work import DESCRIPTIONS, described_kernels, kernel_work

    def graph(inputs, weight, table, rows):
        hidden = torch.nn.functional.gelu(inputs @ weight)
        return (hidden * table[rows] + table[0]).softmax(-1), hidden

    mode = FakeTensorMode()
    with mode:
        inputs = [torch.empty(5, 16), torch.empty(16, 32), torch.empty(50, 32), torch.empty(5, dtype=torch.int64)]
        traced = make_fx(graph, decomposition_table=select_decomp_table())(*inputs)
    with config.patch({"trace.provenance_tracking_level": 2}), described_kernels():
        cuda_code(traced, inputs, mode, is_inference=True)
        found = debug.dump_inductor_provenance_info()[DESCRIPTIONS]
    sizes = [tuple(each.shape) for each in inputs]
    print(json.dumps({key: kernel_work(description, sizes) for key, description in found.items()}))
"""


def test_triton_kernels_have_work_too() -> None:
    """By Inductor's code for a GPU, which is written without one."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRITON)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    works = [(key.partition("_")[0], Work(*work)) for key, work in json.loads(done.stdout.splitlines()[-1]).items()]
    assert works == [
        ("extern", Work(2 * 5 * 16 * 32, FLOAT * (5 * 16 + 16 * 32 + 5 * 32))),
        # A product, indices, the rows that they pick and the first one; two results.
        ("triton", Work(0, FLOAT * (160 + 160 + 32 + 2 * 160) + INT64 * 5)),
    ]


def test_work_of_generated_kernels_follows_the_sizes_of_a_call() -> None:
    calls = compiled_calls([5, 9])
    assert compiled_calls([5, 9]) == calls  # from the compiler's cache
    for size, (names, works) in zip([5, 9], calls, strict=True):
        by_name = dict(zip(names, works, strict=True))
        product = next(work for name, work in by_name.items() if "mm" in name)
        hidden = size * 32
        assert product == Work(2 * size * 16 * 32, FLOAT * (size * 16 + 16 * 32 + hidden))
        fused = next(work for name, work in by_name.items() if name.startswith("cpp_fused"))
        # In: the product, indices and as many rows, and one row more; out: what is returned and what topk reads.
        assert fused == Work(0, FLOAT * (hidden + hidden + 32) + INT64 * size + FLOAT * 2 * hidden)
        topk = next(work for name, work in by_name.items() if "topk" in name)
        assert topk == Work(0, FLOAT * hidden + (FLOAT + INT64) * size * 3)


def test_work_that_depends_on_values_is_not_known() -> None:
    description = {
        "symbols": {"s0": (0, 0)},
        "operators": [("aten::mm", [(["-u0 + u1", 4], 4, []), ([4, 5], 4, [])], [(["-u0 + u1", 5], 4, [])], {})],
        "accesses": None,
    }
    assert kernel_work(description, [(3, 4)]) is None
    description["operators"] = [("aten::mm", [(["s0", 4], 4, []), ([4, 5], 4, [])], [(["s0", 5], 4, [])], {})]
    assert kernel_work(description, [(3, 4)]) == Work(120, 4 * (12 + 20 + 15))


# ONNX Runtime


def test_work_of_onnx_nodes_is_read_from_a_run(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 20]>
        graph (float[T, 16] inputs, int64 turns, float[16, 32] weight) => (float[T, 32] hidden, float[T, 16] doubled)
        {
          product = MatMul (inputs, weight)
          hidden = Gelu (product)
          on = Constant <value = bool {1}> ()
          doubled = Loop (turns, on, inputs) <body = turn (int64 index, bool before, float[T, 16] x)
            => (bool after, float[T, 16] y) { after = Identity (before) y = Add (x, x) }>
        }"""
    )
    for node in model.graph.node:
        node.name = node.op_type
    onnx.save(model, str(tmp_path / "model.onnx"))
    options = runtime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "run")
    options.add_session_config_entry(*NO_REPACKING)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    inputs = {"inputs": torch.ones(5, 16), "turns": torch.tensor(3), "weight": torch.ones(16, 32)}
    session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    found = onnx_work(Path(session.end_profiling()), model.graph.node)
    assert found["MatMul"] == Work(2 * 5 * 16 * 32, FLOAT * (5 * 16 + 512 + 5 * 32))
    assert found["Gelu"] == Work(0, FLOAT * 2 * 5 * 32)
    assert found["Loop"].bytes == 3 * FLOAT * 3 * 5 * 16  # three turns, each of which reads its input twice


def test_a_node_without_a_name_in_the_graph_is_the_loop_that_it_runs_in(tmp_path: Path) -> None:
    def event(name: str, kind: str, start: int, size: int) -> dict[str, Any]:
        shapes = [{"float": [size]}]
        told = {"op_name": kind, "input_type_shape": shapes, "output_type_shape": shapes}
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": 5, "args": told}

    onnx = pytest.importorskip("onnx")
    nodes = [onnx.helper.make_node(kind, [], ["y"], name=name) for name, kind in (("a", "Loop"), ("b", "Neg"))]
    inner = [event("inner", "Neg", start, 2) for start in (3, 5)]
    events = [event("b", "Neg", 20, 7), *inner, event("a", "Loop", 1, 9)]
    (tmp_path / "run.json").write_text(json.dumps([{"cat": "Session", "name": "x"}, *events]))
    assert onnx_work(tmp_path / "run.json", nodes) == {"a": Work(0, 32), "b": Work(0, 56)}
