"""One rank's share of one micro-batch, in local sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from hp_plugin.exchange.rule import STOCK, ExchangeRule
from hp_plugin.exchange.rules import RULES, choose, with_shared_ends
from hp_plugin.exchange.sizes import AttentionShape, BlockShape, Cached, Inner
from hp_plugin.grid.ranks import DIM_INNERMOST
from hp_plugin.planner.counts.served_attention import AttentionData, served_rule
from hp_plugin.planner.counts.stages import RankParameters, Stage, build_stages, qkv_rows, stage_parameters
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.attention_rate import ANY_HEAD_DIM, FusedHeadDims
from hp_plugin.planner.machine.hardware import Hardware


@dataclass(frozen=True)
class Share:
    """Model, layout and workload, and what follows for one rank and micro-batch, worked out once.

    Args:
        fused_heads: the head dimensions that the machine's attention kernel takes; any, where no machine is meant.
        inside: whether this is what layers work on between the ends of a block, where weights move: the head group's
            n-th of the tokens. See `within`.
        left_open: whether the layers can move what the layout's exchange does not, since it was chosen for them.
    """

    model: ModelShape
    layout: Layout
    workload: Workload
    fused_heads: FusedHeadDims = ANY_HEAD_DIM
    inside: bool = False
    left_open: bool = False

    @classmethod
    def on(cls, hardware: Hardware, model: ModelShape, layout: Layout, workload: Workload) -> Share:
        """The share of a rank of this machine."""
        return cls(model, layout, workload, hardware.attention_kernel(layout.fused).head_dims)

    def recomputing(self, recompute: str) -> Share:
        """The same share under another choice of what backward computes again."""
        if recompute == self.layout.recompute:
            return self
        other = replace(self, layout=replace(self.layout, recompute=recompute))
        # Nothing else of what is worked out here depends on it.
        known = {name: value for name, value in self.__dict__.items() if name not in other.__dict__}
        known.pop("within", None)
        other.__dict__.update(known)
        return other

    @cached_property
    def within(self) -> Share:
        """What the layers of a block (of attention data parallelism: attention) work on.

        Itself, or, where weights move or attention's lie whole, this rank's share of the tokens.
        """
        return replace(self, inside=True) if self.rule.moves_weights or self.spreads_samples else self

    @cached_property
    def moved_ends(self) -> tuple[bool, bool]:
        """Whether embedding, and output layer and loss, work on this rank's share of the tokens as layers do."""
        # A dim group's parts of the vocabulary have to be neighbours.
        if not self.model.vocab or self.layout.order != DIM_INNERMOST or self.workload.mode == "decode":
            return False, False
        return self.rule.moves_ends(self.attention_shape, self.model.vocab, self.layout.sp and self.layout.tp > 1)

    @property
    def sums_replicas(self) -> bool:
        """Whether a step sums what a dim group's ranks all hold: where weights move or, left to choose, could have."""
        grid = self.layout.grid
        open_here = grid is not None and grid.chooses and grid.moves_weights and not self.layout.fused
        return self.layout.n > 1 and (self.rule.moves_weights or self.left_open or open_here)

    @property
    def spreads_samples(self) -> bool:
        """Whether attention works on a share of the samples, and all else on all of them."""
        return isinstance(self.rule, AttentionData)

    @property
    def P(self) -> int:
        """Ranks over which the linears are split: the tensor-parallel size, or, inside, that of the head axis."""
        return self.layout.m if self.inside else self.layout.tp

    @property
    def axis(self) -> str:
        """The group of these ranks."""
        return "head" if self.inside else "tp"

    @property
    def e(self) -> int:
        """Bytes of an element."""
        return self.workload.itemsize

    @property
    def b(self) -> int:
        """Sequences in a micro-batch; inside, all of them where their tokens are spread."""
        return self.inner.samples if self.inside else self.layout.micro_batch

    @cached_property
    def s(self) -> int:
        """Positions of each sequence that this rank's context-parallel share computes; inside, of its share."""
        return self.inner.queries if self.inside else self.workload.new_tokens_per_sequence // self.layout.cp

    @cached_property
    def micro_batches(self) -> int:
        """Micro-batches of one step."""
        return self.workload.global_batch // (self.layout.dp * self.layout.micro_batch)

    @cached_property
    def stages(self) -> list[Stage]:
        """The virtual pipeline stages, in order; not to be changed by the caller."""
        return build_stages(self.model, self.layout)

    @cached_property
    def parameters(self) -> list[RankParameters]:
        """Parameters of every virtual stage on one rank; not to be changed by the caller."""
        found = {stage: stage_parameters(self.model, self.layout, stage) for stage in set(self.stages)}
        return [found[stage] for stage in self.stages]

    @cached_property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one context-parallel rank."""
        return self.b * self.s

    @property
    def sp(self) -> bool:
        """Whether sequence parallelism is on and there is something to shard."""
        return self.layout.sp and self.P > 1

    @cached_property
    def hidden_bytes(self) -> float:
        """Bytes of one [s, b, D] activation."""
        return float(self.tokens * self.model.D * self.e)

    @cached_property
    def between_bytes(self) -> float:
        """Bytes of the activation between layers on one rank: a P-th with sequence parallelism."""
        return self.hidden_bytes / (self.P if self.sp else 1)

    @property
    def heads(self) -> int:
        """Query heads one rank holds in core attention (whole or, under `scores`, slices)."""
        return self.model.h // self.layout.m

    @property
    def groups(self) -> int:
        """Key/value heads one rank works on; stock ranks beyond g share one."""
        return max(1, self.model.g // self.layout.m)

    @property
    def gathers_qkv(self) -> bool:
        """Whether stock attention has fewer key/value heads than ranks and gathers QKV over the TP group."""
        return self.layout.grid is None and self.layout.shared == 1 and self.model.g < self.P

    @property
    def qkv_rows(self) -> int:
        """Rows of one rank's QKV weight."""
        return qkv_rows(self.model, self.layout) if self.layout.shared > 1 else self._qkv // self.P

    @property
    def _qkv(self) -> int:
        return (self.model.h + 2 * self.model.g) * self.model.d

    @cached_property
    def qkv_bytes(self) -> float:
        """Bytes of one rank's part of the QKV projection's output."""
        rows = self.qkv_rows if self.layout.shared > 1 else self._qkv / self.P
        return rows * self.tokens * self.e

    @cached_property
    def context_bytes(self) -> float:
        """Bytes of one rank's part of the attention output."""
        return self.model.h * self.model.d / self.P * self.tokens * self.e

    @cached_property
    def attention_shape(self) -> AttentionShape:
        """The layer as the exchange rules see it (on a 1-slice grid of TP heads without a grid)."""
        model = self.model
        return AttentionShape(
            s=self.workload.new_tokens_per_sequence // self.layout.cp,
            b=self.layout.micro_batch,
            h=model.h,
            g=model.g,
            d=model.d,
            m=self.layout.m,
            n=self.layout.n,
            rotary=round(model.d * model.rotary_percent) if model.rotary else 0,
            qk_norm=("LayerNorm" if model.norm_biases else "RMSNorm") if model.qk_norm else None,
            cache=self.workload.seq if self.workload.mode == "decode" else 0,
        )

    def block_shape(self, dense: int, moe: int) -> BlockShape:
        """Layers of a stage as the exchange rules see them."""
        model = self.model
        return BlockShape(
            self.attention_shape,
            model.D,
            model.ffn,
            dense,
            moe,
            model.gated,
            whole_tokens=self.layout.moe == "deepspeed",
            sequence_parallel=self.layout.sp and self.layout.tp > 1,
            qkv_bias=model.biases or model.qkv_bias,
            mlp_bias=model.biases or model.mlp_bias,
            recompute=self.layout.recompute == "full",
        )

    @cached_property
    def rule(self) -> ExchangeRule:
        """The facts of the exchange that runs; stock's where there is nothing to exchange (no grid, or n = 1).

        Raises:
            RefusedError: the grid's exchange cannot carry this shape.
        """
        grid = self.layout.grid
        if grid is None or not self.layout.exchange:
            return served_rule(self.layout) or STOCK
        # Whether a sequence suits an exchange is asked of all of it, whatever context parallelism leaves of it.
        first = grid.check_shape(replace(self.attention_shape, s=self.workload.new_tokens_per_sequence))
        if not grid.chooses or self.workload.mode == "decode":
            return RULES[first]
        # Transformer Engine's layers, which fused kernels are, have no place where gathered weights could come in.
        return RULES[self.chosen(own_linears=not self.layout.fused)]

    def chosen(self, own_linears: bool) -> str:
        """What the grid's exchange comes to where it is left open, by counting the bytes of a pass.

        Args:
            own_linears: whether the layers' linears are Megatron-Core's own, which can gather their weights.

        Raises:
            RefusedError: nothing can carry this shape.
        """
        grid, model, layout = self.layout.grid, self.model, self.layout
        assert grid is not None, "only a grid has exchanges"
        block = self.block_shape(model.layers - model.moe_layers, model.moe_layers)
        block = replace(block, blocks=layout.stages)
        if own_linears and grid.order == DIM_INNERMOST:
            block = with_shared_ends(block, model.vocab)

        def able(rule: ExchangeRule) -> bool:
            whole = layout.cp == 1 or (rule.stock_core and not rule.moves_weights)
            return whole and (own_linears or not rule.moves_weights)

        return choose(grid.exchange, block, self.workload.training, self.e, able).name

    @cached_property
    def inner(self) -> Inner:
        """What inner attention sees."""
        return self.rule.inner(self.attention_shape)

    @cached_property
    def cached(self) -> Cached | None:
        """What one rank caches of one micro-batch in a layer; None where the exchange has no cache."""
        return self.rule.cached(self.attention_shape)

    @cached_property
    def fused_attention(self) -> bool:
        """Whether the machine has a fused kernel for inner attention's heads."""
        return self.fused_heads.include(self.inner.channels, self.workload.training)

    @property
    def keeps_scores(self) -> bool:
        """Whether inner attention holds all its scores: stock's does without a fused kernel, exchanges' own do not."""
        return self.rule.stock_core and not self.fused_attention
