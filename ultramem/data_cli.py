"""The `ultramem data` commands: texts to download, and text to tokenise once."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CORPORA = ("gutenberg",)


def add_data_commands(parser: argparse.ArgumentParser, finish: Callable[[argparse.ArgumentParser, Any], None]) -> None:
    """Add `get` and `prepare` below `ultramem data`; `finish` adds what all commands have, and what runs them."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=type(parser))

    help_text = "Download a public-domain corpus, once."
    sub = actions.add_parser("get", help=help_text, description=help_text)
    sub.add_argument("name", choices=CORPORA, metavar="NAME", help=", ".join(CORPORA))
    sub.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: in ~/.cache/ultramem)")
    finish(sub, _get)

    help_text = "Tokenise text once, into memory-mapped shards; run it again to go on after a stop."
    sub = actions.add_parser("prepare", help=help_text, description=help_text)
    sub.add_argument(
        "data", metavar="PATH", help="austen, gutenberg, a text, JSONL or Parquet file, a folder, or a dataset on disk"
    )
    sub.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    sub.add_argument(
        "--tokenizer", metavar="T", help="bytes, bpe (trained on the text), or a tokenizer.json (default: bytes)"
    )
    sub.add_argument("--vocab-size", type=int, metavar="N", help="of a bpe (default: 8192)")
    sub.add_argument("--text-field", metavar="F", help="field or column with the text (default: text)")
    sub.add_argument("--held-out", type=float, metavar="X", help="share that is not trained on (default: 0.05)")
    sub.add_argument("--shard-tokens", type=int, metavar="N", help="tokens per shard (default: 16777216)")
    sub.add_argument("--out-of-domain", metavar="PATH", help="other text, to evaluate on alone")
    finish(sub, _prepare)


def _get(args: argparse.Namespace) -> dict[str, Any]:
    from ultramem.runtime.data.gutenberg import get_gutenberg, gutenberg_folder

    folder = gutenberg_folder() if args.out is None else args.out
    downloaded = get_gutenberg(args.out)
    if not args.json:
        use = f"--data {args.name if args.out is None else folder}"
        print(f"{folder}: {'downloaded' if downloaded else 'is there already'}; use it with {use}")
    return {"name": args.name, "folder": str(folder), "downloaded": downloaded}


def _prepare(args: argparse.Namespace) -> dict[str, Any]:
    from ultramem.runtime.data.prepare import PrepareConfig, prepare
    from ultramem.runtime.data.progress import PrepareProgress

    names = ("tokenizer", "vocab_size", "text_field", "held_out", "shard_tokens")
    config = PrepareConfig(**{name: value for name in names if (value := getattr(args, name)) is not None})
    began = time.perf_counter()
    with PrepareProgress() as progress:
        manifest = prepare(args.data, args.out, config, out_of_domain=args.out_of_domain, progress=progress)
    summary: dict[str, Any] = {
        "data": str(args.out),
        "sha256": manifest["sha256"],
        "vocab_size": manifest["tokenizer"]["vocab_size"],
        "seconds": round(time.perf_counter() - began, 3),
    }
    for name, split in manifest["splits"].items():
        summary[name] = {key: split[key] for key in ("documents", "tokens", "bytes")}
        summary[name]["shards"] = len(split["shards"])
        if not args.json:
            print(
                f"{name:<14}{split['documents']:>10,} documents {split['tokens']:>14,} tokens "
                f"{split['bytes']:>14,} bytes {len(split['shards']):>6,} shards"
            )
    if not args.json:
        print(f"{args.out}: use it with --data {args.out}")
    return summary
