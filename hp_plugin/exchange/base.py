"""What an exchange strategy is: two maps between a rank's slices and what its attention works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from hp_plugin.exchange_rules import RULES, ExchangeRule
from hp_plugin.groups import HeadDimGroups


@dataclass(frozen=True)
class QKVLayout:
    """How one rank's QKV channels divide: `groups` = g/m query groups of `queries` = h/g query heads each.

    `width` is the slice d/n; with `gate`, every group also has one gate slot per query head, behind its queries
    (Megatron-Core's attention output gate).
    """

    groups: int
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
        return self.groups * (self.query_slots + 2)

    @property
    def heads(self) -> int:
        """Query heads of one rank, h/m."""
        return self.groups * self.queries


class QKV(NamedTuple):
    """Queries, gates, keys and values, each `[tokens, b, heads, channels]`; gate is None without an output gate."""

    query: Tensor
    gate: Tensor | None
    key: Tensor
    value: Tensor


class Exchange:
    """A strategy for what the n ranks of a dim group send each other around one attention layer.

    A strategy is parameter-free and shared by the layer's column- and row-parallel linears. `rule` says what it
    moves, how much, and what it needs of the shape (`hp_plugin.exchange_rules`).
    """

    name: str

    def __init__(self, groups: HeadDimGroups, layout: QKVLayout) -> None:
        self.groups = groups
        self.layout = layout
        self.n = groups.grid.n
        self.j = groups.coordinates[1]

    @property
    def rule(self) -> ExchangeRule:
        """The strategy's entry on the torch-free floor."""
        return RULES[self.name]

    def to_heads(self, mixed: Tensor) -> Tensor | QKV:
        """From the column-parallel output, `[s, b, slots · d/n]`, to what this rank's attention works on."""
        raise NotImplementedError

    def to_slices(self, context: Tensor) -> Tensor:
        """From this rank's attention output to the row-parallel input, `[s, b, h/m · d/n]`."""
        raise NotImplementedError

    def mask_share(self, mask: Tensor | None) -> Tensor | None:
        """This rank's share of an attention mask or bias `[b or 1, heads or 1, s or 1, s]`."""
        return mask

    def rotary_share(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary angles `[s, 1 or b, 1, channels]` for (queries, keys) of this rank's share."""
        return embedding, embedding
