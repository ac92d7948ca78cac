"""AOTInductor: a `model.pt2` of native code that loads where neither this package nor its source is.

Small weights are in the package. Large ones stand beside it in `model.safetensors`: the loader unpacks a package to a
temporary folder, table and all, whereas that file is mapped, and its pages are shared by graphs and processes.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ultramem.config import ModelConfig
from ultramem.export.backend import Backend, Run
from ultramem.export.coarse_keys import with_coarse_keys
from ultramem.export.extras import quiet_exporters
from ultramem.export.options import ExportOptions
from ultramem.export.program import (
    PassRecord,
    Program,
    apply_pass,
    apply_to_program,
    capture,
    constant_bytes,
    records_of,
    simplify,
)
from ultramem.export.weights_file import write_weights
from ultramem.graph.mapped_weights import map_weights
from ultramem.graph.passes import lower_ops, split_experts
from ultramem.graph.shared_copy import shared_copy
from ultramem.graph.transformer import Transformer

FILE = "model.pt2"
WEIGHTS_FILE = "model.safetensors"
EXTERNAL_BYTES = 256_000_000  # more than that is not worth unpacking at every start
CODE_FOLDER = "data/aotinductor/"
_OTHER_ENTRIES = frozenset(
    {"archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id"}
)


def write_aoti(model: Transformer, options: ExportOptions, folder: Path) -> tuple[PassRecord, ...]:
    """Write a package of one graph, or with `decode` of two: "model", for any sizes, and "decode", for one token."""
    return records_of(export_aoti(_captured(model, options), folder))


def lowered_programs(model: Transformer, options: ExportOptions) -> dict[str, Program]:
    """The graphs that a package of `model` is compiled from, by name; their nodes are named the same every time."""
    return {name: _lower(program) for name, program in _captured(model, options).items()}


def _captured(model: Transformer, options: ExportOptions) -> dict[str, Program]:
    if options.device == "cuda":
        model = shared_copy(model, tensors=lambda tensor: tensor.to("cuda"))
    sizes = {"model": (options.batch, options.static[1] if options.static else None)}
    if options.decode and options.static is None:
        sizes["decode"] = (None, 1)
    return {
        name: capture(with_coarse_keys(model, options, seq=seq), batch=batch, seq=seq)
        for name, (batch, seq) in sizes.items()
    }


def export_aoti(
    programs: Mapping[str, Program], folder: Path, *, external_bytes: int = EXTERNAL_BYTES
) -> dict[str, Program]:
    """Write `model.pt2` to `folder`; and `model.safetensors`, if several graphs share the weights or if these take more
    than `external_bytes`.

    Returns:
        The programs as they were compiled, with their passes.
    """
    from torch._inductor.package.package import package_aoti

    lowered = {name: _lower(each) for name, each in programs.items()}
    external = len(lowered) > 1 or any(constant_bytes(each.exported) > external_bytes for each in lowered.values())
    build = folder / "build"
    code: dict[str, list[Any]] = {}
    weights: dict[str, Tensor] = {}
    try:
        for name, program in lowered.items():
            files = _compile(program, build / name, external=external)
            code[name] = [each for each in files if isinstance(each, str)]
            for constants in files:
                if not isinstance(constants, str):
                    _add(weights, {fqn: tensor for fqn, (tensor, _) in constants.items()})
        package_aoti(str(folder / FILE), code)
    finally:
        shutil.rmtree(build, ignore_errors=True)
    if external:
        write_weights(folder / WEIGHTS_FILE, weights)
    return lowered


def _lower(program: Program) -> Program:
    """A program of PyTorch's own operators, and on a GPU of our Triton kernels."""
    with quiet_exporters():
        program = simplify(apply_to_program(program, split_experts))
    # Bodies of ops hold constants of their own, such as the summed core: hence simplify on both sides.
    return simplify(apply_pass(program, lower_ops))


def _compile(program: Program, build: Path, *, external: bool) -> list[Any]:
    """Paths of the files that were generated in `build`, and the weights if they are to be kept outside."""
    import torch._inductor

    options: dict[str, Any] = {"aot_inductor.package": True, "aot_inductor.output_path": str(build)}
    if external:
        # The format is what makes the compiler hand the weights over; nothing is pickled.
        options |= {
            "aot_inductor.package_constants_in_so": False,
            "aot_inductor.package_constants_on_disk_format": "pickle_weights",
        }
    build.mkdir(parents=True)
    # With gradients on, Inductor fails on an embedding bag of parameters ("Autograd not support dtype: Long").
    with quiet_exporters(), torch.no_grad():
        module: Any = program.exported.module(check_guards=False)
        _make_buffers_parameters(module)
        args, kwargs = program.exported.example_inputs
        files = torch._inductor.aot_compile(module, args, kwargs, options=options)
    assert isinstance(files, list)
    return files


