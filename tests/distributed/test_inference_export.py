"""Exports of which every rank has a part: what they compute together, what they hold, and where they run."""

import json
import resource
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES
from mapped import data_bytes, write_sparse
from torch.distributed.device_mesh import init_device_mesh

import ultramem
from ultramem.export import ExportOptions, export_parts, load_artifact
from ultramem.export.export_parts import _together
from ultramem.export.program import empty_state, flat_inputs
from ultramem.export.shard_record import part_folder
from ultramem.graph import build_model
from ultramem.graph.table_shard import TableShard
from ultramem.graph.weights import save_weights, write_config
from ultramem.runtime.distributed.ranks import Ranks
from ultramem.runtime.engine import open_engine
from ultramem.runtime.generate import Generator, Request

TABLE = "memories.0.table.values_NV"
SIDE, WIDTH = 512, 512
TABLE_BYTES = SIDE * SIDE * WIDTH * 4
REQUEST = Request(prompt=(1, 2, 3), max_new_tokens=40)


def write_run(folder):
    """A run with a table of 512 MB, most of it holes in the file."""
    config = FAMILIES["ultramem"]
    config = replace(config, memory=replace(config.memory, knum=SIDE, value_dim=WIDTH))
    folder.mkdir()
    write_config(folder, config)
    with torch.device("meta"):
        shapes = {name: tuple(each.shape) for name, each in build_model(config).state_dict().items()}
    path = folder / "model.safetensors"
    place = write_sparse(path, {TABLE: shapes.pop(TABLE), **shapes})
    with path.open("r+b") as file:
        for start in range(0, TABLE_BYTES, 2**23):
            file.seek(place + start)
            file.write(torch.randn(2**18).numpy().data)
        file.seek(place + TABLE_BYTES)
        for shape in shapes.values():
            file.write((0.3 * torch.randn(shape)).contiguous().numpy().data)


def export_within(folder, out, placement, allowed_bytes):
    """What a rank finds of an export that is made, loaded and run with so much memory more."""
    shard = TableShard(placement=placement, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), tokens="same")
    whole = ultramem.load(folder, mmap=True)
    refused = ""
    import torch._inductor.compile_fx  # what libraries take is not what tables take
    import torch._inductor.package.package

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + allowed_bytes, hard))
    try:
        part = ultramem.load(folder, shard=shard)
        manifest = export_parts(part, whole, "aoti", out, shard=shard)
        del part
        own = part_folder(out, dist.get_rank(), dist.get_world_size())
        ids = torch.tensor([[5, 6, 7, 8], [9, 1, 2, 3]])
        inputs = flat_inputs(ids, torch.ones_like(ids), empty_state(whole.config, 2))
        difference = float((load_artifact(own)(inputs)[0] - whole(ids).logits).abs().max())
        ranks = Ranks(rank=dist.get_rank(), size=dist.get_world_size())
        engines = open_engine("aoti", None, own), open_engine("eager", whole, None)
        tokens = [
            Generator(each, ranks=group).complete([REQUEST])[0].tokens
            for each, group in zip(engines, (ranks, Ranks()), strict=True)
        ]
        try:
            ultramem.load(folder)
        except RuntimeError as error:
            refused = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    return difference, manifest.parity.allowed, tokens, refused


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux")
@pytest.mark.parametrize("placement", ["rows", pytest.param("columns", marks=pytest.mark.slow)])
def test_parts_compute_together_what_the_whole_does_and_none_holds_it(ranks, tmp_path, placement):
    run, out = tmp_path / "run", tmp_path / "parts"
    write_run(run)
    for difference, allowed, tokens, refused in ranks(2).run(
        export_within, run, out, placement, TABLE_BYTES * 31 // 32, timeout_s=540
    ):
        assert difference <= allowed < 1e-3
        assert tokens[0] == tokens[1]
        assert "Cannot allocate memory" in refused
    assert sorted(each.name for each in out.iterdir()) == ["rank-0-of-2", "rank-1-of-2"]
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []
    rows = SIDE * SIDE
    for rank in range(2):
        document = json.loads((out / f"rank-{rank}-of-2" / "manifest.json").read_text())
        cut, whole = [[0, rows // 2], [rows // 2, rows]][rank], [0, WIDTH]
        if placement == "columns":
            cut, whole = [0, rows], [[0, WIDTH // 2], [WIDTH // 2, WIDTH]][rank]
        assert document["shard"] == {
            "rank": rank,
            "ranks": 2,
            "placement": placement,
            "group": "0",
            "tables": {TABLE: {"rows": cut, "columns": whole, "of": [rows, WIDTH]}},
        }
        assert document["parity"]["max_error"] <= document["parity"]["allowed"]
        size = sum(file["bytes"] for file in document["files"].values())
        assert TABLE_BYTES // 2 < size < TABLE_BYTES * 5 // 8
    with pytest.raises(ValueError, match=r"is the part of rank 1 of 2: it runs in that rank .*, got none"):
        load_artifact(out / "rank-1-of-2")


def refusals(folder, out):
    shard = TableShard(placement="rows", mesh=init_device_mesh("cpu", (2,)), tokens="same")
    part, whole = ultramem.load(folder, shard=shard), ultramem.load(folder, mmap=True)
    found = []
    for to, options, own in (
        ("onnx", {}, shard),
        ("aoti", {"dtype": "bf16"}, shard),
        ("aoti", {}, replace(shard, tokens="own")),
    ):
        try:
            export_parts(part, whole, to, out, shard=own, options=ExportOptions(**options))
        except ValueError as error:
            found.append(str(error))

    def fail():
        if dist.get_rank() == 1:
            raise RuntimeError("no disk")

    try:
        _together(fail)
    except (ValueError, RuntimeError) as error:
        found.append(str(error))
    return found


def test_what_cannot_be_exported_in_parts_is_refused_on_all_ranks(ranks, tmp_path):
    config = FAMILIES["ultramem"]
    save_weights(build_model(config), tmp_path)
    write_config(tmp_path, config)
    out = tmp_path / "out"
    errors = ranks(2).run(refusals, tmp_path, out)
    for found in errors:
        assert found[:3] == [
            "a model in parts must be exported to aoti, which calls collectives from its graph, got 'onnx'",
            "dtype, table and device must be fp32, None and cpu for a model in parts, got bf16, None and cpu",
            "shard must be over all 2 ranks, which have the same tokens, got 2 ranks with their own tokens",
        ]
    assert [found[3] for found in errors] == ["rank 1 could not export its part: no disk", "no disk"]
    assert not out.exists()
