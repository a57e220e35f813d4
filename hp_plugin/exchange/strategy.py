"""What an exchange strategy is: two maps between a rank's slices and what its attention works on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hp_plugin.exchange.rule import ExchangeRule
from hp_plugin.exchange.sizes import AttentionShape
from hp_plugin.grid.groups import HeadDimGroups


@dataclass(frozen=True)
class QKVLayout:
    """How one rank's QKV channels divide: `kv_groups` = g/m query groups of `queries` = h/g query heads each.

    `width` is the slice d/n; with `gate`, every group also has one gate slot per query head, behind its queries
    (Megatron-Core's attention output gate).
    """

    kv_groups: int
    queries: int
    width: int
    gate: bool = False

    @property
    def query_slots(self) -> int:
        """Slots per group that belong to queries: query heads and their gates."""
        return self.queries * (2 if self.gate else 1)

    @property
    def slots(self) -> int:
        """All slots of one rank: queries, gates, k and v of its g/m groups."""
        return self.kv_groups * (self.query_slots + 2)

    @property
    def heads(self) -> int:
        """Query heads of one rank, h/m."""
        return self.kv_groups * self.queries


class QKV(NamedTuple):
    """Queries, gates, keys and values, each `[tokens, b, heads, channels]`; gate is None without an output gate."""

    query: Tensor
    gate: Tensor | None
    key: Tensor
    value: Tensor


Angles = tuple[Tensor | None, Tensor | None]
"""Rotary angles `[s, 1 or b, 1, channels]` of queries and keys; None where nothing rotates."""


@dataclass(frozen=True)
class CoreSettings:
    """How a layer attends: causality, window (left, right), scale of the scores, and dropout of this call.

    `own_stream` says whether the random numbers in use are this rank's own already, as under sequence parallelism.
    """

    causal: bool
    window: tuple[int, int] | None
    scale: float
    dropout: float
    own_stream: bool = False


@dataclass
class Turn:
    """What one forward pass of one attention layer runs on; the layer and its three parts share this one slot.

    Args:
        exchange: the strategy that carries this micro-batch.
        angles: those that the exchange rotates by itself.
        caching: whether a key/value cache is in use.
    """

    exchange: Exchange
    angles: Angles = (None, None)
    caching: bool = False

    def begin(self, exchange: Exchange, angles: Angles, caching: bool) -> None:
        """The next micro-batch."""
        self.exchange, self.angles, self.caching = exchange, angles, caching

    def take_angles(self) -> Angles:
        """The exchange's own angles, which nothing holds any longer."""
        angles, self.angles = self.angles, (None, None)
        return angles


class Exchange:
    """A strategy for what the n ranks of a dim group send each other around one attention layer.

    A strategy is parameter-free and shared by the layer's column- and row-parallel linears. `rule` says what it
    needs of the shape, moves and keeps.
    """

    rule: ExchangeRule
    separates = False
    """Whether `to_heads` gives separate queries, keys and values, instead of what stock would split."""

    def __init__(self, groups: HeadDimGroups, layout: QKVLayout) -> None:
        self.groups = groups
        self.layout = layout
        self.n = groups.grid.n
        self.j = groups.coordinates[1]

    @property
    def name(self) -> str:
        """What flags and messages call it."""
        return self.rule.name

    @property
    def stock_group(self) -> ProcessGroup:
        """The ranks that stock's attention takes for its tensor-parallel group."""
        return self.groups.head

    def stock_config(self, config: TransformerConfig) -> TransformerConfig:
        """The model that stock's attention takes itself for."""
        return config

    @classmethod
    def can_take(cls, spec: Any, config: TransformerConfig) -> bool:
        """Whether a pass of layers of this spec can run under it, where others are to choose from."""
        return cls.rule.latent or not getattr(config, "multi_latent_attention", False)

    @classmethod
    def whole_layers(
        cls, spec: Any, config: TransformerConfig, vp_stage: int | None, mixed_in: Callable[..., Any]
    ) -> Any:
        """The layer, block or multi-token-prediction spec, where more than attention has to know of the exchange.

        `mixed_in(layer, stock, **params)` is the spec of `layer` over the class that the spec `stock` names.
        """
        return spec

    @classmethod
    def whole_model(cls, model: nn.Module) -> None:
        """Changes of a GPT model around its layers, once it is built; its parameters stay what they are."""

    @classmethod
    def rule_out(cls, model: nn.Module) -> None:
        """From now on no pass of this model is to take it, where there are others to choose from."""

    def at(self, shape: AttentionShape) -> Exchange:
        """What carries a micro-batch of this shape: itself, or a variant of it."""
        return self

    def with_cache(self, context: Any, layer: int, shape: AttentionShape) -> Exchange:
        """What carries a pass of this shape beside a static-batching context: itself, or a variant for this pass."""
        return self

    def stock_cache(self, context: Any, layer: int, key: Tensor) -> Any:
        """The static-batching context as stock's attention may see it, or None if it has nothing to cache.

        `key` is `[tokens, sequences, g/m, d]` of this pass; the memory of the layer is to be this rank's part of it.
        """
        return context

    def parallel_linear(self, layer: type, slots: int, chosen: bool = False) -> tuple[type, dict[str, Any]]:
        """What stands for a parallel layer, of whose sharded axis a rank has `slots` heads, and its parameters.

        `chosen` says whether passes are to choose, and some may run under another exchange.
        """
        return layer, {}

    def to_heads(self, mixed: Tensor) -> Tensor | QKV:
        """From the column-parallel output, `[s, b, slots · d/n]`, to what this rank's attention works on."""
        raise NotImplementedError

    def of_all_tokens(self, states: Tensor) -> Tensor:
        """Keys or values of whole heads, `[s or its share, ..]`, of all tokens that this rank's queries may see."""
        return states

    def to_slices(self, context: Tensor) -> Tensor:
        """From this rank's attention output to the row-parallel input, `[s, b, h/m · d/n]`."""
        raise NotImplementedError

    def mask_share(self, mask: Tensor | None) -> Tensor | None:
        """This rank's share of an attention mask or bias `[b or 1, heads or 1, s or 1, s]`."""
        return mask

    def split_angles(self, angles: Angles, config: TransformerConfig) -> tuple[Angles, Angles]:
        """The angles that stock rotates by, and those that `rotated` is given, each of this rank's share."""
        return angles, (None, None)

    def normed(self, norm: nn.Module, states: Tensor) -> Tensor:
        """A norm over whole heads of queries or keys."""
        return norm(states)

    def rotated(self, query: Tensor, key: Tensor, angles: Angles, config: TransformerConfig) -> tuple[Tensor, Tensor]:
        """Queries and keys, rotated where stock cannot."""
        return query, key

    def attends(self, query: Tensor, key: Tensor, caching: bool) -> bool:
        """Whether these are for its own inner attention; by shape, as recompute calls when the turn is another's."""
        return False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: CoreSettings) -> Tensor:
        """Its own inner attention, to what `to_slices` takes."""
        raise NotImplementedError
