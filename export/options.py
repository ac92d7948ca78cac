"""What may be chosen of an export, the same for every engine; what one engine lacks is in `backends`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ultramem.config.fields import require_literals

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TABLE_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """Types and sizes of an exported model.

    Raises:
        ValueError: a field is out of range; the message names the field, the value and what is accepted.
    """

    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of weights, cache and logits."""
    table: Literal["int8", "int4"] | None = None
    """Rows of the value tables, with a float32 scale each; None: in `dtype`."""
    static: tuple[int, int] | None = None
    """(B, S): fixed batch and fixed number of new tokens, for engines that profit; the cache stays free. None: any."""
    decode: bool = False
    """A graph of exactly one new token. AOTInductor packages have it beside the general one, the other formats in its
    place."""

    device: Literal["cpu", "cuda"] = "cpu"
    """What native code is for (AOTInductor): this kind of CPU, or this kind of GPU, with the ops' Triton kernels."""

    coarse_keys: bool | None = None
    """Candidates are chosen by keys that are summed over the ranks (`ultramem.graph.coarse_keys`), where a layer can:
    True: in every graph; None: in graphs of one new token for a CPU, in layers of which the keys are large."""
    sizes: str | None = None
    """min:opt:max of the free sizes, "batch=1:4:8,seq=1:128:512,past=0:256:1024", for engines that are built for ranges
    (TensorRT); None: as the model allows."""
    kernels: Literal["plugin", "body"] | None = None
    """What runs the nodes of this package, for engines that decide it when they are built (TensorRT): our kernels, as
    None does too, or the nodes' bodies of standard operators."""

    def __post_init__(self) -> None:
        require_literals(self)
        if self.table not in (None, *TABLE_BITS):
            raise ValueError(f"table must be one of {', '.join(TABLE_BITS)} or None, got {self.table!r}")
        if self.kernels not in (None, "plugin", "body"):
            raise ValueError(f"kernels must be plugin, body or None, got {self.kernels!r}")
        if not isinstance(self.decode, bool):
            raise ValueError(f"decode must be True or False, got {self.decode!r}")
        if self.coarse_keys not in (True, False, None):
            raise ValueError(f"coarse_keys must be True, False or None, got {self.coarse_keys!r}")
        if self.static is None:
            return
        sizes = self.static
        if not (isinstance(sizes, tuple) and len(sizes) == 2 and all(type(n) is int and n >= 1 for n in sizes)):
            raise ValueError(f"static must be (B, S), two numbers of at least 1, or None, got {sizes!r}")
        if self.decode and sizes[1] != 1:
            raise ValueError(f"static must have S = 1 (one new token) with decode, got {sizes!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def batch(self) -> int | None:
        """The fixed batch; None: any."""
        return None if self.static is None else self.static[0]

    @property
    def seq(self) -> int | None:
        """The fixed number of new tokens; None: any."""
        if self.decode:
            return 1
        return None if self.static is None else self.static[1]


def parse_static(text: str) -> tuple[int, int]:
    """Read "B,S".

    Raises:
        ValueError: it is not two numbers of at least 1.
    """
    words = text.split(",")
    if len(words) != 2 or not all(word.isascii() and word.isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"static must be B,S, two numbers of at least 1, got {text!r}")
    return int(words[0]), int(words[1])
