"""A decoder with memory layers, for `transformers`: plain PyTorch, nothing of the package `ultramem`.

Memory layers are in memory_ultramem.py, the cache in cache_ultramem.py; all of these files stand beside the weights.
Losses that only training from scratch needs (balance of experts, singular values of cores) are not here.

Shapes: B batch, S new tokens, P cached and new tokens, D hidden size, A attention heads, X head dim, T = B*S tokens,
K experts per token.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # the name that everybody uses
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .cache_ultramem import UltraMemCache
from .configuration_ultramem import UltraMemConfig
from .memory_ultramem import MemoryLayer
from .selection_ultramem import Select
from .table_ultramem import make_table


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """Output [B,S,A,X] and weights [B,A,S,P]."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def rotary_table(position_ids_BS: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B,1,S,X/2] of the rotary angles, in float32."""
    exponent = torch.arange(0, head_dim, 2, device=position_ids_BS.device, dtype=torch.float32) / head_dim
    angle = position_ids_BS[:, None, :, None].float() * base**-exponent
    return angle.cos(), angle.sin()


def rotate(x_BASX: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head against each other."""
    first, second = x_BASX.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BASX.dtype)


class UltraMemAttention(nn.Module):
    """Multi-head causal attention with rotary positions."""

    def __init__(self, config: UltraMemConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_BSD: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Cache | None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        b, s, _ = hidden_BSD.shape
        query, key, value = self.qkv(hidden_BSD).view(b, s, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, weights = attention(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.out(mixed.reshape(b, s, -1)), weights


class UltraMemMLP(nn.Module):
    """Non-gated GELU MLP."""

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        output: Tensor = self.down(F.gelu(self.up(hidden_BSD)))
        return output


class UltraMemMoE(nn.Module):
    """Every token goes to its best experts, weighted by the softmax over the logits of the chosen; none is dropped."""

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__()
        assert config.moe is not None
        experts, d, inner = config.moe["num_experts"], config.hidden_size, config.intermediate_size
        self.experts_per_token = config.moe["experts_per_token"]
        self.router = nn.Linear(d, experts, bias=False)
        self.up_EDI = nn.Parameter(torch.empty(experts, d, inner))
        self.down_EID = nn.Parameter(torch.empty(experts, inner, d))

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        hidden_TD = hidden_BSD.flatten(0, 1)
        best_TK = self.router(hidden_TD).float().topk(self.experts_per_token, dim=1)
        gate_TK = best_TK.values.softmax(dim=1).to(hidden_TD.dtype)
        output_TKD = hidden_TD.new_zeros(*gate_TK.shape, hidden_TD.shape[1])
        for expert in range(self.up_EDI.shape[0]):
            token, choice = (best_TK.indices == expert).nonzero(as_tuple=True)
            inner = F.gelu(hidden_TD[token] @ self.up_EDI[expert])
            output_TKD = output_TKD.index_put((token, choice), inner @ self.down_EID[expert])
        mixed_BSD: Tensor = (output_TKD * gate_TK.unsqueeze(-1)).sum(dim=1).view(hidden_BSD.shape)
        return mixed_BSD


class UltraMemBlock(nn.Module):
    """Attention and MLP (or experts, or neither), each behind its norm; `UltraMemModel` runs them."""

    def __init__(self, config: UltraMemConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.attention = UltraMemAttention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, bias=False)
        replaced = config.replace_mlp and any(source == layer_idx + 1 for source, _ in config.parsed_insertions)
        self.mlp = None if replaced else UltraMemMLP(config) if config.moe is None else UltraMemMoE(config)


class UltraMemPreTrainedModel(PreTrainedModel):
    """What the library asks of every model."""

    config_class = UltraMemConfig
    base_model_prefix = "model"
    _no_split_modules = ["UltraMemBlock"]  # noqa: RUF012  # as the library declares it
    _supports_sdpa = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["scales_N", "expert_scales_N"]  # noqa: RUF012  # scales of quantised rows

    def _init_weights(self, module: nn.Module) -> None:
        """Starting values of weights that a checkpoint lacks; `ultramem` itself starts a training with better ones."""
        super()._init_weights(module)
        if isinstance(module, Select) and module.cores_HCRR is not None:
            init.uniform_(module.cores_HCRR)
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("keys_H2RNK", "values_NV", "experts_NP", "up_EDI", "down_EID"):
                init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            elif name == "block_bias_ED":
                init.zeros_(parameter)
            elif name == "conv_DW":  # the last tap is the token itself
                identity = torch.zeros_like(parameter)
                identity[:, -1] = 1
                init.copy_(parameter, identity)
            elif name == "weight" and type(module).__name__ == "Project":
                init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        for table in (buffer for name, buffer in module.named_buffers(recurse=False) if name == "address_table"):
            init.copy_(table, torch.randperm(table.numel()))


class UltraMemModel(UltraMemPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(UltraMemBlock(config, index) for index in range(config.num_hidden_layers))
        memory = config.memory_layer
        self.memories = nn.ModuleList(
            MemoryLayer(memory, index) for index in range(len(config.parsed_insertions)) if memory is not None
        )
        self.table = make_table(memory) if memory is not None and memory.table != "own" else None
        self.norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B,S,D] of new tokens; `attention_mask` [B,P] is 0 for padding, cached tokens included."""
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        embedded_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if cache is None and (config.use_cache if use_cache is None else use_cache):
            cache = UltraMemCache(config)
        past, s = 0 if cache is None else cache.get_seq_length(), embedded_BSD.shape[1]
        if position_ids is None:
            position_ids = _positions(attention_mask, past, s, embedded_BSD.device)
        mask = create_causal_mask(
            config=config,
            inputs_embeds=embedded_BSD,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
        )
        padding_BS1 = _padding(attention_mask, s) if any(config.conv_lengths) else None
        rotary = rotary_table(position_ids, config.head_dim, config.rope_base)
        keeps_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keeps_weights = config.output_attentions if output_attentions is None else output_attentions

        hidden_BSD = self.dropout(embedded_BSD)
        states, weights = [hidden_BSD], []
        waiting: dict[int, list[Tensor]] = {}
        for number, block in enumerate(self.layers, start=1):
            assert isinstance(block, UltraMemBlock)
            attended, attention_weights = block.attention(
                block.attention_norm(hidden_BSD), rotary, mask, cache, **kwargs
            )
            hidden_BSD = hidden_BSD + self.dropout(attended)
            mlp_input_BSD = block.mlp_norm(hidden_BSD)
            for target, output_BSD in self._read_memories(number, mlp_input_BSD, padding_BS1, cache):
                waiting.setdefault(target, []).append(output_BSD)
            if block.mlp is not None:
                hidden_BSD = hidden_BSD + self.dropout(block.mlp(mlp_input_BSD))
            for output_BSD in waiting.pop(number, ()):
                hidden_BSD = hidden_BSD + self.dropout(output_BSD)
            states.append(hidden_BSD)
            weights.append(attention_weights)
        last_BSD = self.norm(hidden_BSD)
        return BaseModelOutputWithPast(
            last_hidden_state=last_BSD,
            cache=cache,
            hidden_states=(*states[:-1], last_BSD) if keeps_states else None,
            attentions=tuple(weights) if keeps_weights else None,
        )

    def _read_memories(
        self, number: int, hidden_BSD: Tensor, padding_BS1: Tensor | None, cache: Cache | None
    ) -> list[tuple[int, Tensor]]:
        """(target, output) of the memory layers that read at the 1-based block `number`."""
        found = [(i, target) for i, (source, target) in enumerate(self.config.parsed_insertions) if source == number]
        if not found:
            return []
        length = self.config.conv_lengths[number - 1]
        inputs_BSD = hidden_BSD
        if length:
            if padding_BS1 is not None:  # padding must look like "before the first token" to the convolution
                inputs_BSD = inputs_BSD.masked_fill(padding_BS1, 0)
            if cache is None:
                inputs_BSD = F.pad(inputs_BSD, (0, 0, length, 0))
            elif isinstance(cache, UltraMemCache):
                inputs_BSD = cache.update_inputs(inputs_BSD, number - 1)
            else:
                kind = type(cache).__name__
                raise TypeError(f"cache must be an UltraMemCache, which keeps inputs of memory layers, got {kind}")
        s = hidden_BSD.shape[1]
        return [(target, self.memories[index](inputs_BSD, s, self.table)) for index, target in found]


def _positions(attention_mask: Tensor | None, past: int, s: int, device: torch.device) -> Tensor:
    """[B or 1,S]: tokens of the mask are counted, padding is not."""
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(1) - 1).clamp_min(0)[:, past : past + s]
    return torch.arange(past, past + s, device=device).unsqueeze(0)


def _padding(attention_mask: Tensor | None, s: int) -> Tensor | None:
    """[B,S,1], True for padding among the new tokens."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(f"attention_mask must be [batch, tokens], got shape {tuple(attention_mask.shape)}")
    return (attention_mask[:, attention_mask.shape[1] - s :] == 0).unsqueeze(-1)


class UltraMemForCausalLM(UltraMemPreTrainedModel, GenerationMixin):
    """The decoder with its head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  # as the library declares it

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__(config)
        self.model = UltraMemModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """Logits [B,S,V], or of the last `logits_to_keep` positions (or those of a tensor); loss with labels."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=output.cache,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """`generate` keeps an `UltraMemCache`; other kinds of cache would lose the inputs of the convolutions."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation must be None or 'dynamic' for this model, got {kind!r}")
        if model_kwargs.get("cache") is None and generation_config.use_cache is not False:
            model_kwargs["cache"] = UltraMemCache(self.config)
            if generation_config.is_assistant:
                model_kwargs["cache"].activate_past_recording()
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


__all__ = ["UltraMemForCausalLM", "UltraMemModel", "UltraMemPreTrainedModel"]
