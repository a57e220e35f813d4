"""Stock linears that gather their weights, and stock transformer layers that work on this rank's share of the tokens.

Mixed into whatever classes the stock spec names. Parameters stay stock's shards of TP = P; only while a forward pass
runs whose weights move does stock believe that it has TP = m.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from hp_plugin.exchange.dropout_rng import DIM_PARALLEL_RNG, ensure_rng
from hp_plugin.exchange.replicas import mark_partial
from hp_plugin.exchange.weights.block import Block, BlockMaker
from hp_plugin.exchange.weights.gathering import LayerWeights
from hp_plugin.exchange.weights.shards import Shard
from hp_plugin.exchange.weights.whole_tokens import count_once
from hp_plugin.grid.groups import HeadDimGroups


class GatheringLinear:
    """A column- or row-parallel linear that runs on the weight of its head group, gathered from the dim group.

    Args:
        runs: the pieces in which the sharded axis interleaves with the peers' (see `Shard`).
        chosen: whether passes are to choose; without a layer around that gathers none gathers then.

    Raises:
        ValueError: the stock linear is none of Megatron-Core's own.
    """

    shard_axis: int
    sharded: tuple[str, ...]

    def __init__(self, *args: Any, runs: int, chosen: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.can_be(type(self)):
            raise ValueError(
                "exchange `weights` gathers for Megatron-Core's own linears only, not for those of "
                f"{type(self).__mro__[-2].__module__}: give --transformer-impl local, or another --head-dim-exchange"
            )
        self._runs, self._chosen = runs, chosen
        self._layer: LayerWeights | None = None
        self._gathers = True

    @staticmethod
    def can_be(linear: type) -> bool:
        """Whether a linear of this class has a place where the whole weight can come in."""
        return any("_forward_impl" in vars(base) for base in linear.__mro__ if base is not GatheringLinear)

    @classmethod
    def adopt(cls, linear: nn.Module, groups: HeadDimGroups, holder: nn.Module) -> None:
        """Makes a linear that is there already one of these, with the weight of `holder`, which may be the linear."""
        linear.__class__ = mixed(cls, type(linear))
        linear._groups, linear.shards = groups, {"weight": Shard(holder, "weight", cls.shard_axis, 1, groups.grid.n)}

    def cut(self, groups: HeadDimGroups) -> Iterator[Shard]:
        """Its parameters as shards over a dim group."""
        names = [name for name in self.sharded if getattr(self, name) is not None]
        self._groups = groups
        self.shards = {name: Shard(self, name, self.shard_axis, self._runs, groups.grid.n) for name in names}
        yield from self.shards.values()

    def gather_with(self, layer: LayerWeights, block: Block) -> None:
        """Joins the other linears of a layer, in one gather, in passes of this block whose weights move."""
        self._layer, self._block = layer, block
        # A fused kernel would add to the gradient of the gathered weight, which nobody keeps; and where it adds to a
        # shard's in other passes of a step, data parallelism takes it to have seen to all of them.
        self.gradient_accumulation_fusion = False

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self._layer is None and not self._chosen:
            raise RuntimeError("exchange `weights` gathers for whole layers: build the model from head_dim_spec")
        self._gathers = self._layer is not None and self._block.gathers(input_, self.training)
        if not self._gathers:
            return super().forward(input_, *args, **kwargs)
        with self._on_head_group():
            output, bias = super().forward(input_, *args, **kwargs)
            if bias is not None and "bias" in self.shards:
                bias = self._layer.whole(self.shards["bias"])
        return output, bias

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, bias: Tensor | None, **kwargs: Any) -> Tensor:
        if not self._gathers:
            return super()._forward_impl(*args, input=input, weight=weight, bias=bias, **kwargs)
        shard = self.shards["weight"]
        whole = self._layer.whole(shard)
        if bias is not None:
            bias = self._layer.whole(self.shards["bias"])
        with self._layer.forgotten(whole, shard):
            return super()._forward_impl(*args, input=input, weight=whole, bias=bias, **kwargs)

    @contextmanager
    def _on_head_group(self) -> Iterator[None]:
        """What stock's forward pass reads, as it would be at TP = m."""
        m = self._groups.grid.m
        changed: dict[str, Any] = {
            "tp_group": self._groups.head,
            "sequence_parallel": self.sequence_parallel and m > 1,
        }
        if hasattr(self, "allreduce_dgrad"):
            changed["allreduce_dgrad"] = self.allreduce_dgrad and m > 1
        kept = {name: getattr(self, name) for name in changed}
        vars(self).update(changed)
        try:
            yield
        finally:
            vars(self).update(kept)


class GatheringColumnLinear(GatheringLinear):
    """Column-parallel: rows of the weight, and of the bias, are sharded."""

    shard_axis = 0
    sharded = ("weight", "bias")


class GatheringRowLinear(GatheringLinear):
    """Row-parallel: columns of the weight are sharded, every rank holds all of the bias."""

    shard_axis = 1
    sharded = ("weight",)


