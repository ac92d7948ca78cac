"""`docs/inference.md` from the results of mapped_table, inference_passes and rounded_rows.

python -m benchmarks.inference_page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "inference.md"


def render(mapped: dict[str, Any], passes: dict[str, Any], rounded: dict[str, Any]) -> str:
    """The page, from the three documents."""
    parts = [
        "# What is done for inference, measured",
        "<!-- python -m benchmarks.inference_page writes this page from benchmarks/results; edit the program -->",
        "Times are medians in microseconds, with the quartiles in brackets: of the mapped table on the clock, of all"
        " else on the processor, of one thread.",
        *_passes(passes),
        *_mapped(mapped),
        *_rounded(rounded),
    ]
    return "\n\n".join(parts) + "\n"


def _passes(document: dict[str, Any]) -> list[str]:
    graph = [
        [
            f"`{row['pass']}`" if "_" in row["pass"] else row["pass"],
            f"{row['nodes']:,}",
            f"{row['constant_bytes']:,}",
            _us(row),
        ]
        for row in document["graph"]
    ]
    coarse = [
        [
            f"`{row['size']}`", str(row["tokens"]), _mb(row["keys_read_bytes"]["by_rank"]),
            _mb(row["keys_read_bytes"]["coarse"]), _mb(row["keys_held_bytes"]["by_rank"]),
            _mb(row["keys_held_bytes"]["coarse"]), f"{row['nodes']['by_rank']} / {row['nodes']['coarse']}",
            _us(row["by_rank"]), _us(row["coarse"]), _ratio(row["coarse"], row["by_rank"]),
        ]
        for row in document["coarse_keys"]
    ]  # fmt: skip
    values = [
        [
            str(row["tokens"]),
            _us(row["projector"]),
            _us(row["projected_rows"]),
            _ratio(row["projected_rows"], row["projector"]),
        ]
        for row in document["values"]
    ]
    return [
        "## Passes over a captured graph",
        "Decode of `ultramem-tiny`, batch 1, 128 tokens in the cache; each graph runs operator by operator.",
        _table(["after", "nodes", "bytes of constants", "a step"], graph),
        "## Coarse keys",
        "Score and select of one layer (`fold_for_inference(coarse_keys=True)`). Bytes of keys are by arithmetic: what"
        " all tokens of a batch read together, all keys of a set once and the candidates' of each token.",
        _table(
            ["size", "tokens", "keys read, MB", "with coarse keys", "keys held, MB", "with coarse keys", "nodes",
             "every rank's keys", "coarse keys", "ratio"],
            coarse,
        ),
        "## Projected values",
        "Lookup and expand of a layer without virtual blocks whose rows have the model's width, 1024"
        f" (`fold_for_inference(values=True)`), without its projector of "
        f"{_mb(document['values'][0]['projector_bytes'])} MB.",
        _table(["tokens", "projector", "projected rows", "ratio"], values),
        _made_by("inference_passes", document),
    ]  # fmt: skip


def _mapped(document: dict[str, Any]) -> list[str]:
    rows = [[name, _us(case)] for name, case in document["cases"].items()]
    return [
        "## A mapped table",
        f"A lookup of one token, {document['slots']} rows of {document['row_bytes']} bytes, in a table of "
        f"{document['rows']:,} rows that is mapped from its file. All but the resident ones begin with nothing of the"
        " file in memory. *Asked for* names the rows to the system and looks them up at once; *asked for ahead* "
        f"{document['ahead_us'] / 1000:.0f} ms later, which are not counted.",
        _table(["rows", "asking and lookup"], rows),
        _made_by("mapped_table", document),
    ]


def _rounded(document: dict[str, Any]) -> list[str]:
    rows = [
        [name, f"{row['bits_per_byte']:.4f}", f"{row['cost_percent']:+.3f} %", f"{row['rows_bytes']:,}"]
        for name, row in document["rows"].items()
    ]
    text_bytes = next(iter(document["rows"].values()))["text_bytes"]
    return [
        "## Rounded rows",
        f"`{document['preset']}` after {document['steps']} steps of {document['batch_size']} x "
        f"{document['sequence_length']} on `{document['data']}`, seed {document['seed']}: bits per byte over all"
        f" {text_bytes:,} bytes of held-out text, its rows rounded after training. Bytes include the scales; tables of"
        " zeros say what the tables do at all.",
        _table(["rows", "bits per byte", "cost", "bytes of tables"], rows),
        _made_by("rounded_rows", document),
    ]


def _made_by(name: str, document: dict[str, Any]) -> str:
    made = document["environment"]
    return f"`benchmarks/results/{name}.json`: PyTorch {made['torch']}, {made['device']}, {made['threads']} threads."


def _us(case: dict[str, Any]) -> str:
    return f"{case['median_us']:,.0f} ({case['low_us']:,.0f}-{case['high_us']:,.0f})"


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f}"


def _ratio(new: dict[str, Any], old: dict[str, Any]) -> str:
    return f"{new['median_us'] / old['median_us']:.2f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return document


def main() -> int:
    PAGE.write_text(render(read("mapped_table"), read("inference_passes"), read("rounded_rows")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
