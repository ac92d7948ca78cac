"""Count the kernel launches of a memory layer, forward and backward, without a GPU.

    python -m benchmarks.launches [--check | --update]

Graphs are AOTAutograd's and Inductor's (`benchmarks/fake_cuda.py`). A backward op of ours is opaque to them: the layer
is run on the CPU at a small size, where each kernel of ours is recorded instead of launched and each PyTorch operator
in the body of an op counts as one launch (a sort is several on the device). A GEMM counts as one.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from triton.runtime.jit import JITFunction

from benchmarks import static_table
from benchmarks.fake_cuda import cuda_code, fake_driver
from benchmarks.op_calls import Call, OperatorRecorder
from ultramem import ops
from ultramem.config import MemoryConfig
from ultramem.graph import UltraMemLayer, fold_for_inference
from ultramem.presets import preset

PRESETS = ("ultramem-1.6b-x12", "pkm-1.6b-x12")
DTYPE = torch.bfloat16
PROMPT = (4, 512)
DECODE_BATCH = 64
SECTION = static_table.Section(
    name="launches",
    key=("layer", "phase"),
    at_most={"launches": 1.0},
    libraries=("torch", "triton"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Launches:
    """A row of the table."""

    layer: str
    phase: str
    launches: int
    ours: int
    gemm: int
    fused: int  # kernels that Inductor wrote
    aten: int  # other PyTorch operators
    names: list[str]


def summary(layer: str, phase: str, names: list[str]) -> Launches:
    """Names are `triton_...` for Inductor's kernels, `gemm ...`, `aten ...`, and else those of our kernels."""
    prefixes = {"triton_": "fused", "gemm ": "gemm", "aten ": "aten"}
    kinds = collections.Counter(
        next((kind for prefix, kind in prefixes.items() if name.startswith(prefix)), "ours") for name in names
    )
    return Launches(
        layer=layer,
        phase=phase,
        launches=len(names),
        ours=kinds["ours"],
        gemm=kinds["gemm"],
        fused=kinds["fused"],
        aten=kinds["aten"],
        names=names,
    )


_CALL = re.compile(
    r"(?P<kernel>\w+)\.run\(|extern_kernels\.(?P<gemm>\w+)\(|"
    r"torch\.ops\.ultramem\.(?P<op>\w+)\.\w+\(|\b(?:torch\.ops\.)?aten\.(?P<aten>\w+)\.\w+\("
)


def launches_of_code(code: str, op_bodies: dict[str, list[str]]) -> list[str]:
    """Launches in the order of Inductor's wrapper, with each opaque op of ours replaced by those of its body."""
    names: list[str] = []
    for call in _CALL.finditer(code[code.index("def call(") :]):
        if call["op"]:
            names += op_bodies[call["op"]]
        elif call["kernel"]:
            names.append(re.sub(r"_\d+$", "", call["kernel"]))
        else:
            names.append(f"gemm {call['gemm']}" if call["gemm"] else f"aten {call['aten']}")
    return names


def op_bodies(config: MemoryConfig) -> dict[str, list[str]]:
    """What every op of ours in a layer launches, forward and backward, by a run with few keys and idle kernels."""
    with torch.device("meta"):
        layer = UltraMemLayer(replace(config, knum=2 * config.top_m, key_dim=8)).to(DTYPE)
    layer.to_empty(device="cpu")
    assert layer.table is not None
    recorder = OperatorRecorder()

    def launch(kernel: Any, *_: Any, **__: Any) -> None:
        recorder.calls.append(Call(kernel.__name__, 0))

    forced = ops.use_implementation(ops.Implementation.TRITON)
    with mock.patch.object(JITFunction, "run", launch), fake_driver(), forced, recorder:
        for layer.table.sparse_grad in (False, True):
            layer(torch.zeros(1, 3, config.hidden_size, dtype=DTYPE)).sum().backward()
            layer.zero_grad()
    return {
        op: [call.name if call.name.endswith("_kernel") else f"aten {call.name}" for call in calls]
        for op, calls in recorder.bodies.items()
    }


