"""ONNX: one `model.onnx` for stock ONNX Runtime, and for runtimes that have kernels for the nodes of this package.

Every node is named `<stage>/<name>` (see `onnx_stages`), so that a profile can be read stage by stage; the module path
stands in the node's metadata as well ("namespace", "pkg.torch.onnx.name_scopes"), as torch.onnx wrote it.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import torch

from ultramem.config import ModelConfig
from ultramem.export import onnx_functions
from ultramem.export.backend import Backend, Run
from ultramem.export.coarse_keys import with_coarse_keys
from ultramem.export.extras import quiet_exporters, require
from ultramem.export.onnx_plugin import register
from ultramem.export.onnx_session import FILE, load_onnx
from ultramem.export.onnx_stages import OTHER_STAGE, stage_of_module
from ultramem.export.options import ExportOptions
from ultramem.export.program import PassRecord, Program, apply_pass, capture, records_of, simplify
from ultramem.graph.passes import split_einsums
from ultramem.graph.transformer import Transformer
from ultramem.ops.tucker_topk import Candidates

__all__ = ["BACKEND", "FILE", "export_onnx", "load_onnx", "register"]

EXTERNAL_BYTES = 256_000_000  # a protobuf message ends at 2 GB, and is copied where it is written


def export_onnx(
    program: Program, folder: Path, *, candidates: Candidates, external_bytes: int = EXTERNAL_BYTES
) -> Program:
    """Write `model.onnx` (and `model.onnx.data` if the weights take more than `external_bytes`) to `folder`.

    Returns:
        The program as it was translated, with its passes.

    Raises:
        ImportError: onnx or onnxscript is missing.
    """
    onnx = require("onnx", "onnx")
    ir = require("onnx_ir", "onnx")
    require("onnxscript", "onnx")
    program = simplify(apply_pass(program, split_einsums))
    with quiet_exporters(), onnx_functions.schemas():
        translated = torch.onnx.export(
            program.exported,
            dynamo=True,
            verbose=False,
            opset_version=onnx_functions.OPSET,
            input_names=list(program.input_names),
            output_names=list(program.output_names),
            custom_translation_table=onnx_functions.translations(),
        )
    assert translated is not None
    model: Any = translated.model
    _name_sizes(model.graph, ir)
    _name_nodes(model.graph)
    _attach_functions(model, candidates, ir)
    model.producer_name = "ultramem"
    initializers: list[Any] = list(model.graph.initializers.values())
    weight_bytes = sum(int(each.const_value.nbytes) for each in initializers)
    path = folder / FILE
    ir.save(model, path, external_data=f"{FILE}.data" if weight_bytes > external_bytes else None)
    onnx.checker.check_model(str(path), full_check=True)
    return program


def write_onnx(model: Transformer, options: ExportOptions, folder: Path) -> tuple[PassRecord, ...]:
    """Write the model as one graph of the sizes that the options ask for."""
    memory = model.config.memory
    program = capture(model, batch=options.batch, seq=options.seq)
    return records_of({"model": export_onnx(program, folder, candidates=memory.candidates if memory else "one_tailed")})


def _name_sizes(graph: Any, ir: Any) -> None:
    """Call the free sizes batch, seq and past, everywhere."""
    ids, key = graph.inputs[0], graph.inputs[3]
    sizes = ((ids.shape[0], "batch"), (ids.shape[1], "seq"), (key.shape[2], "past"))
    names = {str(size): name for size, name in sizes if not isinstance(size, int)}
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in names))
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    size if isinstance(size, int) else pattern.sub(lambda found: names[found[0]], str(size))
                    for size in value.shape
                ]
            )


def _name_nodes(graph: Any) -> None:
    """Prefix each node's name by its stage; a node that torch.onnx made without a scope takes its neighbour's."""
    stages: dict[Any, str] = {}
    for node in graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # source paths of whoever exported
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        if scopes is not None:
            *modules, _ = ast.literal_eval(scopes)
            # A table may be the model's: its nodes belong to the lookup that called it.
            stages[node] = stage_of_module(next(each for each in reversed(modules) if not each.endswith("table")))
    for node in graph:
        if node not in stages:
            producers = [each.producer() for each in node.inputs if each is not None]
            readers = [reader for output in node.outputs for reader, _ in output.uses()]
            stages[node] = next((stages[each] for each in [*producers, *readers] if each in stages), OTHER_STAGE)
        node.name = f"{stages[node]}/{node.name}"


def _attach_functions(model: Any, candidates: Candidates, ir: Any) -> None:
    """Give every node of this package its plugin attributes, and the model the bodies of those that it has."""
    ours = [node for node in model.graph if node.domain == onnx_functions.DOMAIN]
    widths = sorted({node.attributes["bits"].value for node in ours if "bits" in node.attributes})
    if len(widths) > 1:
        raise ValueError(f"the quantised tables of an ONNX file must have the same bits, got {widths}")
    double = any(each.dtype == ir.DataType.DOUBLE for node in ours for each in node.inputs)
    bodies = onnx_functions.function_protos(candidates, bits=widths[0] if widths else 8, double=double)
    for node in ours:
        # TensorRT's parser looks a plugin up by these, and takes the body where it finds none.
        for name, value in (("plugin_namespace", onnx_functions.DOMAIN), ("plugin_version", "1")):
            node.attributes[name] = ir.AttrString(name, value)
        function = ir.serde.deserialize_function(bodies[node.op_type])
        model.functions[function.identifier()] = function
    model.opset_imports[onnx_functions.DOMAIN] = onnx_functions.VERSION


def _load(folder: Path, config: ModelConfig, options: ExportOptions, plugin: bool | None) -> Run:
    try:
        return load_onnx(folder, plugin=plugin)
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "onnxruntime":  # its errors have no class in common
            raise
        raise ValueError(f"{folder / FILE} is refused by ONNX Runtime: {' '.join(str(error).split())}") from error


def _how_to_load(options: ExportOptions, files: frozenset[str]) -> tuple[str, ...]:
    return (
        "import onnxruntime",
        'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])',
        "feeds = {...}  # the inputs that manifest.json lists, by name, as numpy arrays; cached keys may have length 0",
        "logits, *present = session.run(None, feeds)",
    )


def _write(model: Transformer, options: ExportOptions, folder: Path) -> tuple[PassRecord, ...]:
    return write_onnx(with_coarse_keys(model, options, seq=options.seq), options, folder)


BACKEND = Backend(
    name="onnx",
    files=(FILE, f"{FILE}.data"),
    write=_write,
    load=_load,
    how_to_load=_how_to_load,
    dtypes=("fp32", "fp16"),
    lacks={"bf16": "stock ONNX Runtime has no bfloat16 kernels on a CPU"},
    has_coarse_keys=True,
)
