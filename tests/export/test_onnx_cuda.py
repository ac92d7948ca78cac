"""The plugin library's CUDA kernel: compiled where a compiler for it is, computed on a CPU, never run on a GPU."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest
import torch
from one_node import assert_rounded, lookup_case, model_of, run_session, tucker_case, widened

from ultramem import ops
from ultramem.export import register
from ultramem.ops import reference
from ultramem.ops.native import build

HEADER = build.FOLDER / "onnx/cuda/lookup_kernel.cuh"
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]
INSTANCES = "".join(
    f"template __global__ void lookup_reduce<{types}>(\n"
    f"    const {types.split(', ')[0]}*, const float*, const Int64*, const {types.split(', ')[1]}*,\n"
    f"    {types.split(', ')[2]}*, Sizes);\n"
    for kinds in (
        "float, float, float",
        "Half, Half, Half",
        "Bfloat, Bfloat, Bfloat",
        "signed char, float, float",
        "Int4Pair, Half, Half",
    )
    for types in (f"{kinds}, true", f"{kinds}, false")
)

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """The kernel as a function on CPU tensors, compiled with threads in place of a GPU's."""
    library = tmp_path_factory.mktemp("cuda") / "on_cpu.so"
    source = Path(__file__).with_name("cuda_on_cpu.cc")
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", f"-I{build.FOLDER}", source, "-o", library]
    subprocess.run([*command, "-Wall", "-Werror", "-Wno-psabi", "-Wno-unknown-pragmas"], check=True)
    function = ctypes.CDLL(library).lookup

    def lookup(kind, rows, scales, indices, scores, blocks):
        t, k, c = scores.shape
        d = rows.shape[1] * (2 if kind == "4" else 1)
        dtype = rows.dtype if rows.is_floating_point() else scores.dtype
        out = torch.full((t, blocks, d), 7.0, dtype=dtype)
        pointers = [ctypes.c_void_p(x.data_ptr() if x is not None else None) for x in (rows, scales, indices, scores)]
        sizes = [ctypes.c_longlong(x) for x in (t, rows.shape[0], k)] + [ctypes.c_int(x) for x in (d, c, blocks)]
        function(kind.encode(), *pointers, ctypes.c_void_p(out.data_ptr()), *sizes)
        return out

    return lookup


KINDS = {
    "f": (torch.float32, torch.float32, 0),
    "h": (torch.float16, torch.float16, 0),
    "b": (torch.bfloat16, torch.float32, 0),
    "8": (torch.float32, torch.float32, 8),
    "4": (torch.float32, torch.float16, 4),
}


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("blocks", "cores", "d", "k"),
    [
        (1, 1, 64, 5),  # groups of threads share the slots
        (4, 2, 256, 140),  # more slots than are listed at a time
        (2, 3, 42, 9),  # cores that end elsewhere than at 16 bytes
        (2, 1, 4608, 3),  # rows of several parts
    ],
)
def test_what_the_kernel_computes(on_cpu, blocks, cores, d, k, kind):
    dtype, score_dtype, bits = KINDS[kind]
    case = lookup_case(dtype, score_dtype, 2, blocks, cores, d=d, k=k)
    indices, scores = case["indices"], case["scores"]
    if bits:
        rows, scales = ops.quantize_rows(case["values"], bits)
        expected = reference.lookup_reduce_quantized(rows, scales, indices, widened(scores), num_blocks=blocks)
        dtype = score_dtype
    else:
        rows, scales = case["values"], None
        expected = reference.lookup_reduce(widened(rows), indices, widened(scores), num_blocks=blocks)
    assert_rounded(on_cpu(kind, rows, scales, indices, scores, blocks), expected, dtype)


@needs_compiler
@pytest.mark.parametrize("index", [-1, 50, 2**62])
def test_an_index_outside_of_the_table_makes_its_token_nan_and_no_other(on_cpu, index):
    case = lookup_case(torch.float32, torch.float32, 2, 2, 1, d=64)
    case["indices"][1, 3] = index
    out = on_cpu("f", case["values"], None, case["indices"], case["scores"], 2)
    assert out[1].isnan().all()
    expected = reference.lookup_reduce(case["values"], case["indices"][:1], case["scores"][:1], num_blocks=2)
    assert_rounded(out[:1], expected, torch.float32)


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvcc_compiles_it_for_every_architecture(architecture, tmp_path):
    source = tmp_path / "kernels.cu"
    source.write_text(f'#include "{HEADER}"\nnamespace ultramem::cuda {{\n{INSTANCES}}}\n')
    command = ["nvcc", "-std=c++17", "-cubin", f"-arch={architecture}", "-Xptxas=-v", source]
    target = tmp_path / "kernels.cubin"
    said = subprocess.run([*command, "-o", target], check=True, capture_output=True, text=True).stderr
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill stores", said)]
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", said)]
    assert len(spilled) == len(registers) == 10
    assert max(spilled) <= 4  # a register, where ptxas would rather have more thread blocks at a time
    assert max(registers) <= 128  # four thread blocks at least on a multiprocessor of 65536 registers


def nvrtc():
    """NVIDIA's run-time compiler from its wheel, or None."""
    found = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in found.submodule_search_locations] if found else []
    files = [file for folder in folders for file in folder.glob("*/lib/libnvrtc.so.*") if "builtins" not in file.name]
    return ctypes.CDLL(str(files[0])) if files else None


@pytest.mark.skipif(nvrtc() is None, reason="the wheel nvidia-cuda-nvrtc is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles_it_as_it_is(architecture):
    library, program = nvrtc(), ctypes.c_void_p()
    source = f"{HEADER.read_text()}\nnamespace ultramem::cuda {{\n{INSTANCES}}}\n".encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source, b"lookup.cu", 0, None, None) == 0
    options = (ctypes.c_char_p * 2)(f"--gpu-architecture={architecture}".encode(), b"--std=c++17")
    result, size = library.nvrtcCompileProgram(program, 2, options), ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert result == 0, log.value.decode()
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    assert size.value > 10_000


@needs_nvcc
def test_the_library_with_the_kernels_for_gpus_is_loaded_by_the_same_call():
    file = build.library_file(build.CUDA_PLUGIN, build.CUDA_VARIANT)
    assert file.is_file(), f"build it with {build.COMMAND}"
    register(onnxruntime.SessionOptions(), device="cuda")
    assert file.name in Path("/proc/self/maps").read_text()


@needs_nvcc
def test_beside_the_kernels_for_gpus_other_nodes_run_their_bodies():
    """Those of the lookups are for the CUDA provider alone; a selection has none, and its standard operators run."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    register(options, device="cuda")
    inputs = tucker_case(torch.float32, 3, 2, 16, 2, 2, torch.randn)
    outputs = {"scores": (torch.float32, 4), "addresses": (torch.int64, 3)}
    _, addresses = run_session(model_of("TuckerTopK", inputs, outputs, k=4), inputs, options)
    assert addresses.equal(reference.tucker_topk(*inputs.values(), 4).addresses)


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="device must be one of cpu, cuda, got 'tpu'"):
        register(onnxruntime.SessionOptions(), device="tpu")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("ultramem.device", "tpu")
    with pytest.raises(RuntimeError, match=r"ultramem\.device must be one of cpu, cuda, got 'tpu'"):
        register(options)


def test_kernels_for_gpus_that_are_not_built_are_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr(build, "CUDA_VARIANT", "sm_none")
    with pytest.raises(RuntimeError, match="the kernels for GPUs are not built: where nvcc is, build them with"):
        register(onnxruntime.SessionOptions(), device="cuda")
