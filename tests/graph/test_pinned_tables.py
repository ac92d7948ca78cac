"""Value tables in locked pages of the host, read from a GPU; without one, what goes where."""

import gc
import mmap
import re

import pytest
import torch
from families import FAMILIES

from ultramem.graph import build_model, pinned_tables
from ultramem.graph.pinned_tables import pin_tables
from ultramem.runtime.model_engine import CompiledEngine, EagerEngine

WITH_TABLES = ("pkm", "ultramem", "memory-plus", "peer")


def built(family):
    torch.manual_seed(0)
    return build_model(FAMILIES[family]).eval()


def named(model):
    return (*model.named_parameters(), *model.named_buffers())


@pytest.mark.parametrize("family", WITH_TABLES)
def test_rows_stay_and_all_else_moves(family, monkeypatch):
    model = built(family)
    kept = []
    monkeypatch.setattr(pinned_tables, "seen_from", lambda device, tensor: kept.append(tensor) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: torch.empty_like(tensor, device="meta"))
    pinned = pin_tables(model, "cuda")
    rows = {name: tensor for name, tensor in model.named_parameters() if re.search(r"values_NV|experts_NP", name)}
    assert sorted(tensor.data_ptr() for tensor in kept) == sorted(tensor.data_ptr() for tensor in rows.values())
    assert all(tensor.is_meta != bool(re.search(r"values_NV|experts_NP", name)) for name, tensor in named(pinned))
    assert not any(parameter.requires_grad for parameter in pinned.parameters())
    assert all(parameter.is_cpu and parameter.requires_grad for parameter in model.parameters())


def test_another_device_is_refused():
    with pytest.raises(ValueError, match=r"device must be of CUDA for tables in pinned memory, got cpu"):
        pin_tables(built("ultramem"), "cpu")


@pytest.mark.parametrize("size", [1, mmap.PAGESIZE, 3 * mmap.PAGESIZE + 5])
def test_pages_are_whole_and_their_own(size):
    pages = pinned_tables._own_pages(size)
    begin, room = pages.data_ptr(), pages.untyped_storage()
    assert begin % mmap.PAGESIZE == 0 == pages.nbytes % mmap.PAGESIZE
    assert pages.nbytes >= size
    assert room.data_ptr() <= begin
    assert begin + pages.nbytes <= room.data_ptr() + room.nbytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", WITH_TABLES)
@pytest.mark.parametrize("make_engine", [EagerEngine, CompiledEngine])
def test_engines_read_pinned_rows_as_they_read_the_devices(family, make_engine):
    model = built(family)
    tokens = torch.randint(model.config.vocab_size, (3, 20))
    pinned, moved = make_engine(pin_tables(model, "cuda")), make_engine(built(family).to("cuda"))
    logits, cache = pinned.prefill(tokens[:, :-3])
    expected, expected_cache = moved.prefill(tokens[:, :-3])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for token in tokens[:, -3:].split(1, 1):
        logits, cache = pinned.decode(token, cache)
        expected, expected_cache = moved.decode(token, expected_cache)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_rows_take_no_memory_of_the_device_and_are_let_go(dtype):
    device = torch.device("cuda")
    torch.zeros(1, device=device)
    rows = torch.randint(-100, 100, (2**14, 513)).to(dtype)
    before = torch.cuda.memory_allocated()
    seen = pinned_tables.seen_from(device, rows)
    assert torch.cuda.memory_allocated() == before
    assert seen.is_cuda
    assert seen.dtype == dtype
    index = torch.randint(2**14, (100,), device=device)
    assert torch.equal(seen[index].cpu(), rows[index.cpu()])
    pages = pinned_tables._own_pages(rows.nbytes)
    locked = pinned_tables._Locked(pages)
    assert pages.is_pinned()
    del locked
    gc.collect()
    assert not pages.is_pinned()
