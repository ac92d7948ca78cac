"""What rounding a run's value rows costs, in bits per byte of its held-out text.

    python -m benchmarks.rounded_rows RUN --preset PRESET [--out benchmarks/results/rounded_rows.json]

The same model with its tables as they were trained, in bfloat16, and as int8 and int4 rows with a scale each; all else
stays float32. Tables of zeros say what the tables do for the model at all. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ultramem
from benchmarks.harness.document import publish
from benchmarks.selection_recall import provenance
from ultramem.config import to_dict
from ultramem.graph import Transformer
from ultramem.graph.quantized_table import QuantizedValueTable, quantize_tables
from ultramem.graph.shared_copy import shared_copy
from ultramem.graph.value_table import ValueTable
from ultramem.graph.weights import read_config
from ultramem.runtime.data import evaluation_batches, load_corpus
from ultramem.runtime.evaluate import evaluate, make_summed_loss
from ultramem.runtime.tokenizer import load_tokenizer

NAME = "rounded_rows"


def with_tables(model: Transformer, convert: Callable[[Tensor], Tensor]) -> Transformer:
    """A model whose tables are converted, and all else is shared."""

    def rounded(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, ValueTable):
            return None
        with torch.device("meta"):
            made = ValueTable(memory)
        for name, rows in module.named_parameters():
            made.register_parameter(name, nn.Parameter(convert(rows.detach()), requires_grad=False))
        return made.eval()

    memory = model.config.memory
    assert memory is not None
    return shared_copy(model, modules=rounded)


def rows_bytes(model: nn.Module) -> int:
    """Of the tables, scales included."""
    tables = [module for module in model.modules() if isinstance(module, ValueTable | QuantizedValueTable)]
    return sum(each.nbytes for table in tables for each in (*table.parameters(), *table.buffers()))


def measure(run: Path) -> dict[str, Any]:
    """Bits per byte and bytes of each kind of rows.

    Raises:
        FileNotFoundError: the run or its text is missing.
        ValueError: the run has no memory layers.
    """
    model, document = ultramem.load(run), read_config(run)
    tokenizer = load_tokenizer(run)
    text = load_corpus(document["data"]["name"], tokenizer=tokenizer).held_out
    models = {
        "float32": model,
        "bfloat16": with_tables(model, Tensor.bfloat16),
        "int8": quantize_tables(model, 8),
        "int4": quantize_tables(model, 4),
        "zeros": with_tables(model, torch.zeros_like),
    }
    rows: dict[str, Any] = {}
    for name, each in models.items():
        batches = evaluation_batches(
            text, batch_size=document["train"]["batch_size"], sequence_length=document["train"]["sequence_length"]
        )
        means = evaluate(each, make_summed_loss(each, compiled=False), batches, token_bytes=tokenizer.token_bytes)
        trained = rows.get("float32", {"bits_per_byte": means.bits_per_byte})["bits_per_byte"]
        rows[name] = {
            "bits_per_byte": means.bits_per_byte,
            "cost_percent": 100 * (means.bits_per_byte / trained - 1),
            "rows_bytes": rows_bytes(each),
            "text_bytes": means.text_bytes,
        }
        print(f"{name:10}{means.bits_per_byte:9.5f} bits per byte  {rows[name]['cost_percent']:+.3f} %", flush=True)
    trained_as = {name: document["train"][name] for name in ("steps", "batch_size", "sequence_length", "seed")}
    return {"data": document["data"]["name"], **trained_as, "rows": rows}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a trained run")
    parser.add_argument("--preset", required=True, help="that the run was trained as, for the record")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if read_config(options.run)["model"] != json.loads(json.dumps(to_dict(ultramem.preset(options.preset)))):
        parser.error(f"preset: {options.run} was not trained as {options.preset}")
    document = {"benchmark": NAME, "preset": options.preset, **measure(options.run), "environment": provenance()}
    publish(document, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
