"""A profile as a file holds it, without the minutes that it takes to measure one."""

from __future__ import annotations

from typing import Any

from ultramem.runtime.profile import STAGES

NODES = 3


def stage_row(stages: list[str], time_us: float, *, is_whole: bool = True) -> dict[str, Any]:
    known = len(stages) == 1
    return {
        "stages": stages, "time_us": time_us, "p50_us": 1.01 * time_us, "p90_us": 1.2 * time_us,
        "p99_us": 1.7 * time_us,
        "calls": 3, "is_whole": is_whole, "flops": 1_234_567 if known and stages != ["other"] else 0 if known else None,
        "bytes": 98_765 if known else None, "flops_per_byte": 12.4999 if known else None,
        "bandwidth_share": 0.345 if known else None, "compute_share": 0.0123 if known else None,
    }  # fmt: skip


def node_rows(engine: str, sum_us: float) -> list[dict[str, Any]]:
    kinds = {"eager": "aten::linear", "compile": "cpp_fused_add_0"}
    return [
        {
            "node": f"{index} {kinds[engine]}", "kind": kinds[engine] if index else "module",
            "modules": [f"blocks.{index}.attention", "model"][: 2 if engine == "compile" else 1],
            "fx_nodes": ["linear"], "stages": ["attention"], "calls": 1 if index else 0,
            "time_us": 0.01 * sum_us * index,
            "p50_us": 0.011 * sum_us, "p90_us": 0.02 * sum_us, "p99_us": 0.03 * sum_us,
            "fastest_start_us": 0.1 * sum_us * index, "fastest_span_us": 0.01 * sum_us,
            "flops": 2_345_678 if index else None, "bytes": 87_654 if index else None,
            "flops_per_byte": 26.7606 if index else None, "bandwidth_share": 0.456 if index else None,
            "compute_share": 0.0234 if index else None,
        }
        for index in range(NODES)
    ]  # fmt: skip


def module_rows(engine: str, sum_us: float) -> list[dict[str, Any]]:
    """One that is known and whole, one without arithmetic, and of the compiled engine one over two modules."""
    rows = [stage_row(["attention"], 0.02 * sum_us), stage_row(["other"], 0.05 * sum_us)]
    named = [["blocks.0.attention"], ["model"]]
    if engine == "compile":
        rows.append(stage_row(["attention", "other"], 0.03 * sum_us, is_whole=False))
        named.append(["blocks.1.attention", "model"])
    for name in ("flops", "bytes", "flops_per_byte", "bandwidth_share", "compute_share"):
        rows[1][name] = None
    return [{"modules": modules, **row} for modules, row in zip(named, rows, strict=True)]


