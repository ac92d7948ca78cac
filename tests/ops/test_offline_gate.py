"""Kernels compiled for sm_90 without a GPU, in a process of their own: this one's Triton may be the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
# Traces the forward ops on fake CPU tensors with the kernels forced, and lists what each launch is taken to write.
TRACE = """
import json
import torch
import triton
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget
from ultramem import ops


class Driver:  # what tracing asks of a driver
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0


triton.runtime.driver._active = Driver()
written = {}


def trace(name, function, *arguments):
    graph = make_fx(dispatch_functionalize(function))(*arguments).graph
    launches = [node for node in graph.nodes if node.target is triton_kernel_wrapper_functional]
    written[name] = [sorted(node.kwargs["tensors_to_clone"]) for node in launches]


with FakeTensorMode(), torch.no_grad(), ops.use_implementation(ops.Implementation.TRITON):
    index = torch.empty(8, 6, dtype=torch.int64)
    side, sides, pair = torch.empty(8, 2, 20), torch.empty(8, 2, 2, 20), torch.empty(2, 2)
    tucker = sides, sides, torch.empty(2, 2, 2, 2), pair, pair
    table, weights = torch.empty(9, 32), torch.empty(8, 6, 2)
    trace("lookup_dot", ops.lookup_dot, table, index, torch.empty(8, 32))
    trace("lookup_reduce", lambda *x: ops.lookup_reduce(*x, num_blocks=4), table, index, weights)
    trace("lookup_reduce permuted", lambda *x: ops.lookup_reduce(*x, permutation_seed=3), table, index, weights)
    trace("lookup_reduce one block", ops.lookup_reduce, table, index, weights)
    trace("permute_addresses", lambda x: ops.permute_addresses(x, 1000, 1), index)
    trace("product_topk", lambda *x: tuple(ops.product_topk(*x, 5)), side, side)
    for rule in ("one_tailed", "two_tailed"):
        trace(f"tucker_topk {rule}", lambda *x: tuple(ops.tucker_topk(*x, 5, candidates=rule)), *tucker)
print(json.dumps(written))
"""


# Updates rows as in training, with every launch compiled alone, and counts the compilations of each kernel.
UPDATES = """
import collections
import json
import torch
import triton
from triton.backends.compiler import GPUTarget
from ultramem.ops import LazyRows, SortedSlots
from ultramem.ops.triton import catch_up, row_gradient, update_rows, update_segments


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


triton.runtime.driver._active = Driver()
triton.runtime.JITFunction.__getitem__ = lambda kernel, grid: lambda *x, **y: kernel.warmup(*x, grid=grid, **y)
compiled = collections.Counter()
row_gradient.WINDOWS = ((0, 4),)
triton.knobs.runtime.jit_cache_hook = lambda **call: compiled.update([call["fn"].name.split(".")[-1]])
table, first, second = (torch.empty(20, 8) for _ in range(3))
last_step, schedule = torch.empty(20, dtype=torch.int32), torch.empty(20, 3, dtype=torch.float64)
for step, count, decay, seed in (1, 1, 0.0, 1), (2, 2, 0.1, 16), (3, 16, 0.5, 5), (16, 20, 0.5, 0):
    rows, grads = torch.arange(count), torch.empty(count, 8)
    rule = (schedule, rows, grads, step, decay)
    update_rows.adamw_rows_(table, first, second, last_step, *rule, 0.5, 0.9, 1.0, decay, seed)
    update_rows.adagrad_rows_(table, torch.empty(20), last_step, *rule, 1.0, decay, seed)
    catch_up.catch_up_rows(table, LazyRows(schedule, torch.tensor(step), last_step, first, second, decay), rows)
    slots = SortedSlots(torch.empty(3 * count, dtype=torch.int32), torch.empty(3 * count, dtype=torch.int64))
    lookup = (schedule, slots, torch.empty(count, 2, 8), torch.empty(count, 3, 2), step, decay)
    update_segments.adamw_segments_(table, first, second, last_step, *lookup, 0.5, 0.9, 1.0, decay, seed)
    update_segments.adagrad_segments_(table, torch.empty(20), last_step, *lookup, 1.0, decay, seed)
print(json.dumps(compiled))
"""


def run_compiler(*arguments: str | Path) -> dict:
    """The JSON object that a Python program prints last, run where Triton compiles."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_compiled_graphs_copy_no_input_of_a_kernel() -> None:
    # torch.compile clones whatever it believes that a kernel writes; an input among them costs a launch and its bytes.
    select = [["addresses", "chosen", "found", "scores"]]
    assert run_compiler("-c", TRACE) == {
        "lookup_dot": [["grad_scores"]],
        "lookup_reduce": [["out"]],
        "lookup_reduce permuted": [["out", "permuted"]],
        "lookup_reduce one block": [["out"]],
        "permute_addresses": [["out"]],
        "product_topk": select,
        "tucker_topk one_tailed": select,
        "tucker_topk two_tailed": select,
    }


def test_kernels_of_an_update_are_compiled_once_whatever_the_step() -> None:
    once = dict.fromkeys(("adamw_rows_kernel", "adagrad_rows_kernel", "catch_up_rows_kernel"), 1)
    a_rule = dict.fromkeys(("update_segments_kernel", "update_crossing_rows_kernel"), 2)
    assert run_compiler("-c", UPDATES) == {**once, **a_rule, "combine_parts_kernel": 1}
