"""What a lookup costs in a table that is mapped from its file, with its rows in the page cache and without.

    python -m benchmarks.mapped_table [--out benchmarks/results/mapped_table.json]

A token reads 84 random rows of 1 KB of a file of a gigabyte. "resident": the rows are in the page cache. All others
begin with nothing of the file in it, neither mapped nor cached: "faults" waits for row after row; "faults, no
read-around" is told by MADV_RANDOM not to read what lies beside a row. "asked for" names the rows to the kernel first
(`ops.ask_for_rows`), and looks them up at once; "asked for ahead" has other work in between, as the skipped layers are,
which is not counted. What asking costs where the rows are there already is "asked for, resident".

Contenders take turns; medians with the quartiles beside them, in microseconds. Every result is compared with the rows
as they are read from the file. The last line is one JSON object.

Shapes: N rows, D row width, K slots.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.document import publish
from benchmarks.selection_recall import provenance
from ultramem import ops

NAME = "mapped_table"
ROWS, WIDTH, SLOTS = 2**20, 256, 84
ROW_BYTES = 4 * WIDTH
AHEAD_S = 0.02
"""Of other work between asking for rows and reading them."""
ROUNDS = 15


class Mapping:
    """A file of rows, mapped for reading."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb")
        self.pages = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # as it should be
            self.rows_ND = torch.frombuffer(self.pages, dtype=torch.float32).view(-1, WIDTH)

    def forget(self) -> None:
        """Leave nothing of the file in this process's page table or in the page cache."""
        self.pages.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def exact(self, rows_K: Tensor, scores_K: Tensor) -> Tensor:
        """The pooled rows in float64, read by another way than the mapping."""
        read = [os.pread(self.file.fileno(), ROW_BYTES, row * ROW_BYTES) for row in rows_K.tolist()]
        rows_KD = torch.frombuffer(bytearray(b"".join(read)), dtype=torch.float32).view(-1, WIDTH)
        return scores_K.double() @ rows_KD.double()


def measure(mapping: Mapping, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Microseconds of each round, by contender."""

    def pool(rows_K: Tensor, scores_K: Tensor) -> Tensor:
        return ops.lookup_reduce(mapping.rows_ND, rows_K.view(1, -1), scores_K.view(1, -1, 1), num_blocks=1)

    def timed(call: Callable[[], Any]) -> tuple[float, Any]:
        start = time.perf_counter()
        result = call()
        return 1e6 * (time.perf_counter() - start), result

    found: dict[str, list[float]] = {}

    def keep(name: str, us: float, pooled: Tensor, rows_K: Tensor, scores_K: Tensor) -> None:
        exact_D = mapping.exact(rows_K, scores_K)
        torch.testing.assert_close(pooled.view(-1).double(), exact_D, rtol=1e-4, atol=1e-4)
        found.setdefault(name, []).append(us)

    def draw() -> tuple[Tensor, Tensor]:
        return torch.randint(ROWS, (SLOTS,)), torch.rand(SLOTS)  # fresh: a disk remembers what it gave

    for _ in range(rounds):
        for name, advice in (("faults", mmap.MADV_NORMAL), ("faults, no read-around", mmap.MADV_RANDOM)):
            mapping.pages.madvise(advice)
            mapping.forget()
            rows_K, scores_K = draw()
            us, pooled = timed(lambda r=rows_K, s=scores_K: pool(r, s))
            keep(name, us, pooled, rows_K, scores_K)
        for name, ahead_s in (("asked for", 0.0), ("asked for ahead", AHEAD_S)):
            mapping.forget()
            rows_K, scores_K = draw()
            asking, _ = timed(lambda r=rows_K: ops.ask_for_rows(mapping.rows_ND, r))
            time.sleep(ahead_s)
            reading, pooled = timed(lambda r=rows_K, s=scores_K: pool(r, s))
            keep(name, asking + reading, pooled, rows_K, scores_K)
        asking, _ = timed(lambda r=rows_K: ops.ask_for_rows(mapping.rows_ND, r))
        reading, pooled = timed(lambda r=rows_K, s=scores_K: pool(r, s))
        keep("resident", reading, pooled, rows_K, scores_K)
        keep("asked for, resident", asking + reading, pooled, rows_K, scores_K)
    mapping.pages.madvise(mmap.MADV_NORMAL)
    return found


def write_rows(path: Path) -> None:
    with path.open("wb") as file:
        for _ in range(ROWS // 2**14):
            file.write(torch.randn(2**14, WIDTH).numpy().data)
        file.flush()
        os.fsync(file.fileno())  # what is not written yet stays in the cache


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--folder", type=Path, help="of the temporary file, on a disk (default: the system's)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "rows"
        write_rows(path)
        found = measure(Mapping(path))
    cases = {}
    for name, us in found.items():
        low, median, high = statistics.quantiles(us, n=4)
        cases[name] = {"low_us": low, "median_us": median, "high_us": high}
        print(f"{name:24}{median:12.0f} us  ({low:.0f} to {high:.0f})")
    document = {
        "benchmark": NAME,
        "rows": ROWS,
        "row_bytes": ROW_BYTES,
        "slots": SLOTS,
        "ahead_us": 1e6 * AHEAD_S,
        "rounds": ROUNDS,
        "cases": cases,
        "environment": provenance(),
    }
    publish(document, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
