"""Render docs/static.md from benchmarks/results/static.json: python -m benchmarks.static_page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.static_table import PAGE, Row, read

INTRODUCTION = """# What is known of the GPU kernels without a GPU

Made by `make static` and checked by `make static-check`, which fails where a row is worse than here; the figures are in
[benchmarks/results/static.json](../benchmarks/results/static.json). Nothing on this page was timed.
"""


def render(sections: Mapping[str, Any]) -> str:
    parts = [
        INTRODUCTION,
        _launches(sections["launches"]),
        _traffic(sections["traffic"]),
        _kernels(sections["kernels"]),
    ]
    return "\n".join(parts)


def _launches(section: Mapping[str, Any]) -> str:
    rows = [
        [row["layer"], row["phase"], row["launches"], row["ours"], row["gemm"], row["fused"], row["aten"]]
        for row in section["rows"]
    ]
    return f"""## Launches

Of one compiled memory layer in bfloat16 ({_versions(section)}): kernels of ours, GEMMs, kernels that Inductor wrote,
other PyTorch operators. The training backward counts a backward op of ours by the launches in its body, which has a row
of its own.

{_table(["layer", "phase", "launches", "ours", "GEMM", "Inductor", "aten"], rows)}"""


def _traffic(section: Mapping[str, Any]) -> str:
    tokens = sorted({row["tokens"] for row in section["rows"]})
    by_problem: dict[tuple[str, str], dict[int, Row]] = {}
    for row in section["rows"]:
        by_problem.setdefault((row["op"], row["size"]), {})[row["tokens"]] = row
    rows = [
        [op, size, *(f"{_bytes(row[t]['asked_bytes'])} ({row[t]['ratio']:.2f})" for t in tokens)]
        for (op, size), row in by_problem.items()
    ]
    return f"""## Bytes moved

Bytes that all programs of an op ask for in bfloat16, re-reads included, by the number of tokens; in brackets over the
floor, which has each needed input and each output once, rows once a token. Counted in Triton's interpreter on one or
two tokens whose rows all differ, and in proportion to the tokens from there; above 64 tokens with the kernels that an
unknown number of tokens gets.

{_table(["op", "size", *(f"T = {t}" for t in tokens)], rows)}"""


def _kernels(section: Mapping[str, Any]) -> str:
    archs = sorted({row["arch"] for row in section["rows"]}, key=lambda arch: (arch != "sm_90a", arch))
    parts = [
        f"""## Compiled kernels

What ptxas made of every kernel variant ({_versions(section)}), without a spill. Occupancy is that of an SM's warps,
from registers, shared memory and warps a program. Shares of 16-byte accesses are of the bytes of one execution of each
load or store in the code. Barriers in brackets are in loops.
"""
    ]
    for arch in archs:
        rows = [
            [
                row["kernel"], row["size"], row["dtype"], row["warps"], row["registers"], row["shared_bytes"],
                f"{row['occupancy']:.0%}", f"{row['wide_load_share']:.0%}", f"{row['wide_store_share']:.0%}",
                f"{row['barriers']} ({row['barriers_in_loop']})", row["instructions"],
            ]
            for row in section["rows"]
            if row["arch"] == arch
        ]  # fmt: skip
        header = [
            "kernel", "size", "dtype", "warps", "registers", "shared, B", "occupancy", "16-byte loads",
            "16-byte stores", "barriers", "instructions",
        ]  # fmt: skip
        parts.append(f"### {arch}\n\n{_table(header, rows)}")
    return "\n".join(parts)


def _versions(section: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in section["versions"].items())


def _table(header: list[str], rows: Iterable[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)


def _bytes(number: int) -> str:
    for unit in ("B", "KB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000  # type: ignore[assignment]
    return f"{number:.3g} GB"


if __name__ == "__main__":
    PAGE.write_text(render(read()))
