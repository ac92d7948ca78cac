"""A pre-norm decoder with rotary positions, whose memory layers run beside the layers that they skip.

Shapes: B batch, S new tokens, P cached tokens, D hidden size, A attention heads, X head dim, W convolution width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # the name that everybody uses
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ultramem.config import ModelConfig
from ultramem.graph.init import init_linear, init_table
from ultramem.graph.memory_layer import UltraMemLayer
from ultramem.graph.moe import MoE, MoEOutput
from ultramem.graph.sharded_moe import ShardedMoE
from ultramem.graph.sharded_table import ShardedValueTable, make_table
from ultramem.graph.side_stream import SideStream
from ultramem.graph.static_cache import StaticCache
from ultramem.graph.table_shard import TableShard
from ultramem.ops import accumulation_dtype


class Cache(NamedTuple):
    """What decoding keeps: per layer keys and values [B,A,P,X], per memory layer the last inputs [B,D,W-1].

    There are no `convs` where memory layers have no convolution.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    convs: tuple[Tensor, ...]

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self.keys[0].shape[2]

    def append(self, layer: int, key_BASX: Tensor, value_BASX: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B,A,P+S,X] of a layer, with those of new tokens."""
        return torch.cat([self.keys[layer], key_BASX], dim=2), torch.cat([self.values[layer], value_BASX], dim=2)


class ModelOutput(NamedTuple):
    """`logits` [B,S,V] float; `cache` with the new tokens appended; `aux_loss`, a scalar, 0 outside training."""

    logits: Tensor
    cache: Cache
    aux_loss: Tensor


class Attention(nn.Module):
    """Multi-head causal attention with rotary positions."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        d = config.hidden_size
        self.index = index
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)

    def forward(
        self,
        hidden_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask_B1SP: Tensor | None,
        cache: Cache | StaticCache | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output [B,S,D] and the keys and values [B,A,P+S,X] of all tokens so far."""
        b, s, _ = hidden_BSD.shape
        query, key, value = self.qkv(hidden_BSD).view(b, s, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if cache is not None:
            key, value = cache.append(self.index, key, value)
        if isinstance(cache, StaticCache) and query.is_cuda:
            assert mask_B1SP is not None
            mixed = attend_one(query, key, value, mask_B1SP)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_B1SP, is_causal=mask_B1SP is None)
        return self.out(mixed.transpose(1, 2).flatten(2)), key, value


def attend_one(query_BA1X: Tensor, key_BAPX: Tensor, value_BAPX: Tensor, mask_B11P: Tensor) -> Tensor:
    """Scaled dot-product attention [B,A,1,X] of one query, for compilers on a GPU.

    The kernels of `F.scaled_dot_product_attention` that take a mask give a head to one multiprocessor, which alone goes
    through all columns. These sums are divided among many, and nothing of the size of [B,A,P,X] is written.
    """
    wide = accumulation_dtype(query_BA1X.dtype)
    score_BAP = (query_BA1X.to(wide) * key_BAPX.to(wide)).sum(-1) * query_BA1X.shape[-1] ** -0.5
    weight_BAP = score_BAP.masked_fill(~mask_B11P[:, 0], -torch.inf).softmax(-1)
    mixed_BA1X: Tensor = (weight_BAP.unsqueeze(-1) * value_BAPX.to(wide)).sum(-2, keepdim=True)
    return mixed_BA1X.to(query_BA1X.dtype)


def rotary_table(
    position_ids_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B,1,S,X/2] of the rotary angles (RoFormer, eq 34)."""
    exponent = torch.arange(0, head_dim, 2, device=position_ids_BS.device, dtype=dtype) / head_dim
    angle = position_ids_BS[:, None, :, None].to(dtype) * theta**-exponent
    return angle.cos(), angle.sin()


def rotate(x_BASX: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head against each other."""
    first, second = x_BASX.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BASX.dtype)


class MLP(nn.Module):
    """Non-gated GELU MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.inner_size, bias=False)
        self.down = nn.Linear(config.inner_size, config.hidden_size, bias=False)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        output: Tensor = self.down(F.gelu(self.up(hidden_BSD)))
        return output


def _make_mlp(config: ModelConfig, number: int, experts: TableShard | None) -> MLP | MoE | None:
    """What the 1-based layer `number` has beside attention; None where a memory layer stands in its place."""
    if number in config.layers_without_mlp:
        return None
    if config.moe is None:
        return MLP(config)
    sizes = config.moe, config.hidden_size, config.inner_size
    return MoE(*sizes) if experts is None else ShardedMoE(*sizes, experts)


class Block(nn.Module):
    """Attention, then MLP or experts, each behind its LayerNorm."""

    def __init__(self, config: ModelConfig, number: int, experts: TableShard | None) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.attention = Attention(config, number - 1)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.mlp = _make_mlp(config, number, experts)


class Transformer(nn.Module):
    """The decoder of `ModelConfig`.

    Attributes:
        recomputes: in training, what attention and MLPs made on the way is not kept but made again in the backward.
        side_stream: on which memory layers run beside the layers that they skip; None: before them.

    With a `shard`, this process holds a part of its value tables; with `experts`, some of the experts of a mixture.
    """

    def __init__(self, config: ModelConfig, shard: TableShard | None = None, experts: TableShard | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, number, experts) for number in range(1, config.num_layers + 1))
        shares = config.memory is not None and config.memory.table != "own"
        self.memories = nn.ModuleList(
            UltraMemLayer(config.memory, index=index, own_table=not shares, shard=shard)
            for index in range(len(config.parsed_insertions))
            if config.memory is not None
        )
        self.table = make_table(config.memory, shard) if config.memory is not None and shares else None
        self.norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.recomputes = False
        self.side_stream: SideStream | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew (memory layers drew theirs when they were made). Does nothing on the meta device."""
        if self.embedding.weight.is_meta:
            return
        layers = self.config.num_layers
        nn.init.normal_(self.embedding.weight, std=0.02)
        init_linear(self.head)
        for block in self.blocks:
            assert isinstance(block, Block)
            init_linear(block.attention.qkv)
            init_linear(block.attention.out, residual_layers=layers)
            if isinstance(block.mlp, MLP):
                init_linear(block.mlp.up)
                init_linear(block.mlp.down, residual_layers=layers)
            elif block.mlp is not None:
                block.mlp.reset_parameters(residual_layers=layers)
        if self.table is not None:
            init_table(self.table, [memory for memory in self.memories if isinstance(memory, UltraMemLayer)])

    def empty_cache(self, batch_size: int) -> Cache:
        """The cache before the first token: keys and values of length 0, convolutions of zeros."""
        config, weight = self.config, self.embedding.weight
        past = weight.new_zeros(batch_size, config.num_heads, 0, config.head_dim)
        conv = weight.new_zeros(batch_size, config.hidden_size, config.conv_length)
        return Cache((past,) * config.num_layers, (past,) * config.num_layers, (conv,) * config.num_convs)

    def forward(
        self,
        input_ids_BS: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> ModelOutput:
        """Logits of every new token.

        Args:
            input_ids_BS: new tokens [B,S], int64.
            attention_mask: [B,P+S], 1 for tokens, 0 for padding (cached positions included). None: no padding.
            position_ids: [B,S]; None counts the tokens of the mask, or continues after the cache.
            cache: of an earlier call; None for the first.
        """
        past_length = 0 if cache is None else cache.length
        mask = None  # plain causal attention
        if cache is not None or attention_mask is not None:
            mask = self._mask(input_ids_BS, attention_mask, past_length)
        if position_ids is None:
            position_ids = self._positions(input_ids_BS, attention_mask, past_length)
        token_BS1 = None if attention_mask is None else attention_mask[:, past_length:].unsqueeze(-1)
        hidden_BSD, state, aux_losses = self._layers(input_ids_BS, position_ids, mask, token_BS1, cache)
        logits_BSV = self.head(self.norm(hidden_BSD))  # here: traces of an export keep the lines of a forward alone
        aux_loss = logits_BSV.new_zeros((), dtype=accumulation_dtype(logits_BSV.dtype))
        if self.training:
            memory_losses = [memory.aux_loss() for memory in self.memories if isinstance(memory, UltraMemLayer)]
            aux_loss = sum([*aux_losses, *memory_losses], aux_loss)
        return ModelOutput(logits_BSV, Cache(*state), aux_loss)

    def decode_in_place(
        self, input_ids_B1: Tensor, attention_mask_BP: Tensor, position_ids_B1: Tensor, cache: StaticCache
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits [B,1,V] of one more token, whose key and value are written to the cache; and its new `convs`.

        Args:
            input_ids_B1: the new tokens, int64.
            attention_mask_BP: of the columns that are looked at: 1 for tokens, the new one included, 0 for padding and
                for columns that are not in use.
            position_ids_B1: of the new tokens.
            cache: with the column that the new tokens go to.
        """
        token_B11 = attention_mask_BP.index_select(1, cache.column_1).unsqueeze(-1)
        mask_B11P = cache.mask(attention_mask_BP)
        hidden_B1D, (_, _, convs), _ = self._layers(input_ids_B1, position_ids_B1, mask_B11P, token_B11, cache)
        return self.head(self.norm(hidden_B1D)), convs

    def _layers(
        self,
        input_ids_BS: Tensor,
        position_ids_BS: Tensor,
        mask: Tensor | None,
        token_BS1: Tensor | None,
        cache: Cache | StaticCache | None,
    ) -> tuple[Tensor, tuple[tuple[Tensor, ...], ...], list[Tensor]]:
        """Output [B,S,D]; keys, values and last inputs of convolutions; the balance losses of mixtures of experts."""
        wide = accumulation_dtype(self.embedding.weight.dtype)
        rotary = rotary_table(position_ids_BS, self.config.head_dim, self.config.rope_theta, wide)
        hidden_BSD = self.dropout(self.embedding(input_ids_BS))
        keys, values, convs, aux_losses = [], [], [], []
        waiting: dict[int, list[Callable[[], Tensor]]] = {}
        insertions = self.config.parsed_insertions
        for number, block in enumerate(self.blocks, start=1):
            assert isinstance(block, Block)
            attended, key, value = self._run(block.attention, block.attention_norm(hidden_BSD), rotary, mask, cache)
            keys.append(key)
            values.append(value)
            hidden_BSD = hidden_BSD + self.dropout(attended)
            mlp_input_BSD = block.mlp_norm(hidden_BSD)
            for index, (source, target) in enumerate(insertions):
                if source == number:
                    # Padding must look like "before the first token" to the convolution: zeros.
                    memory_input = mlp_input_BSD if token_BS1 is None else mlp_input_BSD * token_BS1
                    has_conv = self.config.num_convs > 0
                    past_conv = cache.convs[index] if cache is not None and has_conv else None
                    memory = self.memories[index]
                    assert isinstance(memory, UltraMemLayer)
                    waiting.setdefault(target, []).append(self._remember(memory, memory_input, past_conv))
                    if has_conv:
                        convs.append(memory.next_conv(memory_input, past_conv))
            if block.mlp is not None:
                output = self._run(block.mlp, mlp_input_BSD)
                if isinstance(output, MoEOutput):
                    aux_losses.append(output.balance_loss)
                    output = output.hidden_BSD
                hidden_BSD = hidden_BSD + self.dropout(output)
            for recall in waiting.pop(number, ()):
                hidden_BSD = hidden_BSD + self.dropout(recall())
        return hidden_BSD, (tuple(keys), tuple(values), tuple(convs)), aux_losses

    def _run(self, module: nn.Module, *args: Any) -> Any:
        if self.recomputes and self.training:
            return checkpoint(module, *args, use_reentrant=False)
        return module(*args)

    def _remember(
        self, memory: UltraMemLayer, hidden_BSD: Tensor, past_conv_BDW: Tensor | None
    ) -> Callable[[], Tensor]:
        """What gives the memory's output [B,S,D] later: rows of a sharded table travel meanwhile."""
        table = memory.table if self.table is None else self.table
        if isinstance(table, ShardedValueTable):
            begun = memory.begin(hidden_BSD, past_conv_BDW, table)
            return partial(memory.finish, begun, hidden_BSD, table)
        if self.side_stream is not None:
            remember = partial(memory, hidden_BSD, past_conv_BDW, table=self.table)
            return self.side_stream.begin(remember, hidden_BSD, past_conv_BDW)
        output_BSD = memory(hidden_BSD, past_conv_BDW, table=self.table)
        return lambda: output_BSD

    @staticmethod
    def _mask(input_ids_BS: Tensor, attention_mask: Tensor | None, past_length: int) -> Tensor:
        """[B or 1,1,S,P+S], True where a new token may look."""
        s = input_ids_BS.shape[1]
        new = torch.arange(s, device=input_ids_BS.device).unsqueeze(1) + past_length
        seen = torch.arange(past_length + s, device=input_ids_BS.device).unsqueeze(0)
        causal_11SP = (seen <= new)[None, None]
        if attention_mask is None:
            return causal_11SP
        # A padding token looks at itself, so that no row of the softmax is empty.
        return (causal_11SP & attention_mask.bool()[:, None, None, :]) | (seen == new)[None, None]

    @staticmethod
    def _positions(input_ids_BS: Tensor, attention_mask: Tensor | None, past_length: int) -> Tensor:
        if attention_mask is not None:
            return (attention_mask.long().cumsum(1) - 1).clamp_min(0)[:, past_length:]
        s = input_ids_BS.shape[1]
        return (torch.arange(s, device=input_ids_BS.device) + past_length).unsqueeze(0)


def build_model(
    config: ModelConfig,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    shard: TableShard | None = None,
    experts: TableShard | None = None,
) -> Transformer:
    """The model of `config` with fresh weights (none on the meta device).

    Args:
        config: a `ModelConfig`, as from `ultramem.preset`.
        device: where to build; None: the current default device, as under `torch.device("meta")`.
        dtype: of the weights; None: float32.
        shard: the part of the value tables that this process holds; None: all of them. No process ever makes a whole
            table, and together they have the numbers that one would have.
        experts: a shard by rows, over whose ranks the experts of mixtures are spread; None: all are here.

    Raises:
        TypeError: config is not a ModelConfig.
    """
    if not isinstance(config, ModelConfig):
        raise TypeError(f"config must be a ModelConfig (see ultramem.preset), got {type(config).__name__}")
    if device is None:
        model = Transformer(config, shard, experts)
    else:
        with torch.device(device):
            model = Transformer(config, shard, experts)
    return model if dtype is None else model.to(dtype)