def graphs_of(
    function: Callable[..., Any], inputs: Sequence[Tensor], mode: FakeTensorMode, *, train: bool
) -> list[tuple[GraphModule, list[Any]]]:
    """The graphs that Inductor would be given, [forward] or [forward, backward], and their inputs."""
    found: list[tuple[GraphModule, list[Any]]] = []

    def keep(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append((gm, list(example_inputs)))
        boxed: Callable[..., Any] = make_boxed_func(gm)
        return boxed

    def partition(joint: GraphModule, joint_inputs: Any, **options: Any) -> Any:
        joint_graph_passes(joint)
        return min_cut_rematerialization_partition(joint, joint_inputs, compiler="inductor", **options)

    triton_forced = ops.use_implementation(ops.Implementation.TRITON)
    with mode, fake_driver(), triton_forced, torch.set_grad_enabled(train):
        compiled = aot_function(
            function, keep, keep, partition, decompositions=select_decomp_table(), keep_inference_input_mutations=True
        )
        outputs = compiled(*inputs)
        if train:
            outputs.sum().backward()
    return found


def _named_weights(layer: UltraMemLayer) -> dict[str, Tensor]:
    return dict(layer.named_parameters()) | dict(layer.named_buffers())


def _fake_weights(layer: UltraMemLayer) -> list[Tensor]:
    return [
        torch.empty(each.shape, dtype=each.dtype, requires_grad=each.requires_grad)
        for each in _named_weights(layer).values()
    ]


def _call(layer: UltraMemLayer, weights: Sequence[Tensor], *inputs: Tensor) -> Tensor:
    output: Tensor = torch.func.functional_call(layer, dict(zip(_named_weights(layer), weights, strict=True)), inputs)
    return output


def layer_rows(name: str, config: MemoryConfig) -> list[Launches]:
    """The table's rows of one layer."""
    bodies = op_bodies(config)
    mode = FakeTensorMode()
    with torch.device("meta"):
        layer = UltraMemLayer(config).to(DTYPE)
    folded = fold_for_inference(layer.eval())
    with mode:
        prompt = torch.empty(*PROMPT, config.hidden_size, dtype=DTYPE, requires_grad=True)
        token = torch.empty(DECODE_BATCH, 1, config.hidden_size, dtype=DTYPE)
        past = torch.empty(DECODE_BATCH, config.hidden_size, config.conv_width - 1, dtype=DTYPE)
        weights, constants = _fake_weights(layer), _fake_weights(folded)

    def train(hidden_BSD: Tensor, *weights: Tensor) -> Tensor:
        return _call(layer, weights, hidden_BSD)

    def infer(hidden_BSD: Tensor, *constants: Tensor) -> Tensor:
        return _call(folded, constants, hidden_BSD)

    def decode(hidden_BSD: Tensor, past_BDW: Tensor, *constants: Tensor) -> tuple[Tensor, Tensor]:
        return _call(folded, constants, hidden_BSD, past_BDW), layer.next_conv(hidden_BSD, past_BDW)

    phases: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
        "train": (train, [prompt, *weights]),
        "prefill": (infer, [prompt.detach(), *constants]),
        "decode": (decode, [token, past, *constants]) if config.conv_width > 1 else (infer, [token, *constants]),
    }
    rows = []
    for phase, (function, inputs) in phases.items():
        trains = phase == "train"
        graphs = graphs_of(function, inputs, mode, train=trains)
        for direction, (graph, values) in zip(("forward", "backward"), graphs, strict=False):
            code = cuda_code(graph, values, mode, is_backward=direction == "backward", is_inference=not trains)
            phase_name = f"{phase} {direction}" if trains else phase
            rows.append(summary(name, phase_name, launches_of_code(code, bodies)))
    return rows + [summary(name, f"op {op}", body) for op, body in bodies.items()]


def table(rows: list[Launches]) -> str:
    lines = [f"{'layer':18} {'phase':30} {'launches':>8} {'ours':>4} {'gemm':>4} {'fused':>5} {'aten':>4}"]
    for row in rows:
        counts = f"{row.launches:8} {row.ours:4} {row.gemm:4} {row.fused:5} {row.aten:4}"
        lines.append(f"{row.layer:18} {row.phase:30} {counts}  {', '.join(row.names)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    static_table.add_modes(parser)
    options = parser.parse_args(arguments)
    if "TRITON_INTERPRET" in os.environ:
        parser.error("launches are counted in compiled code: run it without TRITON_INTERPRET")
    found = []
    for name in PRESETS:
        config = preset(name).memory
        assert config is not None
        found += layer_rows(name, config)
    print(table(found))
    return static_table.conclude(SECTION, [asdict(row) for row in found], options)


if __name__ == "__main__":
    sys.exit(main())
