"""Compile every Triton kernel at the paper's sizes, without a GPU, and read what the cubin says.

    python -m benchmarks.offline_gate [--check | --update] [--quick] [--size 1.6b] [--dtype bf16] [--capability 90]

Prints registers, spills, memory, access widths and occupancy. Ends 1 if a kernel spills, uses atomics or leaves the
budget of benchmarks/gate_cases.py, and with --check if a row is worse than the committed one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import static_table
from benchmarks.cubin import WIDEST_ACCESS_BYTES, read_code, read_resources, wide_share
from benchmarks.gate_cases import CAPABILITIES, ITEMSIZE, SIZES, Budget, Case, cases
from benchmarks.occupancy import LIMITS, THREADS_PER_WARP, resident_warps

POINTER_ALIGNMENT = 16
SAMPLED = ("1.6b", "bf16", 90)  # compiled anew even by --quick
LAUNCH_OPTIONS = ("num_warps", "num_stages")  # of a launch's entries; the others are the kernel's constants


SECTION = static_table.Section(
    name="kernels",
    key=("kernel", "size", "dtype", "arch"),
    at_most={
        "spills": 1.0, "local_bytes": 1.0, "stack_bytes": 1.0, "atomics": 1.0, "barriers": 1.0,
        "barriers_in_loop": 1.0, "instructions": 1.05,
    },
    at_least=("wide_load_share", "wide_store_share", "occupancy"),
    libraries=("triton",),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What the cubin of one case says: a row of the static table."""

    kernel: str
    size: str
    dtype: str
    arch: str
    warps: int
    registers: int
    spills: int
    local_bytes: int
    stack_bytes: int
    shared_bytes: int
    atomics: int
    wide_loads: int  # global loads of 16 bytes a lane
    wide_stores: int
    wide_load_share: float  # of the bytes of one execution of every load
    wide_store_share: float
    barriers: int
    barriers_in_loop: int
    instructions: int
    resident_warps: int  # of an SM
    occupancy: float
    made_of: str  # digest of kernel, arguments, options and compiler


def arch_name(capability: int) -> str:
    """As ptxas is told it: from 9.0 on, code for that very architecture."""
    return f"sm_{capability}{'a' if capability >= 90 else ''}"


def case_key(case: Case) -> static_table.Row:
    """The fields that name the case's row."""
    return {
        "kernel": case.variant.name,
        "size": case.size,
        "dtype": case.dtype,
        "arch": arch_name(case.capability),
    }


def measure(index: int) -> Figures:
    """Compile case number `index`: kernels cannot be pickled, so each worker lists the cases for itself."""
    case = cases()[index]
    return read_cubin(case, compile_case(case))


def source_of(case: Case) -> ASTSource:
    function, types, launch = case.variant.kernel, case.variant.types, case.variant.launch
    position = {argument: (index,) for index, argument in enumerate(function.arg_names)}
    constants = {key: value for key, value in launch.items() if key not in LAUNCH_OPTIONS}
    aligned = [name for name, kind in types.items() if kind.startswith("*") or kind.endswith(":16")]
    return ASTSource(
        function,
        signature={a: "constexpr" if a in constants else types[a].removesuffix(":16") for a in function.arg_names},
        constexprs={position[key]: value for key, value in constants.items()},
        attrs={position[a]: [["tt.divisibility", POINTER_ALIGNMENT]] for a in aligned},
    )


def options_of(case: Case) -> dict[str, Any]:
    launch = case.variant.launch
    return {key: launch[key] for key in LAUNCH_OPTIONS if key in launch} | {"enable_fp_fusion": True}


def compile_case(case: Case) -> Any:
    return triton.compile(
        source_of(case), target=GPUTarget("cuda", case.capability, THREADS_PER_WARP), options=options_of(case)
    )


def digest(case: Case) -> str:
    """Of all that decides what the compiler makes of a case."""
    parts = (source_of(case).hash(), sorted(options_of(case).items()), case.capability, triton.__version__)
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def read_cubin(case: Case, compiled: Any) -> Figures:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources = read_resources(_cuobjdump("--dump-resource-usage", file.name))
        code = read_code(_cuobjdump("-sass", file.name))
    warps, shared_bytes = case.variant.launch["num_warps"], compiled.metadata.shared
    resident = resident_warps(case.capability, warps=warps, registers=resources["REG"], shared_bytes=shared_bytes)
    return Figures(
        **case_key(case),
        warps=warps,
        registers=resources["REG"],
        spills=code.spills,
        local_bytes=resources["LOCAL"],
        stack_bytes=resources["STACK"],
        shared_bytes=shared_bytes,
        atomics=code.atomics,
        wide_loads=code.loads.get(WIDEST_ACCESS_BYTES, 0),
        wide_stores=code.stores.get(WIDEST_ACCESS_BYTES, 0),
        wide_load_share=wide_share(code.loads),
        wide_store_share=wide_share(code.stores),
        barriers=code.barriers,
        barriers_in_loop=code.barriers_in_loop,
        instructions=code.instructions,
        resident_warps=resident,
        occupancy=round(resident / LIMITS[case.capability].warps, 2),
        made_of=digest(case),
    )


