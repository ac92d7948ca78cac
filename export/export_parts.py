"""An export of a model that no process has the whole of: every rank captures, compiles and writes its own part.

AOTInductor calls PyTorch's collectives as it calls any operator, so the graph of a rank is the model's with an
all-reduce or all-gather in each memory layer. ONNX has no operator that waits for other processes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from ultramem.export import manifest
from ultramem.export.aot_inductor import BACKEND
from ultramem.export.manifest import Manifest
from ultramem.export.options import ExportOptions
from ultramem.export.parity import measure_parity
from ultramem.export.shard_record import part_folder, record_of
from ultramem.export.signature import tensor_specs
from ultramem.graph.table_shard import TableShard
from ultramem.graph.transformer import Transformer

T = TypeVar("T")


def export_parts(
    part: Transformer,
    whole: Transformer,
    to: str,
    out_dir: str | os.PathLike[str],
    *,
    shard: TableShard,
    options: ExportOptions | None = None,
) -> Manifest:
    """Export this rank's part of a model; all ranks call it together, and run what they wrote together.

    Args:
        part: the model in parts, in eval mode, float32, on the CPU.
        whole: the same model with its weights mapped from their file (`load(mmap=True)`), which the parts are compared
            with: pages of a file, which no process holds.
        to: "aoti".
        out_dir: the folder to make, with a folder for each rank in it; all ranks see it.
        shard: of `part`: over all ranks, which have the same tokens.
        options: sizes; types are float32.

    Returns:
        The manifest of this rank, which stands in its folder as manifest.json.

    Raises:
        ValueError: an argument is not that, or the parts do not compute together what the whole does. All ranks raise
            it, and nothing is left behind.
        FileExistsError: out_dir exists.
    """
    options = options or ExportOptions()
    target = Path(out_dir)
    _check(to, options, shard, target)
    temporary = target.with_name(f".{target.name}.parts.tmp")
    folder = part_folder(temporary, shard.rank, shard.ranks)
    try:
        _together(lambda: _make(temporary, shard))
        folder.mkdir()
        passes = _together(lambda: BACKEND.write(part, options, folder))
        seq = BACKEND.seq(options)
        inputs, outputs = tensor_specs(part.config, options, seq=seq)
        files = {path.name: manifest.file_record(path) for path in sorted(folder.iterdir())}
        run = _together(lambda: BACKEND.load(folder, part.config, options, False))
        # Logits are the same on all ranks, and so is the verdict.
        parity = _together(lambda: measure_parity(whole, whole, options, run, seq=seq))
        written = Manifest(
            engine=to,
            options=options,
            model=part.config,
            weights_sha256=manifest.weights_sha256(whole),
            inputs=inputs,
            outputs=outputs,
            files=files,
            passes=passes,
            parity=parity,
            how_to_load=(
                f'import torch; torch.distributed.init_process_group("gloo")  # as rank {shard.rank} of {shard.ranks}',
                *BACKEND.how_to_load(options, frozenset(files))[1 if files.keys() == {"model.pt2"} else 0 :],
            ),
            versions=manifest.versions(),
            source_commit=manifest.source_commit(),
            shard=record_of(part, shard),
        )
        _together(lambda: manifest.write_manifest(folder, written))
        _together(lambda: temporary.rename(target) if shard.rank == 0 else None)
    finally:
        if shard.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
    return written


def _check(to: str, options: ExportOptions, shard: TableShard, target: Path) -> None:
    if to != BACKEND.name:
        raise ValueError(
            f"a model in parts must be exported to {BACKEND.name}, which calls collectives from its graph, got {to!r}"
        )
    BACKEND.check(options)
    if (options.dtype, options.table, options.device) != ("fp32", None, "cpu"):
        raise ValueError(
            f"dtype, table and device must be fp32, None and cpu for a model in parts, got {options.dtype}, "
            f"{options.table} and {options.device}"
        )
    if shard.tokens != "same" or shard.ranks != dist.get_world_size():
        raise ValueError(
            f"shard must be over all {dist.get_world_size()} ranks, which have the same tokens, got {shard.ranks} "
            f"ranks with their {shard.tokens} tokens"
        )
    if target.exists():
        raise FileExistsError(f"{target} exists: choose another folder")


def _make(temporary: Path, shard: TableShard) -> None:
    if shard.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was cut short
        temporary.mkdir(parents=True)


def _together(work: Callable[[], T]) -> T:
    """What `work` returns, once it has on all ranks; an error of one is raised on all."""
    error: Exception | None = None
    try:
        result = work()
    except Exception as raised:
        error = raised
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, None if error is None else str(error))
    if error is not None:
        raise error
    for rank, text in enumerate(found):
        if text is not None:
            raise ValueError(f"rank {rank} could not export its part: {text}")
    return result
