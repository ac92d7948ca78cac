"""`torchrun ... -m ultramem export`: each rank exports its part of a run."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ultramem.export import ExportOptions


def export_parts_of(args: argparse.Namespace, options: ExportOptions) -> dict[str, Any]:
    """The manifests of all ranks, by folder; on other ranks than the main one, the end of the process."""
    from torch.distributed.device_mesh import init_device_mesh

    from ultramem.export import export_parts
    from ultramem.export.shard_record import part_folder
    from ultramem.graph.weights import load, read_model_config
    from ultramem.runtime.distributed import LostRankError, require_agreement
    from ultramem.runtime.distributed.inference import inference_ranks

    config = read_model_config(args.run_folder)
    try:
        with inference_ranks(config, args.table_placement) as (ranks, shard, reason):
            assert shard is not None
            chosen = {name: value for name, value in vars(args).items() if name != "run"}
            require_agreement(ranks, {"arguments": str(chosen), "model": str(config)})
            if ranks.is_main:
                print(reason, file=sys.stderr)
            # The group of all ranks, whose name is the same wherever the artefact will run.
            shard = replace(shard, mesh=init_device_mesh("cpu", (ranks.size,)))
            part, whole = load(args.run_folder, shard=shard), load(args.run_folder, mmap=True)
            export_parts(part, whole, args.to, args.out, shard=shard, options=options)
    except LostRankError as error:
        print(f"ultramem export: lost another rank ({error})", file=sys.stderr)
        sys.exit(1)
    if not ranks.is_main:
        sys.exit(0)
    folders = [part_folder(args.out, rank, ranks.size) for rank in range(ranks.size)]
    documents = {each.name: json.loads((each / "manifest.json").read_text()) for each in folders}
    if not args.json:
        from ultramem.export.manifest import read_manifest

        for each in folders:
            print(f"{each}: {read_manifest(each)}")
    return {"out": str(args.out), "parts": documents}
