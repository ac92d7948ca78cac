"""AOTInductor: one `model.pt2` of native code that loads where neither this package nor its source is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from ultramem.export.extras import quiet_exporters
from ultramem.export.program import Program, apply_pass, simplify
from ultramem.graph.passes import lower_ops

FILE = "model.pt2"


def export_aoti(program: Program, folder: Path) -> Program:
    """Write `model.pt2` to `folder`.

    Returns:
        The program as it was compiled, with its passes.
    """
    import torch._inductor

    # Bodies of ops hold constants of their own, such as the summed core: hence simplify on both sides.
    program = simplify(apply_pass(simplify(program), lower_ops))
    # With gradients on, Inductor fails on an embedding bag of parameters ("Autograd not support dtype: Long").
    with quiet_exporters(), torch.no_grad():
        torch._inductor.aoti_compile_and_package(program.exported, package_path=str(folder / FILE))
    return program


def load_aoti(folder: Path) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    """The model as a function of its inputs, in order, run by AOTInductor on the CPU."""
    import torch._inductor

    package = torch._inductor.aoti_load_package(str(folder / FILE))

    def run(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return tuple(package(*(tensor.contiguous() for tensor in inputs)))  # it reads them so, unchecked

    return run
