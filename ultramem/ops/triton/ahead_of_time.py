"""A Triton kernel as PTX for another process to launch: without Triton, without Python, without a GPU here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

THREADS_PER_WARP = 32
ALIGNMENT = 16  # bytes: that pointers are multiples of, for 16-byte loads
PTX_VERSION = 87  # of CUDA 12.8, the first that knows every architecture here; a driver loads what is not newer
LAUNCH_OPTIONS = ("num_warps", "num_stages")
UNREAD = "*i8"  # type of an argument that the kernel has and, with these constants, does not read


class Compiled(NamedTuple):
    """A kernel of one architecture, and what a launch must give it."""

    name: str
    ptx: str
    cubin: bytes
    """Of the PTX as Triton made it, for figures; its arguments are not those of `ptx`."""
    threads: int
    shared_bytes: int


def compile_ahead(kernel: Any, types: Mapping[str, str], launch: Mapping[str, Any], capability: int) -> Compiled:
    """Compile for a compute capability such as 90.

    Args:
        kernel: of `triton.jit`.
        types: run-time arguments in the order in which a launch gives them, in Triton's spelling, pointers aligned to
            16 bytes: "*bf16", "*i64", "i32".
        launch: constants, and num_warps and num_stages. What is in neither, the kernel must not read.
        capability: ten times the compute capability.

    Raises:
        ValueError: the kernel reads what it is not given, or uses scratch memory, which a launcher other than Triton's
            would not give it.
    """
    names = kernel.arg_names
    position = {name: (index,) for index, name in enumerate(names)}
    given = [name for name in names if name not in launch]
    source = ASTSource(
        kernel,
        signature={name: types.get(name, UNREAD) if name in given else "constexpr" for name in names},
        constexprs={position[name]: launch[name] for name in names if name in launch},
        attrs={position[name]: [["tt.divisibility", ALIGNMENT]] for name, kind in types.items() if kind[0] == "*"},
    )
    options = {name: launch[name] for name in LAUNCH_OPTIONS if name in launch}
    options |= {"enable_fp_fusion": True, "ptx_version": PTX_VERSION}
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # paths of whoever compiles
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, THREADS_PER_WARP), options=options)
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise ValueError(f"{metadata.name} uses scratch memory of Triton's, which an engine does not give it")
    return Compiled(
        name=metadata.name,
        ptx=with_arguments(compiled.asm["ptx"], metadata.name, [given.index(name) for name in types]),
        cubin=compiled.asm["cubin"],
        threads=THREADS_PER_WARP * metadata.num_warps,
        shared_bytes=metadata.shared,
    )


def with_arguments(ptx: str, name: str, order: Sequence[int]) -> str:
    """`ptx` whose entry `name` takes those of its arguments that `order` names, in that order.

    Code reads an argument by its name, so the list may be in any order. Left out are what the kernel does not need and
    the two pointers that Triton appends: a launcher that knows nothing of them gives an array that ends before them,
    and the driver would read past its end.

    Raises:
        ValueError: there is no such entry or argument, or the code reads one that is left out.
    """
    entry = re.search(rf"\.entry {re.escape(name)}\(([^)]*)\)", ptx)
    if entry is None:
        raise ValueError(f"the code must have an entry {name}, got none")
    found = [line.strip() for line in entry[1].split(",")]
    if max(order, default=-1) >= len(found):
        raise ValueError(f"{name} must take {max(order) + 1} arguments, got {len(found)}")
    for index, line in enumerate(found):
        if index not in order and re.search(rf"\[{re.escape(line.split()[-1])}\b", ptx[entry.end() :]):
            raise ValueError(f"{name} must not read its argument {index}, which a launch does not give it")
    kept = ",\n\t".join(found[index] for index in order)
    return f"{ptx[: entry.start(1)]}\n\t{kept}\n{ptx[entry.end(1) :]}"


def argument_types(ptx: str, name: str) -> list[str]:
    """Types of an entry's arguments, in order: "u64" of a pointer, "u32" of a 32-bit number."""
    entry = re.search(rf"\.entry {re.escape(name)}\(([^)]*)\)", ptx)
    return [] if entry is None else re.findall(r"\.param \.(\w+)", entry[1])
