"""A tiny model, engines that run it, and quick profiles of them."""

from __future__ import annotations

from typing import Any

import torch

import ultramem
from ultramem.config import MemoryConfig, ModelConfig
from ultramem.runtime.profile import Machine, Profile, profile

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    inner_size=80,
    num_heads=2,
    num_layers=3,
    dropout=0.0,
    memory=MemoryConfig(hidden_size=32, num_layers=3, value_dim=16, key_dim=12, knum=9, top_m=4),
    insertions="1:2/2:3",
)
MACHINE = Machine(
    device="a processor",
    cores=2,
    threads=1,
    last_level_cache_bytes=2**25,
    read_bytes_per_second=2e10,
    copy_bytes_per_second=1e10,
    gemm_flops_per_second=5e10,
    system="Linux",
    python="3.12",
    versions={"torch": "2.13"},
    cpu_flags="AVX2",
)


class Eager:
    name = "eager"

    def __init__(self, model: ultramem.Transformer) -> None:
        self.model = model

    def prefill(self, input_ids_BS: Any, attention_mask_BS: Any = None) -> tuple[Any, Any]:
        output = self.model(input_ids_BS, attention_mask=attention_mask_BS)
        return output.logits, output.cache

    def decode(self, input_ids_B1: Any, cache: Any, attention_mask: Any = None) -> tuple[Any, Any]:
        output = self.model(input_ids_B1, cache=cache, attention_mask=attention_mask)
        return output.logits, output.cache


class Wrong(Eager):
    """Right in prefill, wrong in one logit of the decode step."""

    name = "wrong"

    def decode(self, input_ids_B1: Any, cache: Any, attention_mask: Any = None) -> tuple[Any, Any]:
        logits, cache = super().decode(input_ids_B1, cache, attention_mask)
        logits[0, 0, 0] += 1e-3
        return logits, cache


class Nan(Eager):
    name = "nan"

    def prefill(self, input_ids_BS: Any, attention_mask_BS: Any = None) -> tuple[Any, Any]:
        logits, cache = super().prefill(input_ids_BS, attention_mask_BS)
        return logits * torch.nan, cache


def make_model(config: ModelConfig = CONFIG) -> ultramem.Transformer:
    torch.manual_seed(0)
    return ultramem.build_model(config).eval()


def make_profile(*engines: Any, **settings: Any) -> Profile:
    model = make_model()
    return profile(
        model,
        engines or [Eager(model)],
        name="tiny",
        **{
            "batches": (1, 3), "prompt_tokens": 7, "new_tokens": 4, "decode_steps": 12, "seconds_per_cell": 0.05,
            **settings,
        },
        machine=MACHINE,
    )  # fmt: skip
