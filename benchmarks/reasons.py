"""Why goals are missed where they are, as far as it was found: what docs/benchmarks.md says beside them."""

from __future__ import annotations

REASONS = {
    ">= 2x embedding_bag at its best, T = 1 to 16": (
        "Both read the same rows from random places, and memory answers both at the same rate. Of one token's call "
        "more is spent in Python's checks and in the call of a stable-ABI op than in the kernel; embedding_bag's bags "
        "are sorted before its time begins."
    ),
    ">= 3x its quantised peer, int8 rows": (
        "The peer reads as many bytes, at the same rate of random lines, and its scales lie in its rows, where ours "
        "are a line more each. What is won is won with many tokens."
    ),
    ">= 5x the dense-gradient path with AdamW": (
        "Both train keys and projections of the same size; what is left to us is mostly that. The update of the "
        "touched rows has rows of its own on this page."
    ),
    "peak memory <= table + states + 10 %": (
        "About half a gigabyte is there whatever the table and its optimiser: PyTorch, compiled code, and activations "
        "of 1024 tokens. The table is 1 GB here."
    ),
    "<= 1.25x the key GEMM alone": (
        "On the GPU a shortlist that overflowed was searched bit by bit, in up to 66 rounds. Now it takes a few; it "
        "has not been timed since."
    ),
    ">= 92 % of measured peak bandwidth, T >= 4096": "Not found: the kernel was not profiled further on a GPU.",
    "<= 1.35x floor, B <= 64": (
        "Keys were normalised and singular vectors computed in every forward, and each of 16 launches waits for the "
        "one before. Both are folded now and 8 launches left (docs/static.md); it has not been timed since."
    ),
    "<= 4 launches, B <= 64": (
        "Measured with constants unfolded. Folded, three products with what is between them, selection, lookup and "
        "the state of the convolution are 8: the compiler fuses nothing into a product."
    ),
}
"""By the text of a goal."""
