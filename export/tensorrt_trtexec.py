"""The `trtexec` lines that do by hand what an export to TensorRT does.

`trtexec` is a C++ program and knows no plugin that is written in Python: it builds our nodes from their bodies of
standard operators. An engine that was built with the plugins holds their kernels, and `trtexec` loads and times it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ultramem.export.tensorrt_profiles import Profile

MEGABYTE = 2**20


def build_line(profiles: Sequence[Profile], *, onnx: str, plan: str, timing_cache: str, workspace_bytes: int) -> str:
    """Builds an engine of the same file, types, profiles and memory."""
    words = [
        "trtexec",
        f"--onnx={onnx}",
        f"--saveEngine={plan}",
        f"--timingCacheFile={timing_cache}",
        "--stronglyTyped",
        "--noTF32",
        f"--memPoolSize=workspace:{workspace_bytes // MEGABYTE}",
        "--profilingVerbosity=detailed",
        "--skipInference",
    ]
    for index, profile in enumerate(profiles):
        words.append(f"--profile={index}")
        words += [f"--{name}Shapes={_shapes(profile, which)}" for which, name in enumerate(("min", "opt", "max"))]
    return shlex.join(words)


def time_line(profiles: Sequence[Profile], index: int, *, plan: str) -> str:
    """Times an engine at the likeliest shapes of a profile."""
    words = ["trtexec", f"--loadEngine={plan}", f"--useProfile={index}", f"--shapes={_shapes(profiles[index], 1)}"]
    return shlex.join([*words, "--useCudaGraph", "--noDataTransfers"])


def _shapes(profile: Profile, which: int) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shapes[which]))}" for name, shapes in profile.shapes.items())
