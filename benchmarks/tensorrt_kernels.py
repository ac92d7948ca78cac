"""Compile every plugin kernel of the TensorRT export ahead of time, without a GPU, and read what the cubin says.

    python -m benchmarks.tensorrt_kernels [--capability 90] [--plugin LookupReduce] [--json]

Each is compiled to the PTX that an engine holds, and that PTX is assembled by ptxas as a driver would. Ends 1 if a
kernel spills, takes other arguments than an engine gives, or more shared memory than a launch has unasked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton

from benchmarks.cubin import read_code, read_resources
from ultramem.export.tensorrt_launch import FEW, MANY, PRODUCT, Operand
from ultramem.export.tensorrt_plugins import MAX_SHARED_BYTES, PLUGINS, Plugin
from ultramem.ops.triton.ahead_of_time import argument_types, compile_ahead

CAPABILITIES = (80, 90, 100, 120)
TACTICS = {MANY: "many", FEW: "few", PRODUCT: "product"}
TOKENS = 64  # of the shapes; no kernel is compiled for a number of tokens
# The 1.6B row of the paper's Table 6: value dim, side, slots a head; two heads, ranks and cores, four blocks.
D, N, K, H, R, C, E = 1024, 3584, 42, 2, 2, 2, 4


class Case(NamedTuple):
    """A plugin with shapes, types and attributes."""

    plugin: Plugin
    dtype: str
    inputs: tuple[Operand, ...]
    attributes: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What one kernel costs."""

    plugin: str
    dtype: str
    tactic: str
    arch: str
    threads: int
    registers: int
    spills: int
    stack_bytes: int
    shared_bytes: int
    instructions: int
    arguments: tuple[str, ...]
    wanted_arguments: tuple[str, ...]


def cases(*, d: int = D, n: int = N, k: int = K) -> Iterator[Case]:
    """Every plugin in every type; the model's other sizes are the paper's."""
    plugins = {each.name: each for each in PLUGINS}
    slots = Operand((TOKENS, H * k), "i64")
    for dtype in ("fp32", "fp16", "bf16"):
        values, scores = Operand((n * n // E, d), dtype), Operand((TOKENS, H * k, C), dtype)
        yield Case(plugins["LookupReduce"], dtype, (values, slots, scores), {"num_blocks": E})
        rows, scales = Operand((n * n // E, d), "i8"), Operand((n * n // E,), "fp32")
        quantised = (rows, scales, slots, scores)
        yield Case(plugins["LookupReduceQuantized"], dtype, quantised, {"num_blocks": E, "bits": 8})
        side = Operand((TOKENS, H, n), dtype)
        yield Case(plugins["ProductTopKWithScratch"], dtype, (side, side), {"k": k})
        sides, pair = Operand((TOKENS, H, R, n), dtype), Operand((H, R), "fp32")
        tucker = (sides, sides, Operand((H, C, R, R), "fp32"), pair, pair)
        for rule in ("one_tailed", "two_tailed"):
            yield Case(plugins["TuckerTopKWithScratch"], dtype, tucker, {"k": k, "candidates": rule})
    yield Case(plugins["PermuteAddresses"], "i64", (slots,), {"size": n * n, "seed": 3})


def measure(case: Case, tactic: int, capability: int) -> Figures:
    outputs = case.plugin.describe(case.inputs, case.attributes)
    launch = case.plugin.launch(case.inputs, outputs, case.attributes, tactic, None)
    compiled = compile_ahead(launch.kernel, launch.types, launch.constants, capability)
    with tempfile.TemporaryDirectory() as folder:
        text, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        text.write_text(compiled.ptx)
        arch = next(word for word in compiled.ptx.split() if word.startswith("sm_"))
        _tool("ptxas", f"--gpu-name={arch}", str(text), "-o", str(binary))
        resources = read_resources(_tool("cuobjdump", "--dump-resource-usage", str(binary)))
        code = read_code(_tool("cuobjdump", "-sass", str(binary)))
    wanted = ["u64"] * len(case.inputs) + ["u32"] * len(launch.numbers) + ["u64"] * len(outputs)
    return Figures(
        plugin=case.plugin.name,
        dtype=case.dtype + (f" {case.attributes['candidates']}" if "candidates" in case.attributes else ""),
        tactic=TACTICS[tactic],
        arch=arch,
        threads=compiled.threads,
        registers=resources["REG"],
        spills=code.spills,
        stack_bytes=resources["STACK"],
        shared_bytes=compiled.shared_bytes,
        instructions=code.instructions,
        arguments=tuple(argument_types(compiled.ptx, compiled.name)),
        wanted_arguments=tuple(wanted),
    )


def _tool(name: str, *arguments: str) -> str:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    name = "ptxas-blackwell" if name == "ptxas" and any("sm_1" in each for each in arguments) else name
    return subprocess.run([str(folder / name), *arguments], text=True, capture_output=True, check=True).stdout


def problems(figures: Figures) -> list[str]:
    found = []
    if figures.spills or figures.stack_bytes:
        found.append(f"spills {figures.spills}, stack {figures.stack_bytes} bytes, both must be 0")
    if figures.shared_bytes > MAX_SHARED_BYTES:
        found.append(f"shared memory {figures.shared_bytes} bytes, at most {MAX_SHARED_BYTES}")
    if figures.arguments != figures.wanted_arguments:
        found.append(f"arguments {figures.arguments}, must be {figures.wanted_arguments}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", action="append", type=int, choices=CAPABILITIES, help="default: all")
    parser.add_argument("--plugin", default="", help="only plugins whose name holds this text")
    parser.add_argument("--dtype", help="only this type")
    parser.add_argument("--json", action="store_true", help="the figures as one JSON list")
    options = parser.parse_args(arguments)
    if "TRITON_INTERPRET" in os.environ:
        parser.error("tensorrt_kernels compiles kernels: run it without TRITON_INTERPRET")
    todo = [
        (case, tactic, capability)
        for case in cases()
        if options.plugin in case.plugin.name and options.dtype in (None, case.dtype)
        for tactic in case.plugin.tactics(case.inputs, case.attributes)
        for capability in options.capability or CAPABILITIES
    ]
    made = []
    if not options.json:
        print(f"{'plugin':24} {'type':16} {'tactic':8} {'arch':8} threads regs shared instr")
    for each in todo:
        made.append(f := measure(*each))
        if not options.json:
            print(
                f"{f.plugin:24} {f.dtype:16} {f.tactic:8} {f.arch:8} {f.threads:7} {f.registers:4} {f.shared_bytes:6} "
                f"{f.instructions:5}",
                flush=True,
            )
    if options.json:
        print(json.dumps([asdict(each) for each in made]))
    failing = [f"{f.plugin} {f.dtype} {f.tactic} {f.arch}: {problem}" for f in made for problem in problems(f)]
    if failing:
        print("over budget", *failing, sep="\n  ", file=sys.stderr)
    return bool(failing)


if __name__ == "__main__":
    sys.exit(main())
