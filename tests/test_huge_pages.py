"""Huge pages: who asks for them, and that nothing else changes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ultramem import preset
from ultramem.graph.value_table import ValueTable
from ultramem.ops import advise_huge_pages, quantize_rows
from ultramem.ops.huge_pages import LARGE_BYTES
from ultramem.optim import LazyAdamW


def test_advice_for_huge_pages_changes_no_value() -> None:
    table = torch.arange(3 * 2**19, dtype=torch.float32).view(-1, 256)
    assert isinstance(advise_huge_pages(table), bool)  # whether it is taken is the system's choice
    assert torch.equal(table, torch.arange(3 * 2**19, dtype=torch.float32).view(-1, 256))
    assert not advise_huge_pages(table.t())
    assert not advise_huge_pages(torch.zeros(4))
    assert not advise_huge_pages(torch.zeros(4, device="meta"))
    assert not advise_huge_pages(table, at_least_bytes=table.nbytes + 1)
    with FakeTensorMode():
        assert not advise_huge_pages(torch.zeros(3 * 2**19))


def kernel_was_advised(tensor: torch.Tensor) -> bool:
    """Whether the mapping of a tensor's middle has the flag that MADV_HUGEPAGE sets."""
    address, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no mapping holds the tensor")


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="this system gives no huge pages"
)
def test_large_tables_and_their_moments_are_in_huge_pages() -> None:
    rows, d = LARGE_BYTES // 1024, 256
    table = torch.nn.Parameter(torch.empty(rows, d))
    assert not kernel_was_advised(table)
    config = preset("ultramem-tiny").memory
    assert config is not None
    made = ValueTable(replace(config, knum=int(rows**0.5), value_dim=d)).values_NV
    assert kernel_was_advised(made)
    optimizer = LazyAdamW([table], lr=0.1)
    table.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, d), table.shape, is_coalesced=True)
    optimizer.step()
    assert kernel_was_advised(optimizer.state[table]["exp_avg"])
    assert kernel_was_advised(quantize_rows(torch.zeros(4 * rows, d)).rows_NB)
