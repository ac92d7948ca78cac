"""Loading the C++ kernels, at the first call that may run them."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from ultramem.ops.native import build, fakes


class Library(NamedTuple):
    """The loaded library, or why there is none."""

    file: Path | None
    problem: str
    """Empty if loaded; else what is wrong and what mends it."""


# What torch.backends.cpu.get_cpu_capability() answers on x86-64, and the variant for it.
NO_VARIANT = "this processor has neither AVX2 nor AVX-512, which the C++ kernels are built for"
_X86_VARIANT_OF = {"AVX512": "avx512", "AVX2": "avx2"}


def variant() -> str | None:
    """Of the libraries that `build` makes, the one for this processor; None if it can run none of them."""
    if "default" in build.variants():
        return "default"
    return _X86_VARIANT_OF.get(torch.backends.cpu.get_cpu_capability())


@cache
def library() -> Library:
    """Load the library that fits this processor, once a process.

    Warns if one is there that was built from other sources or cannot be loaded; where none was ever built, plain
    PyTorch runs and that is no surprise.
    """
    kind = variant()
    if kind is None:
        return Library(None, NO_VARIANT)
    file = build.library_file(build.TORCH_OPS, kind)
    if file.is_file():
        try:
            torch.ops.load_library(file)
            fakes.register()
        except (OSError, RuntimeError) as error:
            problem = f"the C++ kernels {file} cannot be loaded ({error}): build them again with {build.COMMAND}"
            warnings.warn(f"{problem}; plain PyTorch runs instead", stacklevel=2)
            return Library(None, problem)
        return Library(file, "")
    if build.other_libraries(build.TORCH_OPS):
        problem = f"the C++ kernels in {build.FOLDER} were built from other sources: build them with {build.COMMAND}"
        warnings.warn(f"{problem}; plain PyTorch runs instead", stacklevel=2)
        return Library(None, problem)
    return Library(None, f"the C++ kernels are not built: build them with {build.COMMAND}")
