"""The paper's Figures 1(b,c), 6(c) and 7: by arithmetic on a device's roofs, and measured where this machine can."""

from ultramem.runtime.figures.devices import DEVICE_NAMES, DEVICES, Roofs
from ultramem.runtime.figures.expected import decode_costs, expected_distinct, roofline_us
from ultramem.runtime.figures.make import make_figure
from ultramem.runtime.figures.page import render_figure
from ultramem.runtime.figures.schema import FIGURES, Figure, check_document, to_json

__all__ = [
    "DEVICES",
    "DEVICE_NAMES",
    "FIGURES",
    "Figure",
    "Roofs",
    "check_document",
    "decode_costs",
    "expected_distinct",
    "make_figure",
    "render_figure",
    "roofline_us",
    "to_json",
]
