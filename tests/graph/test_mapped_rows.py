"""Rows of a mapped table are asked for, all at once, before they are read."""

import mmap
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exported import CONFIG, MEMORY, build

import ultramem
from ultramem import ops
from ultramem.graph.weights import save_weights, write_config

TOKENS = torch.arange(22).view(2, 11) % 64
LARGER = replace(MEMORY, knum=32)  # more rows than are read
FAMILIES = {
    "own": LARGER,
    "shared": replace(LARGER, table="shared"),
    "windows": replace(LARGER, table="windows", window_share=0.5, expert_dim=16, expert_project=True),
}


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def run(request, tmp_path):
    config = replace(CONFIG, memory=request.param)
    write_config(tmp_path, config)
    save_weights(build(config), tmp_path)
    return tmp_path


def events_of(model, monkeypatch):
    """What happens in a forward, in order, and the rows that are asked for."""
    events, asked = [], []
    monkeypatch.setattr(ops, "ask_for_rows", lambda rows, index: events.append("ask") or asked.append(index.flatten()))
    for number, block in enumerate(model.blocks, start=1):
        block.mlp.register_forward_hook(lambda *_, number=number: events.append(f"mlp {number}"))
    model.memories[0].lookup.register_forward_hook(lambda *_: events.append("lookup"))
    with torch.no_grad():
        logits = model(TOKENS).logits
    return events, asked, logits


def test_rows_are_asked_for_before_they_are_read(run, monkeypatch):
    events, _, _ = events_of(ultramem.load(run, mmap=True), monkeypatch)
    assert events[0] == "ask"
    assert [event for event in events if event != "ask"] == ["lookup", "mlp 1", "mlp 2"]
    events, _, _ = events_of(ultramem.load(run), monkeypatch)
    assert events == ["lookup", "mlp 1", "mlp 2"]


def test_the_rows_that_are_asked_for_are_those_that_are_read(run, monkeypatch):
    _, asked, logits = events_of(ultramem.load(run, mmap=True), monkeypatch)
    model = ultramem.load(run)
    for table in (module for module in model.modules() if hasattr(module, "values_NV")):
        others = torch.ones(len(table.values_NV), dtype=torch.bool).index_fill(0, torch.cat(asked), False)
        assert others.any()
        with torch.no_grad():
            table.values_NV[others] = torch.nan
            if table.experts_NP is not None:
                table.experts_NP[others] = torch.nan
    assert torch.equal(model(TOKENS).logits, logits)


@pytest.mark.skipif(sys.platform != "linux", reason="the advice is Linux's")
def test_asking_brings_rows_into_memory(tmp_path):
    path, width = tmp_path / "rows", 1024
    path.write_bytes(torch.arange(4096 * width, dtype=torch.float32).numpy().data)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        pages = mmap.mmap(file.fileno(), 0)
        rows_ND = torch.frombuffer(pages, dtype=torch.float32).view(-1, width)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        def in_memory(row):
            try:
                return os.preadv(file.fileno(), [bytearray(4 * width)], 4 * width * row, os.RWF_NOWAIT) == 4 * width
            except BlockingIOError:
                return False

        if in_memory(17) or in_memory(4000):
            pytest.skip("this file system keeps files in memory")
        ops.ask_for_rows(rows_ND, torch.tensor([[4000, 17], [17, 4000]]))
        until = time.monotonic() + 10
        while not (in_memory(17) and in_memory(4000)) and time.monotonic() < until:
            time.sleep(0.01)
        assert in_memory(17)
        assert in_memory(4000)
        assert not in_memory(2000)
        assert rows_ND[4000, 0] == 4000 * width


@pytest.mark.skipif(sys.platform != "linux", reason="the advice is Linux's")
def test_nothing_is_read_beside_a_row(run):
    """ "rr": the kernel was told of random reads."""
    model, flags = ultramem.load(run, mmap=True), {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(each, 16) for each in found.groups())
        elif line.startswith("VmFlags:"):
            flags[begin, end] = line.split()

    def flags_of(tensor):
        middle = tensor.data_ptr() + tensor.nbytes // 2
        return next(found for (begin, end), found in flags.items() if begin <= middle < end)

    table = model.table if model.table is not None else model.memories[0].table
    assert "rr" in flags_of(table.values_NV)
    assert "rr" not in flags_of(model.embedding.weight)