def _make_buffers_parameters(module: nn.Module) -> None:
    """Inductor copies buffers, in case the graph writes to them, and parameters not; quantised rows are buffers."""
    for each in module.modules():
        for name, buffer in list(each.named_buffers(recurse=False)):
            delattr(each, name)
            each.register_parameter(name, nn.Parameter(buffer, requires_grad=False))


def _add(weights: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for name, tensor in more.items():
        known = weights.setdefault(name, tensor)
        # Names that passes make ("folded_3") are the same in graphs that differ in sizes alone.
        if known.data_ptr() != tensor.data_ptr() and not torch.equal(known, tensor):
            raise RuntimeError(f"two graphs of a package have different weights of the name {name}")


def load_aoti(folder: Path, device: str = "cpu") -> Run:
    """The model as a function of its inputs, in order, run by AOTInductor on the device that it was compiled for.

    Inputs may be anywhere; logits come back on the CPU, the cache stays on the device.

    Raises:
        ValueError: the package holds anything but code for AOTInductor.
    """
    from torch.export.pt2_archive._package import load_pt2

    check_package(folder / FILE)
    graphs = load_pt2(str(folder / FILE)).aoti_runners
    if (folder / WEIGHTS_FILE).exists():
        weights = map_weights(folder / WEIGHTS_FILE)
        if device != "cpu":
            weights = {name: tensor.to(device) for name, tensor in weights.items()}
        for graph in graphs.values():
            # Mapped pages (on a CPU), which the graphs only point to: `run` keeps them alive.
            names = graph.get_constant_fqns()
            if missing := set(names) - set(weights):
                raise ValueError(f"{folder / WEIGHTS_FILE} does not belong to the package: it lacks {min(missing)}")
            own = {name: weights[name] for name in names}
            graph.load_constants(own, check_full_update=True, user_managed=True)
    else:
        weights = {}

    def run(inputs: Sequence[Tensor], _kept: Any = weights) -> tuple[Tensor, ...]:
        graph = graphs["decode" if inputs[0].shape[1] == 1 and "decode" in graphs else "model"]
        with torch.inference_mode():
            # It reads them as contiguous, unchecked.
            logits, *state = graph(*(tensor.to(device).contiguous() for tensor in inputs))
            return logits.cpu(), *state

    return run


def check_package(path: Path) -> None:
    """Raise if a package holds what PyTorch would unpickle, or a path that leaves the folder it is unpacked to.

    Its code is native and is run as it is: a package is to be trusted like any program.

    Raises:
        ValueError: the first entry that is not accepted.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is not a package: {error}") from error
    for name in names:
        _, _, inside = name.partition("/")  # the first folder is that of the archive
        parts = inside.split("/")
        is_code = inside.startswith(CODE_FOLDER) and len(parts) == 4 and parts[-1] not in ("", "weights_config.json")
        if ".." in parts or "\\" in name or not (is_code or inside in _OTHER_ENTRIES):
            raise ValueError(f"{path} must hold code of AOTInductor alone, got {name!r}")


def _load(folder: Path, config: ModelConfig, options: ExportOptions, plugin: bool | None) -> Run:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{folder / FILE} is code for a GPU, and there is no CUDA device")
    return load_aoti(folder, options.device)


def _how_to_load(options: ExportOptions, files: frozenset[str]) -> tuple[str, ...]:
    on_device = "" if options.device == "cpu" else f", on {options.device}"
    inputs = (
        f"[...]  # what manifest.json lists as inputs, in order, contiguous{on_device}; cached keys may have length 0"
    )
    if WEIGHTS_FILE not in files:
        return (
            "import torch",
            'model = torch._inductor.aoti_load_package("model.pt2")',
            f"inputs = {inputs}",
            "logits, *present = model(*inputs)",
        )
    graph = "decode" if options.decode and options.static is None else "model"
    return (
        "import torch, safetensors.torch; from torch._inductor.package import load_package",
        f'model, weights = load_package("model.pt2", "{graph}"), '
        f'safetensors.torch.load_file("model.safetensors", device="{options.device}")',
        "own = {name: weights[name] for name in model.get_constant_fqns()}; "
        "model.load_constants(own, check_full_update=True, user_managed=True)  # own must stay alive",
        f"logits, *present = model(*inputs)  # what manifest.json lists as inputs, in order, contiguous{on_device}",
    )


BACKEND = Backend(
    name="aoti",
    files=(FILE, WEIGHTS_FILE),
    write=write_aoti,
    load=_load,
    how_to_load=_how_to_load,
    devices=("cpu", "cuda"),
    has_coarse_keys=True,
    decode_beside=True,
)