class OnWholeTokens:
    """A module inside a layer that works on what stock's ranks hold, not on a share of it."""

    def work_in(self, block: Block) -> None:
        """The block whose share comes in and goes out."""
        self._block = block
        block.choice.whole_tokens = True

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        passing = self._block.pass_of(states, self.training)
        output, bias = super().forward(passing.whole(states), *args, **kwargs)
        return passing.own(output), bias


class WeightsTransformerLayer:
    """A transformer layer between the ends of a block: on this rank's share, `[s, b/n, D]` or `[s/n, b, D]`.

    With sequence parallelism a rank of its head group has an m-th of that sequence. The first layer of a block takes,
    and the last one returns, what stock's would. In passes whose activations move all of them do.

    Args:
        blocks: common to the layers of one block.
        first, last: whether this layer is an end of it.
    """

    def __init__(self, *args: Any, blocks: BlockMaker, first: bool, last: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        groups = HeadDimGroups.from_collection(kwargs.get("pg_collection"))
        self.block = blocks.block(groups, self.config, first)
        self.first, self.last = first, last
        linears = [module for module in self.modules() if isinstance(module, GatheringLinear)]
        shards = [shard for linear in linears for shard in linear.cut(groups)]
        recompute = self.config.recompute_granularity
        self._weights = self.block.chain.add(
            list(self.modules()),
            shards,
            recomputed=recompute == "full" or (recompute == "selective" and "mlp" in self.config.recompute_modules),
        )
        for linear in linears:
            linear.gather_with(self._weights, self.block)
        if isinstance(self.mlp, OnWholeTokens):
            self.mlp.work_in(self.block)
        elif not (self._gathers(self.mlp) or isinstance(self.mlp, (MoELayer, IdentityOp))):
            raise ValueError(
                f"exchange `weights` does not know what {type(self.mlp).__name__} makes of a share of the tokens: "
                "build the whole layer spec first, and pass it through head_dim_spec last"
            )
        self._mark_partial_gradients({id(shard.parameter) for shard in shards})

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        block = self.block
        if self.first:
            ranks = block.groups.grid.size if self.config.sequence_parallel else 1
            passing = block.begin(
                ranks * hidden_states.shape[0], hidden_states.shape[1], self.training, **_asked(kwargs)
            )
            block.pass_of(hidden_states, self.training)
            hidden_states = passing.own(hidden_states)
        else:
            passing = block.pass_of(hidden_states, self.training)
        if hidden_states.shape[:2] != passing.shape:
            raise RuntimeError(
                f"hidden states of {tuple(hidden_states.shape[:2])} are no share of {passing.b} samples of {passing.s} "
                "tokens: layers of a block work on one micro-batch, one after the other"
            )
        self.self_attention.passing = passing
        gathers = passing.share is not None
        if padding_mask is not None:
            kwargs["padding_mask"] = passing.share.own_padding(padding_mask) if gathers else padding_mask
        if gathers:
            self._weights.begin()
        with self._hidden_dropout() if gathers else nullcontext():
            output, context = super().forward(hidden_states, attention_mask, *args, **kwargs)
        return passing.whole(output) if self.last else output, context

    def _hidden_dropout(self) -> AbstractContextManager[Any]:
        """The random numbers of hidden states: alike in a head group, of their own on ranks with other tokens."""
        # With sequence parallelism all P ranks have tokens of their own, and the block has seen to it.
        if not self.training or not self.hidden_dropout or self.config.sequence_parallel:
            return nullcontext()
        ensure_rng(DIM_PARALLEL_RNG, self.block.groups.head)
        return get_cuda_rng_tracker().fork(DIM_PARALLEL_RNG)

    def _mark_partial_gradients(self, sharded: set[int]) -> None:
        """Marks what all ranks hold whole and stock does not sum over all P of them by itself."""
        stock_sums = self.config.sequence_parallel
        for name, parameter in self.named_parameters():
            if id(parameter) in sharded or (stock_sums and getattr(parameter, "sequence_parallel", False)):
                continue
            if self.config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name):
                continue
            if name.startswith("mlp.") and not self._gathers(self.mlp):
                continue
            mark_partial(parameter)
        for module in self.modules():
            count_once(module, self.block)

    @staticmethod
    def _gathers(module: nn.Module) -> bool:
        return any(isinstance(part, GatheringLinear) for part in module.modules())


def _asked(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a pass is, beside its shape, by the arguments of a layer."""
    angles = kwargs.get("rotary_pos_emb")
    angles = angles[0] if isinstance(angles, tuple) else angles
    biased = kwargs.get("attention_bias") is not None
    return {
        "rotary": 0 if angles is None else angles.shape[-1],
        "alone": ("add an attention bias",) if biased else (),
        "packed": kwargs.get("packed_seq_params") is not None,
        "context": inference_context(kwargs),
    }


def inference_context(given: Mapping[str, Any]) -> Any:
    """The context among what a model or a layer was called with, under its name or its earlier one; None: nothing is
    cached."""
    found = given.get("inference_context")
    return given.get("inference_params") if found is None else found


@cache
def mixed(mixin: type, base: type) -> type:
    """The class that is both."""
    return type(f"{mixin.__name__}Of{base.__name__}", (mixin, base), {"__doc__": mixin.__doc__, "__module__": __name__})
