"""`ultramem profile --figure`: the paper's figures, without a run or preset of one's own."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

FIGURES = ("1", "6", "7")
DEVICES = ("a100", "h100", "h200", "this")
_OURS = ("figure", "device", "conditions", "out", "json", "traceback")
_INTERNAL = ("command", "run", "figure_parser")


def add_figure_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of figures to the parser of `ultramem profile`."""
    parser.add_argument("--figure", choices=FIGURES, metavar="N", help="instead: figure 1, 6 or 7 of the paper")
    parser.add_argument(
        "--device",
        metavar="D",
        help="auto, cpu, cuda or cuda:N (default: auto, a GPU if there is one and the engines run there); of --figure: "
        f"{', '.join(DEVICES)} (default: this, which is measured too)",
    )
    parser.add_argument("--conditions", metavar="TEXT", help="of --figure: what else runs here, for the record")
    parser.set_defaults(figure_parser=parser)


def make_figure_of(args: argparse.Namespace) -> dict[str, Any]:
    """Make the figure that is asked for, write it, and return its document.

    Raises:
        ValueError: an option of a profile stands beside --figure.
        FileExistsError: the folder's name is taken by something else.
    """
    for name, value in vars(args).items():
        if name not in (*_OURS, *_INTERNAL) and value != args.figure_parser.get_default(name):
            accepted = ", ".join(f"--{each}" for each in _OURS[1:4])
            raise ValueError(f"{name} must not be given with --figure, which takes {accepted}, got {value!r}")
    if args.device is not None and args.device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)} with --figure, got {args.device!r}")
    if args.out.exists() and not args.out.is_dir():
        raise FileExistsError(f"out: {args.out} exists and is not a folder")
    from ultramem.graph.weights import write_atomically
    from ultramem.runtime.figures import make_figure, render_figure, to_json
    from ultramem.runtime.report import write_report

    figure = make_figure(
        int(args.figure),
        args.device or "this",
        conditions=args.conditions or "",
        progress=lambda message: print(message, file=sys.stderr, flush=True),
    )
    document = to_json(figure)
    json_path, page_path = (Path(args.out) / f"figure-{args.figure}.{end}" for end in ("json", "html"))
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(json_path, json.dumps(document, indent=1).encode() + b"\n")
    write_report(page_path, render_figure(document))
    if not args.json:
        for claim in document["claims"]:
            value = "none" if claim["value"] is None else f"{claim['value']:.3g}"
            print(f"{'holds' if claim['agrees'] else 'does not hold'}: {claim['paper']} ({claim['quantity']}: {value})")
        for check in (document["measured"] or {"checks": ()})["checks"]:
            predicted = "" if check["predicted"] is None else f", predicted {check['predicted']:.3g}"
            print(f"{'met' if check['met'] else 'not met'}: {check['name']}: {check['value']:.3g}{predicted}")
        print(f"{json_path} and {page_path}")
    return document


def refuse_without_figure(args: argparse.Namespace) -> None:
    """Check what only makes sense with, or only without, --figure.

    Raises:
        ValueError: an option of figures stands without --figure, or there is nothing to profile.
    """
    if args.conditions is not None:
        raise ValueError(f"conditions needs --figure {', '.join(FIGURES)}, got {args.conditions!r}")
    if args.device in DEVICES:
        raise ValueError(f"device needs --figure {', '.join(FIGURES)}, got {args.device!r}")
    if args.target is None:
        raise ValueError(f"target must be a run folder or a preset where --figure {', '.join(FIGURES)} is not given")
