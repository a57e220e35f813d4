"""Stock self-attention on an m × n head × dimension grid.

Letters: s sequence, b micro-batch, D hidden size; h query heads, g key/value heads (query groups), d head dimension;
m × n the grid, P = m · n the TP size, (i, j) a rank's head group and dim slice. The *head axis* has size m, the *dim
axis* size n; collectives say which of them they span.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hp_plugin.attention.core_attention import HeadDimCoreAttention
from hp_plugin.attention.layers import HeadDimColumnParallelLinear, HeadDimRowParallelLinear, submodule_spec
from hp_plugin.attention.on_grid import GridAttention, groups_of, stock_collection
from hp_plugin.attention.transformer_config import check_supported
from hp_plugin.checkpoint.weight_fence import fence_weights
from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.kv_cache import cached_tokens, check_room
from hp_plugin.exchange.masks import document_numbers, document_positions
from hp_plugin.exchange.rules import RULES, candidates, resolve, traded
from hp_plugin.exchange.shapes import attention_shape
from hp_plugin.exchange.sizes import AttentionShape
from hp_plugin.exchange.strategies import STRATEGIES
from hp_plugin.exchange.strategy import Angles, Exchange, QKVLayout, Turn
from hp_plugin.grid.ownership import proj_columns, qkv_rows


class HeadDimSelfAttention(GridAttention, SelfAttention):
    """`SelfAttention` whose heads are split over the head axis and whose head dimension is split over the dim axis.

    The stock class runs on the head group, with full heads of this rank's share of the work (`batch`, `sequence`) or
    with slices of every head (`scores`). Parameters, checkpoint keys and local shapes are those of stock at TP = P.

    Args:
        config: a `HeadDimTransformerConfig`, or any `TransformerConfig` with a `head_dim_parallel`.
        pg_collection: process groups, with `head` and `dim` if they are not the registered ones.
        exchanges: those that the layer around can run; where it is a choice and nothing is said, weights lie still.

    Raises:
        ValueError: the model needs what the grid or its exchange cannot do.
        RuntimeError: no grid is registered, or it is not the config's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.padding,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        exchanges: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        head_dim: HeadDimConfig = config.head_dim_parallel
        groups = groups_of(head_dim, pg_collection)
        check_supported(config, head_dim)
        h, g, d = config.num_attention_heads, config.num_query_groups, config.kv_channels
        head_dim.check_heads(h, g, d)
        gate = getattr(config, "attention_output_gate", False)
        layout = QKVLayout(g // head_dim.m, h // g, d // head_dim.n, gate)
        rows = qkv_rows(h, g, d, head_dim.m, head_dim.n, gate)
        columns = proj_columns(h, d, head_dim.m, head_dim.n)
        names = exchanges or candidates(head_dim.exchange, head_dim.n, whole_layers=False)
        known = {name: STRATEGIES[name](groups, layout) for name in names}
        turn = Turn(next(iter(known.values())))
        # Linears that gather do without where they are not to.
        gathering = next((exchange for exchange in known.values() if exchange.rule.moves_weights), turn.exchange)
        column, for_column = gathering.parallel_linear(HeadDimColumnParallelLinear, layout.slots, head_dim.chooses)
        row, for_row = gathering.parallel_linear(HeadDimRowParallelLinear, layout.heads, head_dim.chooses)
        collection = copy.copy(pg_collection) if pg_collection is not None else stock_collection()
        collection.tp = turn.exchange.stock_group
        true_config, config = config, turn.exchange.stock_config(config)
        super().__init__(
            config,
            replace(
                submodules,
                linear_qkv=submodule_spec(
                    column,
                    submodules.linear_qkv,
                    **for_column,
                    groups=groups,
                    axis=rows,
                    turn=turn,
                ),
                core_attention=submodule_spec(
                    HeadDimCoreAttention, submodules.core_attention, exchanges=known.values(), turn=turn
                ),
                linear_proj=submodule_spec(
                    row,
                    submodules.linear_proj,
                    **for_row,
                    groups=groups,
                    axis=columns,
                    turn=turn,
                ),
            ),
            layer_number,
            attn_mask_type=attn_mask_type,
            cp_comm_type=cp_comm_type,
            pg_collection=collection,
            **kwargs,
        )
        fenced = {"linear_qkv.weight": (0, rows), "linear_qkv.bias": (0, rows), "linear_proj.weight": (1, columns)}
        fence_weights(self, fenced, groups.grid, *groups.coordinates)
        # Stock numbers replicas in checkpoints by it, and the QK-norms are replicated over all of the grid.
        self.tp_group = groups.tp
        self.head_dim = head_dim
        self.groups = groups
        self.true_config = true_config
        self._exchanges = known
        self._turn = turn

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        inference_context: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As stock: `[s, b, D]` (`[s/P, b, D]` with sequence parallelism) to the same, and the bias.

        Raises:
            ValueError: this micro-batch, sequence or argument is nothing the exchange can carry.
        """
        if self.head_dim.n == 1:
            return super().forward(
                hidden_states,
                attention_mask,
                *args,
                rotary_pos_emb=rotary_pos_emb,
                attention_bias=attention_bias,
                packed_seq_params=packed_seq_params,
                inference_context=inference_context,
                **kwargs,
            )
        if self._rotates_nothing:
            rotary_pos_emb = None
        angles = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb,) * 2
        if packed_seq_params is not None:
            attention_mask, angles = self._by_document(packed_seq_params, angles)
        exchange = self._pick(hidden_states, angles[0], attention_bias is not None, inference_context)
        stock, own = exchange.split_angles(angles, self.config)
        self._turn.begin(exchange, own, caching=inference_context is not None)
        return super().forward(
            hidden_states,
            exchange.mask_share(attention_mask),
            *args,
            rotary_pos_emb=None if stock == (None, None) else stock,
            attention_bias=exchange.mask_share(attention_bias),
            inference_context=inference_context,
            **kwargs,
        )

    def _adjust_key_value_for_inference(
        self, inference_context: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """As stock, with this rank's part of the cache; an exchange that attends to its own leaves stock none."""
        if inference_context is not None:
            inference_context = self._turn.exchange.stock_cache(inference_context, self.layer_number, key)
        return super()._adjust_key_value_for_inference(inference_context, query, key, *args, **kwargs)

    def _by_document(self, packed: Any, angles: Angles) -> tuple[Tensor, Angles]:
        """What stands for the mask of packed sequences, and each token's angles.

        Tokens are spread as those of one long sample, which sees its own document alone.
        """
        passing = self.passing
        if passing is None or passing.share is None or passing.b % self.head_dim.n == 0:
            h, g = self.true_config.num_attention_heads, self.true_config.num_query_groups
            moving = " or ".join(name for name, rule in RULES.items() if rule.moves_weights)
            raise ValueError(
                f"packed sequences cannot be split over the dim axis: {self.head_dim.without_slices(h, g)}, or pad, or "
                f"--head-dim-exchange {moving}, which takes one row of them"
            )
        padded = getattr(packed, "cu_seqlens_q_padded", None)
        if padded is not None and self.attn_mask_type != AttnMaskType.causal:
            raise ValueError("packed sequences with padding between them need causal attention on a grid")
        bounds = packed.cu_seqlens_q if padded is None else padded
        numbers = document_numbers(bounds, passing.s)
        places = document_positions(bounds, numbers)
        query, key = (None if one is None else one[places.clamp(max=len(one) - 1)] for one in angles)
        return numbers, (query, key)

    @property
    def _rotates_nothing(self) -> bool:
        """Whether stock exempts this layer from rotary positions, which exchanges that rotate must heed."""
        exempt = getattr(self.config, "no_rope_freq", None)
        return bool(exempt and exempt[self.layer_number - 1])

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As stock; an exchange whose column-parallel layer hands over separate tensors norms and rotates them."""
        exchange = self._turn.exchange
        if not exchange.separates:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        qkv, _ = self.linear_qkv(hidden_states)
        query, key = (
            states if norm is None or isinstance(norm, IdentityOp) else exchange.normed(norm, states)
            for norm, states in ((self.q_layernorm, qkv.query), (self.k_layernorm, qkv.key))
        )
        query, key = exchange.rotated(query, key, self._turn.take_angles(), self.config)
        return (query, key, qkv.value) if qkv.gate is None else (query, key, qkv.value, qkv.gate)

    def _pick(self, hidden_states: Tensor, angles: Tensor | None, biased: bool, inference_context: Any) -> Exchange:
        """The exchange that carries this micro-batch."""
        parts = self.groups.grid.size if self.config.sequence_parallel else 1
        s, b = hidden_states.shape[0] * parts, hidden_states.shape[1]
        gathered = False
        if self.passing is not None:
            s, b, gathered = self.passing.s, self.passing.b, self.passing.share is not None
        rotary = 0 if angles is None else angles.shape[-1]
        alone = ("add an attention bias",) if biased else ()
        shape = attention_shape(self.true_config, self.head_dim, b, s, rotary, alone)
        itemsize = self.true_config.params_dtype.itemsize
        if inference_context is None:
            return self._exchanges[_picked(self.head_dim, shape, gathered, self.training, itemsize)].at(shape)
        if not inference_context.is_static_batching():
            raise ValueError(
                f"dynamic batching lays tokens of all requests in one row, which cannot be split over n = "
                f"{self.head_dim.n} ranks: use static batching (StaticInferenceContext)"
            )
        check_room(inference_context, s, b)
        shape = replace(shape, cache=cached_tokens(inference_context, s))
        # What a cache holds is spread as the first that fits spreads it, and alike where weights are gathered.
        exchange = self._exchanges[_picked(self.head_dim, shape, gathered, None, itemsize)].at(shape)
        return exchange.with_cache(inference_context, self.layer_number, shape)


@lru_cache(maxsize=64)
def _picked(
    head_dim: HeadDimConfig, shape: AttentionShape, gathered: bool, training: bool | None, itemsize: int
) -> str:
    """The exchange of a pass whose weights are `gathered` or not; None for training: without counting."""
    if gathered:
        moving = [name for name in candidates(head_dim.exchange, head_dim.n) if RULES[name].moves_weights]
        return resolve(moving[0], shape)
    first = head_dim.check_shape(shape)
    return first if training is None else traded(head_dim.exchange, shape, training, itemsize)
