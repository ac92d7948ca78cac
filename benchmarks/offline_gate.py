"""Compile every Triton kernel for sm_80 and sm_90 at the paper's sizes, without a GPU, and read what the cubin says.

Prints registers, spills, memory and load widths; the last line is one JSON object. Ends 1 if a kernel spills or a
kernel reads value rows by less than 16 bytes a lane.

    python benchmarks/offline_gate.py [--size 1.6b] [--capability 90] [--jobs 2]
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

if "TRITON_INTERPRET" in os.environ:
    sys.exit("offline_gate compiles kernels: run it without TRITON_INTERPRET")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ultramem.ops.triton import lookup_reduce, permute_addresses, select

THREADS_PER_WARP = 32
WIDEST_LOAD_BYTES = 16
POINTER_ALIGNMENT = 16
RANKS, CORES, BLOCKS, HEADS = 2, 2, 4, 2
CAPABILITIES = (80, 90)
ITEMSIZE = {"bf16": 2, "fp32": 4}


class Size(NamedTuple):
    """One UltraMem row of the paper's Table 6: value dim, side of the virtual grid, slots a head."""

    value_dim: int
    side: int
    top_m: int


SIZES = {"151m": Size(512, 2200, 16), "680m": Size(768, 3264, 35), "1.6b": Size(1024, 3584, 42)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One compilation: a kernel, the types of its run-time arguments, its constants."""

    kernel: str
    size: str
    dtype: str
    capability: int
    types: dict[str, str]
    launch: dict[str, Any]
    wide_loads: int = 0  # 16-byte loads of rows that the code must hold; narrower rows would hold none


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What the cubin of one case says."""

    kernel: str
    size: str
    dtype: str
    arch: str
    warps: int
    registers: int
    spills: int  # local loads and stores
    local_bytes: int
    stack_bytes: int
    shared_bytes: int
    loads: dict[str, int]  # bytes a lane -> instructions
    wide_load_share: float  # of the bytes of one execution of every load
    wide_loads_expected: int
    instructions: int

    @property
    def passes(self) -> bool:
        return (
            self.spills == self.local_bytes == self.stack_bytes == 0
            and self.loads.get(str(WIDEST_LOAD_BYTES), 0) >= self.wide_loads_expected
        )


def kernels_of(size_name: str, dtype: str) -> list[tuple[str, dict[str, str], dict[str, Any], int]]:
    """(kernel, argument types, launch, row loads of 16 bytes) for one size and table dtype."""
    d, n, m = SIZES[size_name]
    x = f"*{dtype}"
    shape = {"N": "i32", "K": "i32"}

    def row_loads(launch: dict[str, Any], tiles: int) -> int:
        lanes = launch["num_warps"] * THREADS_PER_WARP
        return tiles * launch["SLOTS"] * launch["COLUMNS"] * ITEMSIZE[dtype] // (lanes * WIDEST_LOAD_BYTES)

    forward = lookup_reduce.forward_launch(d, CORES, BLOCKS)
    rows = lookup_reduce.row_gradient_launch(d, CORES, BLOCKS)
    scores = lookup_reduce.score_gradient_launch(d, CORES, BLOCKS)
    value_row = rows["COLUMNS"] * ITEMSIZE[dtype] // (rows["num_warps"] * THREADS_PER_WARP * WIDEST_LOAD_BYTES)
    lookup = {"values": x, "indices": "*i64", "scores": x}
    found = [
        ("lookup_reduce_kernel", {**lookup, "out": x, **shape}, forward, row_loads(forward, tiles=1)),
        (
            "row_gradient_kernel",
            {"grad": x, **lookup, "sorted_rows": "*i32", "order": "*i64", "targets": "*i32"}
            | {"grad_rows": x, "grad_scores": x, **shape, "slots": "i32"},
            rows,
            row_loads(rows, tiles=1) + value_row,
        ),
        (
            "score_gradient_kernel",
            {"grad": x, "values": x, "indices": "*i64", "grad_scores": x, **shape},
            scores,
            row_loads(scores, tiles=2),
        ),
    ]
    sides = {"row": x, "col": x}
    for rule in ("one_tailed", "two_tailed", "product"):
        additive = rule == "product"
        r, c, candidates = (1, 1, "one_tailed") if additive else (RANKS, CORES, rule)
        side = select.side_launch(n, r, m, candidates=candidates, weighted=not additive)
        grid = select.grid_launch(n, r, c, m, candidates=candidates, additive=additive)
        found += [
            (f"side_topk_kernel {rule}", {**sides, "u": x, "t": x, "positions": "*i32", "H": "i32"}, side, 0),
            (
                f"grid_topk_kernel {rule}",
                {**sides, "cores": x, "positions": "*i32", "found": "*i64", "scores": x}
                | {"addresses": "*i64", "H": "i32"},
                grid,
                0,
            ),
        ]
    grads = {"grad": x, "addresses": "*i64", "grad_row": x, "grad_col": x}
    found += [
        ("product_topk_backward_kernel", grads, select.product_backward_launch(n, m), 0),
        (
            "tucker_topk_backward_kernel",
            {**grads, **sides, "cores": x, "core_parts": "*fp32", "H": "i32"},
            select.tucker_backward_launch(n, RANKS, CORES, m),
            0,
        ),
    ]
    if dtype == "bf16":  # addresses have one dtype
        found += [
            (
                f"permute_addresses_kernel {'inverse' if inverse else 'forward'}",
                {"addresses": "*i64", "out": "*i64", "count": "i32"},
                permute_addresses.permute_launch(n * n, 0, inverse=inverse),
                0,
            )
            for inverse in (False, True)
        ]
    return found


def cases(sizes: list[str], capabilities: list[int]) -> list[Case]:
    return [
        Case(
            kernel=kernel,
            size=size,
            dtype=dtype,
            capability=capability,
            types=types,
            launch=launch,
            wide_loads=wide,
        )
        for capability in capabilities
        for size in sizes
        for dtype in ITEMSIZE
        for kernel, types, launch, wide in kernels_of(size, dtype)
    ]


def measure(case: Case) -> Figures:
    name = case.kernel.split()[0]
    function = next(getattr(m, name) for m in (lookup_reduce, select, permute_addresses) if hasattr(m, name))
    position = {argument: (index,) for index, argument in enumerate(function.arg_names)}
    constants = {key: value for key, value in case.launch.items() if key != "num_warps"}
    source = ASTSource(
        function,
        signature={a: "constexpr" if a in constants else case.types[a] for a in function.arg_names},
        constexprs={position[key]: value for key, value in constants.items()},
        attrs={
            position[a]: [["tt.divisibility", POINTER_ALIGNMENT]] for a, kind in case.types.items() if kind[0] == "*"
        },
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", case.capability, THREADS_PER_WARP),
        options={"num_warps": case.launch["num_warps"], "enable_fp_fusion": True},
    )
    return read_cubin(case, compiled)


def read_cubin(case: Case, compiled: Any) -> Figures:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (_cuobjdump(flag, file.name) for flag in ("--dump-resource-usage", "-sass"))
    resources = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", sass, re.MULTILINE)
    loads = collections.Counter(_load_bytes(op) for op in operations if op.startswith("LDG"))
    total = sum(width * count for width, count in loads.items())
    return Figures(
        kernel=case.kernel,
        size=case.size,
        dtype=case.dtype,
        arch=str(re.search(r"\.target (\S+)", compiled.asm["ptx"])[1]),  # type: ignore[index]
        warps=case.launch["num_warps"],
        registers=int(resources["REG"]),
        spills=sum(op.startswith(("STL", "LDL")) for op in operations),
        local_bytes=int(resources["LOCAL"]),
        stack_bytes=int(resources["STACK"]),
        shared_bytes=compiled.metadata.shared,
        loads={str(width): count for width, count in sorted(loads.items())},
        wide_load_share=round(WIDEST_LOAD_BYTES * loads[WIDEST_LOAD_BYTES] / total, 3) if total else 0.0,
        wide_loads_expected=case.wide_loads,
        instructions=len(operations),
    )


def _cuobjdump(flag: str, path: str) -> str:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    return subprocess.run([tool, flag, path], text=True, capture_output=True, check=True).stdout


def _load_bytes(operation: str) -> int:
    """Bytes a lane of an LDG: its width is a suffix, 4 bytes without one."""
    suffixes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((suffixes[part] for part in operation.split(".") if part in suffixes), 4)


def table(figures: list[Figures]) -> str:
    header = f"{'kernel':34} {'size':5} {'dtype':5} {'arch':7} {'warps':>5} {'regs':>4} {'spills':>6} {'local':>5} "
    lines = [header + f"{'shared':>6} {'16B':>4} {'want':>4} {'share':>5} {'instr':>6}"]
    for f in figures:
        lines.append(
            f"{f.kernel:34} {f.size:5} {f.dtype:5} {f.arch:7} {f.warps:5} {f.registers:4} {f.spills:6} "
            f"{f.local_bytes:5} {f.shared_bytes:6} {f.loads.get('16', 0):4} {f.wide_loads_expected:4} "
            f"{f.wide_load_share:5.2f} {f.instructions:6}{'' if f.passes else '  FAILS'}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=SIZES, help="one size of Table 6 (default: all)")
    parser.add_argument("--capability", action="append", type=int, choices=CAPABILITIES, help="default: 80 and 90")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time")
    options = parser.parse_args(arguments)
    todo = cases(options.size or list(SIZES), options.capability or list(CAPABILITIES))
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        figures = list(pool.map(measure, todo))
    failing = [f"{f.kernel} {f.size} {f.dtype} {f.arch}" for f in figures if not f.passes]
    print(table(figures))
    record = {"triton": triton.__version__, "failing": failing, "kernels": [asdict(f) for f in figures]}
    print(json.dumps(record))
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
