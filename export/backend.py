"""What an engine says of itself to be exported to; each engine's module ends with its `BACKEND`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ultramem.config import ModelConfig
from ultramem.export.options import DTYPES, TABLE_BITS, ExportOptions
from ultramem.export.program import PassRecord
from ultramem.export.run_facts import RunFacts
from ultramem.graph.transformer import Transformer

Run = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """An engine: its files, and how they are written, read and used."""

    name: str
    files: tuple[str, ...]
    """All that may stand in its folder beside the manifest; the first always does."""
    write: Callable[[Transformer, ExportOptions, Path], tuple[PassRecord, ...]]
    """Write a model in eval mode, whose weights are already of the types of the options, to a folder."""
    load: Callable[[Path, ModelConfig, ExportOptions, bool | None], Run]
    """The model of a folder whose files were verified, as a function of its inputs in order. The flag: with kernels of
    this package's plugin library (True), without (False), with them where they are built (None)."""
    how_to_load: Callable[[ExportOptions, frozenset[str]], tuple[str, ...]]
    """Four lines for a user, given the options and the names of the files that were written."""
    dtypes: tuple[str, ...] = tuple(DTYPES)
    tables: tuple[str, ...] = tuple(TABLE_BITS)
    devices: tuple[str, ...] = ("cpu",)
    lacks: Mapping[str, str] = field(default_factory=dict)
    """Why a type is not there, for those that users ask for."""
    describe: Callable[[Path, ModelConfig, ExportOptions, RunFacts | None], None] | None = None
    """Write what the folder says of the run, after `write`; None: nothing."""
    has_graph: bool = True
    """Whether sizes can be fixed."""
    has_coarse_keys: bool = False
    """Its graphs for a CPU may choose candidates by coarse keys."""
    decode_beside: bool = False
    """With `decode`, the general graph is there as well."""
    builds_for_ranges: bool = False
    """It is built for ranges of sizes, with our kernels or without."""

    def check(self, options: ExportOptions) -> None:
        """Raise unless the engine has the types of the options.

        Raises:
            ValueError: it has not; the message names what it has.
        """
        for name, value, accepted in (
            ("dtype", options.dtype, self.dtypes),
            ("table", options.table or "None", ("None", *self.tables)),
            ("device", options.device, self.devices),
        ):
            if value not in accepted:
                why = f" ({self.lacks[value]})" if value in self.lacks else ""
                raise ValueError(f"{name} must be one of {', '.join(accepted)} for {self.name}, got {value!r}{why}")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be cpu where there is no CUDA device, got 'cuda'")
        if not self.has_graph and (options.static is not None or options.decode):
            chosen = "decode" if options.static is None else f"static {options.static}"
            raise ValueError(f"static and decode must be left out for {self.name}, which has no graph, got {chosen}")
        if options.coarse_keys and not (self.has_coarse_keys and options.device == "cpu"):
            raise ValueError(f"coarse_keys must be None or False for {self.name} on {options.device}, got True")
        for option, given in (("sizes", options.sizes), ("kernels", options.kernels)):
            if given is not None and not self.builds_for_ranges:
                raise ValueError(f"{option} must be None for {self.name}, got {given!r} (it is for tensorrt)")

    def seq(self, options: ExportOptions) -> int | None:
        """The only number of new tokens that the folder's graphs take; None: any."""
        if options.decode and self.decode_beside:
            return None if options.static is None else options.static[1]
        return options.seq