def make_document(name: str = "a<b>&c") -> dict[str, Any]:
    """A profile of two engines, one of them with fused stages, as a file holds it."""
    latency, stages, arithmetic, requests = [], [], [], []
    for batch in (1, 8):
        for place, engine in enumerate(("eager", "compile")):
            tpot_us = 1334.56 * batch / (1 + place)
            requests.append(
                {
                    "engine": engine, "batch": batch, "prompt_tokens": 128, "new_tokens": 32, "requests": 25,
                    "ttft_us": 9 * tpot_us, "ttft_p90_us": 11 * tpot_us, "tpot_us": tpot_us,
                    "tokens_per_second": batch / tpot_us * 1e6, "gap_p50_us": 0.98 * tpot_us,
                    "gap_p90_us": 1.2 * tpot_us, "gap_p99_us": 2.3 * tpot_us, "gaps": 775,
                    "round_ttft_us": [9 * tpot_us], "round_tpot_us": [tpot_us],
                    "launches_per_step": None if place else 321, "recompiles": place,
                    "memory_bytes": 1_234_567 if place else None, "memory_method": "VmHWM", "minor_faults": 12_345,
                    "major_faults": 0, "max_abs_difference": 3.8e-6 * place,
                }
            )  # fmt: skip
        for phase in ("prefill", "decode"):
            for place, engine in enumerate(("eager", "compile")):
                p50_us = 1234.56 * batch / (1 + place) * (9 if phase == "prefill" else 1)
                latency.append(
                    {
                        "engine": engine, "batch": batch, "phase": phase,
                        "new_tokens": 128 if phase == "prefill" else 1,
                        "cached_tokens": 0 if phase == "prefill" else 128,
                        "samples": 57, "p50_us": p50_us, "p90_us": 1.11 * p50_us, "p99_us": 3.7 * p50_us,
                        "min_us": 0.9 * p50_us, "round_p50_low_us": 0.97 * p50_us, "round_p50_high_us": 1.06 * p50_us,
                        "round_p50_us": [0.97 * p50_us, 1.06 * p50_us], "round_p90_us": [1.11 * p50_us],
                        "round_p99_us": [3.7 * p50_us],
                        "tokens_per_second": batch / p50_us * 1e6, "bandwidth_share": 0.0876, "compute_share": 0.123,
                        "max_abs_difference": 3.8e-6 * place,
                    }
                )  # fmt: skip
                rows = [stage_row([stage], 0.1 * p50_us) for stage in STAGES]
                if engine == "compile":
                    rows = [
                        *rows[3:],
                        stage_row(["query", "score"], 0.2 * p50_us, is_whole=False),
                        stage_row(["score", "select", "mlp"], 7.654, is_whole=False),
                    ]
                    rows[3]["is_whole"] = False
                explained_us = sum(row["time_us"] for row in rows)
                stages.append(
                    {
                        "engine": engine, "batch": batch, "phase": phase, "method": "timers", "note": "", "runs": 20,
                        "plain_us": 0.98 * p50_us, "instrumented_us": 1.5 * p50_us, "instrument_us": 0.3 * p50_us,
                        "sum_us": 1.2 * p50_us, "sum_ratio": 1.2 / 0.98, "turn_sum_ratios": [1.15, 1.03, 1.31],
                        "fastest_us": 1.1 * p50_us,
                        "max_abs_difference": 3.8e-6 * place, "launches": 30, "rows": rows,
                        "modules": module_rows(engine, 1.2 * p50_us),
                        "nodes": node_rows(engine, 1.2 * p50_us), "unattributed_us": 1.2 * p50_us - explained_us,
                        "coverage": explained_us / (1.2 * p50_us),
                    }
                )  # fmt: skip
            for place, stage in enumerate(STAGES):
                cost = {
                    "flops": 1_234_567 * place, "weight_bytes": 98_765 * place, "row_bytes": 4_096 if place == 3 else 0,
                    "cache_bytes": 0, "activation_bytes": 54_321 * batch,
                }  # fmt: skip
                total_bytes = sum(value for name, value in cost.items() if name != "flops")
                arithmetic.append(
                    {
                        "batch": batch, "phase": phase, "stage": stage, **cost, "total_bytes": total_bytes,
                        "roofline_us": total_bytes / 2e4,
                    }
                )  # fmt: skip
    return {
        "kind": "ultramem-profile",
        "format_version": 5,
        "created": "2026-01-02T03:04:05+00:00",
        "model": {
            "name": name, "parameters": 3_971_904, "flops_per_token": 4_300_000, "weight_bytes": 15_887_616,
            "dtype": "float32", "config": {},
        },
        "machine": {
            "device": "A Processor", "cores": 2, "threads": 2, "last_level_cache_bytes": 33_554_432,
            "read_bytes_per_second": 2e10, "copy_bytes_per_second": 1.876e10, "bytes_per_second": 2e10,
            "gemm_flops_per_second": 6.7e10, "system": "Linux x86_64", "python": "3.12.1",
            "versions": {"torch": "2.13.0"}, "cpu_flags": "AVX2",
        },
        "settings": {
            "batches": [1, 8], "prompt_tokens": 128, "new_tokens": 32, "seconds_per_cell": 1.0, "max_samples": 200,
            "rounds": 5, "seed": 0,
        },
        "engines": [
            {
                "name": engine, "prepare_seconds": 61.74, "export_seconds": 0.0, "open_seconds": 0.14,
                "warm_up_seconds": 61.6, "graphs": 4, "graph_breaks": 0, "cached_graphs": 2,
                "memory_bytes": 123_456_789, "memory_method": "VmHWM", "max_abs_difference": difference,
                "tolerance": 1.3e-5,
            }
            for engine, difference in (("eager", 0.0), ("compile", 3.8e-06))
        ],
        "requests": requests,
        "row_use": [
            {
                "batch": batch, "phase": phase, "table": "memories.0.table", "reads": 12_345, "rows_touched": 4_321,
                "table_rows": 9_216, "row_bytes": 1024,
            }
            for batch in (1, 8)
            for phase in ("prefill", "decode")
        ],
        "latency": latency,
        "stages": stages,
        "arithmetic": arithmetic,
    }  # fmt: skip
