"""One writer of safetensors for weights and checkpoints: no second copy in memory, and the old file or the new one."""

import os
import resource
import sys
from contextlib import contextmanager

import pytest
import torch
from mapped import data_bytes
from safetensors.torch import load_file

from ultramem.graph.sharded_weights import _reserve, write_parts
from ultramem.runtime.checkpoint import newest_record, save_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of a process as Linux has them")
NUMBERS = 2**25
"""float32: 128 MiB."""


@contextmanager
def limit(kind, soft):
    old, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (old, hard))


def test_writing_copies_nothing(tmp_path):
    tensors = {"table": torch.arange(NUMBERS, dtype=torch.float32), "step": torch.tensor(3)}
    with limit(resource.RLIMIT_DATA, data_bytes() + 2**25):
        with pytest.raises((MemoryError, RuntimeError)):
            tensors["table"].clone()  # the limit is one
        write_parts(tmp_path / "weights", tensors)
        save_checkpoint(tmp_path / "checkpoints", 7, tensors, "fingerprint", keep=1)
    record = newest_record(tmp_path / "checkpoints", "fingerprint")
    assert record is not None
    assert record.step == 7
    for path in (tmp_path / "weights", record.path):
        found = load_file(path)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_disk_without_room_leaves_the_old_file(tmp_path):
    path = tmp_path / "weights"
    write_parts(path, {"table": torch.zeros(10)})
    before = path.read_bytes()
    with limit(resource.RLIMIT_FSIZE, 2**20), pytest.raises(OSError, match="File too large"):
        write_parts(path, {"table": torch.zeros(NUMBERS)})
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["weights"]


def test_the_room_of_a_file_is_there_before_it_is_mapped(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        _reserve(file.fileno(), 2**20)
        assert os.fstat(file.fileno()).st_blocks * 512 >= 2**20  # a hole has none