def _cuobjdump(flag: str, path: str) -> str:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    return subprocess.run([tool, flag, path], text=True, capture_output=True, check=True).stdout


def over_budget(figures: Figures, budget: Budget) -> list[str]:
    """What a kernel may not cost and does."""
    found = [
        f"{name} {getattr(figures, name)}, must be 0"
        for name in ("spills", "local_bytes", "stack_bytes", "atomics")
        if getattr(figures, name)
    ]
    if figures.registers > budget.registers:
        found.append(f"registers {figures.registers}, at most {budget.registers}")
    if budget.barriers_in_loop is not None and figures.barriers_in_loop > budget.barriers_in_loop:
        found.append(f"barriers_in_loop {figures.barriers_in_loop}, at most {budget.barriers_in_loop}")
    for name in ("wide_loads", "wide_stores"):
        if getattr(figures, name) < getattr(budget, name):
            found.append(f"{name} {getattr(figures, name)}, at least {getattr(budget, name)}")
    return found


def table(figures: list[Figures]) -> str:
    header = f"{'kernel':32} {'size':5} {'dtype':5} {'arch':7} {'warps':>5} {'regs':>4} {'shared':>6} "
    lines = [
        header + f"{'16B ld':>6} {'share':>5} {'16B st':>6} {'share':>5} {'bar':>3} {'loop':>4} {'instr':>5} occup"
    ]
    for f in figures:
        lines.append(
            f"{f.kernel:32} {f.size:5} {f.dtype:5} {f.arch:7} {f.warps:5} {f.registers:4} {f.shared_bytes:6} "
            f"{f.wide_loads:6} {f.wide_load_share:5.2f} {f.wide_stores:6} {f.wide_store_share:5.2f} {f.barriers:3} "
            f"{f.barriers_in_loop:4} {f.instructions:5} {f.occupancy:5.2f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    static_table.add_modes(parser)
    parser.add_argument("--size", action="append", choices=SIZES, help="one size of Table 6 (default: all)")
    parser.add_argument("--dtype", action="append", choices=ITEMSIZE, help="default: all")
    parser.add_argument("--capability", action="append", type=int, choices=CAPABILITIES, help="default: all")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="compile what changed since the committed table, and of the rest the 1.6B row in bf16 for sm_90a",
    )
    parser.add_argument("--kernel", default="", help="only kernels whose name holds this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    options = parser.parse_args(arguments)
    if "TRITON_INTERPRET" in os.environ:
        parser.error("offline_gate compiles kernels: run it without TRITON_INTERPRET")
    if options.update and (options.size or options.dtype or options.capability or options.kernel or options.quick):
        parser.error("--update writes the whole table: give it no part")

    def within(row: static_table.Row) -> bool:
        return (
            row["size"] in (options.size or SIZES)
            and row["dtype"] in (options.dtype or ITEMSIZE)
            and row["arch"] in [arch_name(capability) for capability in options.capability or CAPABILITIES]
            and options.kernel in row["kernel"]
        )

    todo = {index: case for index, case in enumerate(cases()) if within(case_key(case))}
    known = known_figures(todo) if options.quick else {}
    made = compile_all([index for index in todo if index not in known], options.jobs)
    compiled = dict(zip((index for index in todo if index not in known), made, strict=True))
    figures = [known.get(index) or compiled[index] for index in todo]
    print(f"{len(compiled)} compiled, {len(known)} as in the committed table")
    failing = [
        f"{static_table.row_name(SECTION, asdict(f))}: {reason}"
        for f, case in zip(figures, todo.values(), strict=True)
        for reason in over_budget(f, case.variant.budget)
    ]
    rows: list[static_table.Row] = [asdict(f) for f in figures]
    if failing:
        print("over budget", *failing, sep="\n  ")
    if options.check:
        return static_table.check(SECTION, rows, within=within) | bool(failing)
    print(table(figures))
    if options.update and not failing:
        static_table.write(SECTION, rows)
    return bool(failing)


def known_figures(todo: Mapping[int, Case]) -> dict[int, Figures]:
    """Figures of the cases that the committed table has, made of the very same; but for a sample of them."""
    names = {field.name for field in fields(Figures)}
    rows = static_table.read().get(SECTION.name, {"rows": []})["rows"]
    committed = {static_table.row_name(SECTION, row): row for row in rows if row.keys() == names}
    known = {}
    for index, case in todo.items():
        row = committed.get(static_table.row_name(SECTION, case_key(case)))
        sampled = (case.size, case.dtype, case.capability) == SAMPLED
        if row is not None and not sampled and row["made_of"] == digest(case):
            known[index] = Figures(**row)
    return known


def compile_all(indices: list[int], jobs: int) -> list[Figures]:
    """Figures of the cases of these numbers, compiled anew: nothing of an earlier run's cache is trusted."""
    with (
        tempfile.TemporaryDirectory() as cache,
        triton.knobs.cache.scope(),
        concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool,
    ):
        triton.knobs.cache.dir = cache
        return list(pool.map(measure, indices))


if __name__ == "__main__":
    sys.exit(main())
