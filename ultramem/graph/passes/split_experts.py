"""One matrix product per expert in place of `ultramem::grouped_mm`, for compilers that have no grouped product.

PyTorch's own `aten._grouped_mm` has a kernel in AOTInductor's C interface, but its fake kernel (torch 2.13) refuses
float32 and float16. Here an expert multiplies the rows that it was given, whatever their number: no row is padded, no
weight is copied, and the work does not depend on how tokens are spread.

Shapes: T tokens sorted by expert, D inputs, I outputs, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export import ExportedProgram

import ultramem.ops  # noqa: F401  # registers the op


def split_experts(exported: ExportedProgram) -> ExportedProgram:
    """The program without grouped products; itself if it has none."""
    op = torch.ops.ultramem.grouped_mm.default
    if all(node.target is not op for node in exported.graph.nodes):
        return exported
    split: ExportedProgram = exported.run_decompositions({op: _one_by_one})
    return split


def _one_by_one(inputs_TD: Tensor, weights_EDI: Tensor, ends_E: Tensor) -> Tensor:
    products, first = [], 0
    for weight_DI, end in zip(weights_EDI.unbind(0), ends_E.tolist(), strict=True):
        torch._check(end >= first)
        torch._check(end <= inputs_TD.shape[0])
        products.append(inputs_TD.narrow(0, first, end - first) @ weight_DI)
        first = end
    # The sum of the experts' rows is T, which no compiler knows: taking rows by number says so.
    return torch.cat(products)[torch.arange(inputs_TD.shape[0], device=inputs_TD.device)]
