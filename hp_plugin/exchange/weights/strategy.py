"""`weights`: the linears have gathered what they need, and this rank has whole heads of its share already."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from hp_plugin.exchange.batch.strategy import BatchExchange
from hp_plugin.exchange.sequence.strategy import SequenceExchange
from hp_plugin.exchange.sizes import AttentionShape
from hp_plugin.exchange.strategy import QKV, CoreSettings, Exchange, QKVLayout
from hp_plugin.exchange.weights.ends import move_ends
from hp_plugin.exchange.weights.keys_values import gather_tokens
from hp_plugin.exchange.weights.layers import GatheringColumnLinear, GatheringRowLinear
from hp_plugin.exchange.weights.lying_still import keep_weights
from hp_plugin.exchange.weights.rule import WeightsRule
from hp_plugin.exchange.weights.specs import can_gather, gathering_spec
from hp_plugin.grid.groups import HeadDimGroups


class WeightsExchange(BatchExchange):
    """Nothing moves around attention; masks and angles are those of the samples that this rank has, as in `batch`."""

    rule = WeightsRule()

    def __init__(self, groups: HeadDimGroups, layout: QKVLayout) -> None:
        super().__init__(groups, layout)
        self._by_tokens = TokensExchange(groups, layout)

    @classmethod
    def can_take(cls, spec: Any, config: TransformerConfig) -> bool:
        """Layers of Megatron-Core's own linears, no switch that it cannot do, and stages that are known by now."""
        known = parallel_state.model_parallel_is_initialized()
        return known and not cls.rule.cannot(config) and can_gather(spec)

    @classmethod
    def whole_layers(
        cls, spec: Any, config: TransformerConfig, vp_stage: int | None, mixed_in: Callable[..., Any]
    ) -> Any:
        """Layers that gather and know whether they are the ends of a block."""
        return gathering_spec(spec, config, vp_stage, mixed_in)

    @classmethod
    def whole_model(cls, model: nn.Module) -> None:
        """Embedding and output layer on the share, where that moves less."""
        move_ends(model)

    @classmethod
    def rule_out(cls, model: nn.Module) -> None:
        """Activations move in every pass."""
        keep_weights(model)

    def at(self, shape: AttentionShape) -> Exchange:
        """Itself for b/n samples, or the variant for s/n tokens."""
        return self if shape.b % shape.n == 0 else self._by_tokens

    def parallel_linear(self, layer: type, slots: int, chosen: bool = False) -> tuple[type, dict[str, Any]]:
        """The layer that gathers its weight first."""
        return _gathering(layer), {"runs": slots, "chosen": chosen}

    def to_heads(self, mixed: Tensor) -> Tensor:
        """Whole heads of b/n samples as they are."""
        return mixed

    def to_slices(self, context: Tensor) -> Tensor:
        """Whole heads of b/n samples as they are."""
        return context

    def attends(self, query: Tensor, key: Tensor, caching: bool) -> bool:
        """Where the variant does; a cache has more keys than queries, too."""
        return not caching and self._by_tokens.attends(query, key, caching)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: CoreSettings) -> Tensor:
        """As the variant does."""
        return self._by_tokens.attend(query, key, value, mask, how)


class TokensExchange(SequenceExchange):
    """Whole heads of an early and a late chunk of queries, as in `sequence`; keys and values are gathered."""

    rule = WeightsRule()

    def to_heads(self, mixed: Tensor) -> QKV:
        """[s/n, b, slots · d] -> queries (and gates) [s/n, b, h/m, d], keys and values [s, b, g/m, d]."""
        layout = self.layout
        slots = mixed.unflatten(2, (layout.kv_groups, layout.query_slots + 2, -1))
        own, keys_values = slots.split([layout.query_slots, 2], dim=3)
        key, value = gather_tokens(keys_values, self.groups.dim).unbind(dim=3)
        query, gate = own[:, :, :, : layout.queries], own[:, :, :, layout.queries :]
        return QKV(query.flatten(2, 3), gate.flatten(2, 3) if layout.gate else None, key, value)

    def of_all_tokens(self, states: Tensor) -> Tensor:
        """[s/n, ..] -> [s, ..]."""
        return gather_tokens(states, self.groups.dim)

    def to_slices(self, context: Tensor) -> Tensor:
        """Whole heads of s/n tokens as they are."""
        return context


@cache
def _gathering(layer: type) -> type:
    mixin = GatheringColumnLinear if layer.shard_dim == GatheringColumnLinear.shard_axis else GatheringRowLinear
    return type(f"Gathering{layer.__name__}", (mixin, layer), {"__doc__": layer.__doc__, "__module__": __name__})
