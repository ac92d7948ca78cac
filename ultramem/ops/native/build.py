"""Build the C++ kernels beside their sources: `python -m ultramem.ops.native.build`.

Two products of the same headers: ops of PyTorch, and the plugin library of ONNX Runtime. Of each one library for each
instruction set, named after it and after a hash of the sources, so that one built from other sources is never taken for
these. Where there is nvcc, the plugin library's kernels for GPUs are a third. Nothing but the standard library is
imported: the installer runs this file where neither PyTorch nor this package can be imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
COMMAND = "python -m ultramem.ops.native.build"

# A name that the loader understands (library.py), and the flags that make a library of it.
_X86_VARIANTS: dict[str, tuple[str, ...]] = {"avx512": ("-march=x86-64-v4",), "avx2": ("-march=x86-64-v3",)}
_OTHER_VARIANTS: dict[str, tuple[str, ...]] = {"default": ()}

_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-ffp-contract=fast",  # a * b + c in one rounding, in vectors and in what is left beside them alike
    "-fno-math-errno",
    "-fno-trapping-math",
    "-DNDEBUG",
    "-Wall",
    "-Wno-maybe-uninitialized",  # GCC 12 says so of its own AVX-512 header
    "-Wno-psabi",
)

_TORCH_FLAGS = ("-DTORCH_TARGET_VERSION=0x020b000000000000",)  # 2.11, the oldest that pyproject.toml takes

_MOST_COMPILERS = 4  # beside each other: one takes up to 1 GB
_LINES_OF_COMPILER = 12  # of what it said: templates fill pages after the first error


class Product(NamedTuple):
    """What one library is made from."""

    prefix: str
    """What its file name begins with."""
    source: Path
    """The file that is compiled."""
    folders: tuple[Path, ...]
    """Of all else that it is made from."""


TORCH_OPS = Product("ultramem_native", FOLDER / "library.cc", (FOLDER,))
# The plugin library knows the name of the one for GPUs, and that one includes some of its headers.
_PLUGIN_FOLDERS = (FOLDER, FOLDER / "onnx", FOLDER / "onnx/cuda", FOLDER / "third_party/onnxruntime")
ONNX_PLUGIN = Product("ultramem_onnx", FOLDER / "onnx/library.cc", _PLUGIN_FOLDERS)
# Machine code for the oldest GPU that has bfloat16, and PTX that a driver compiles for any newer one.
CUDA_PLUGIN = Product("ultramem_onnx_cuda", FOLDER / "onnx/cuda/library.cu", _PLUGIN_FOLDERS)
CUDA_VARIANT = "sm_80"
_NVCC_FLAGS = ("-std=c++17", "-O3", "--shared", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-arch={CUDA_VARIANT}")
PRODUCTS = (TORCH_OPS, ONNX_PLUGIN, CUDA_PLUGIN)


class BuildError(RuntimeError):
    """What is missing for a build, or what the compiler said."""


def variants() -> dict[str, tuple[str, ...]]:
    """The libraries that this machine's kind of processor may load, and their flags."""
    return _X86_VARIANTS if platform.machine().lower() in ("x86_64", "amd64") else _OTHER_VARIANTS


@cache
def sources_hash(product: Product) -> str:
    """Of all that a library is made from, flags included."""
    digest = hashlib.blake2b(digest_size=8)
    others = (file for folder in product.folders for kind in ("h", "cuh", "cu") for file in folder.glob(f"*.{kind}"))
    for file in (*sorted(others), product.source, Path(__file__)):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def library_file(product: Product, variant: str, folder: Path = FOLDER) -> Path:
    return folder / f"{product.prefix}-{variant}-{sources_hash(product)}.so"


def other_libraries(product: Product, folder: Path = FOLDER) -> list[Path]:
    """Libraries that were built from other sources than those that are here now."""
    return [file for file in folder.glob(f"{product.prefix}-*.so") if sources_hash(product) not in file.name]


def build(folder: Path = FOLDER) -> list[Path]:
    """Compile every variant that is neither in `folder` nor beside the sources yet, remove libraries of other sources,
    return the files.

    Raises:
        BuildError: no compiler, no PyTorch headers, a system that is not supported, or the compiler failed.
    """
    compiler, torch = _compiler(), _torch_folder()
    folder.mkdir(parents=True, exist_ok=True)
    stale = [file for product in PRODUCTS for file in other_libraries(product, folder)]
    before, after = _torch_arguments(torch)
    cuda = library_file(CUDA_PLUGIN, CUDA_VARIANT, folder)
    commands: dict[Path, tuple[list[str], tuple[str, ...]]] = {}
    for variant, flags in variants().items():
        start = [compiler, *_FLAGS, *flags]
        commands[library_file(TORCH_OPS, variant, folder)] = [*start, *before, str(TORCH_OPS.source)], after
        name = f'-DULTRAMEM_CUDA_LIBRARY="{cuda.name}"'
        commands[library_file(ONNX_PLUGIN, variant, folder)] = [*start, name, str(ONNX_PLUGIN.source)], ("-ldl",)
    if nvcc := shutil.which("nvcc"):
        commands[cuda] = [nvcc, *_NVCC_FLAGS, str(CUDA_PLUGIN.source)], ()
    with ThreadPoolExecutor(min(_MOST_COMPILERS, os.cpu_count() or 1)) as pool:
        missing = [target for target in commands if not (target.is_file() or _copied(target))]
        for done in [pool.submit(_compile, commands[target][0], target, commands[target][1]) for target in missing]:
            done.result()
    for file in stale:
        file.unlink()
    return list(commands)


def _torch_arguments(torch: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Before and after the source. The libraries are found by name at load time: PyTorch is in the process already."""
    before = (*_TORCH_FLAGS, "-isystem", str(torch / "include"))
    return before, (f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10")


def _copied(target: Path) -> bool:
    """Whether the library could be taken from beside the sources: one of that name is made from them."""
    built = FOLDER / target.name
    if not built.is_file():
        return False
    written = target.with_suffix(f".{os.getpid()}.tmp")
    shutil.copyfile(built, written)
    written.replace(target)
    return True


def _compile(start: list[str], target: Path, end: tuple[str, ...]) -> None:
    written = target.with_suffix(f".{os.getpid()}.tmp")  # renamed when whole: another process may be loading
    command = [*start, "-o", str(written), *end]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            said = "\n".join(result.stderr.strip().splitlines()[:_LINES_OF_COMPILER])
            raise BuildError(f"{' '.join(command)} failed:\n{said}")
        written.replace(target)
    finally:
        written.unlink(missing_ok=True)


def _compiler() -> str:
    if sys.platform != "linux":
        raise BuildError(f"the C++ kernels are built on Linux, not on {sys.platform}")
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):  # CXX: what every build tool reads
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("no C++ compiler was found (CXX, g++, clang++ or c++)")


def _torch_folder() -> Path:
    """PyTorch as it is installed for this interpreter, even where an isolated build hides it from `import`."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    folders += [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    for folder in folders:
        if (folder / "include/torch/csrc/stable/library.h").is_file():
            return folder
    raise BuildError(f"no PyTorch headers in {' or '.join(map(str, dict.fromkeys(folders)))}: install torch first")


if __name__ == "__main__":
    try:
        for file in build():
            print(file)
    except BuildError as error:
        sys.exit(f"error: {error}")
