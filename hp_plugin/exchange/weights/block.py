"""The layers of one (virtual) pipeline stage as one: what they share, and which pass each of their modules works in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hp_plugin.exchange.kv_cache import cached_tokens
from hp_plugin.exchange.weights.choice import Choice
from hp_plugin.exchange.weights.gathering import Chain, in_backward
from hp_plugin.exchange.weights.share import Share, share_of
from hp_plugin.grid.groups import HeadDimGroups


@dataclass(frozen=True)
class Pass:
    """One micro-batch's way through a block.

    Args:
        s, b: the whole micro-batch.
        rows: positions that a rank holds of it between layers.
        share: this rank's share, where weights move; None where activations do, and every rank holds what stock's does.
    """

    s: int
    b: int
    rows: int
    share: Share | None

    @property
    def shape(self) -> tuple[int, int]:
        """Positions and samples of this rank between the ends of a block."""
        return (self.rows, self.b) if self.share is None else self.share.shape

    def own(self, states: Tensor) -> Tensor:
        """From what stock's rank holds to what this one works on."""
        return states if self.share is None else self.share.own(states)

    def whole(self, states: Tensor) -> Tensor:
        """The inverse of `own`."""
        return states if self.share is None else self.share.whole(states)


class Block:
    """What the layers of one block share: the chain of their weights, and what the running pass moves."""

    def __init__(self, groups: HeadDimGroups, config: TransformerConfig) -> None:
        self.groups = groups
        self.chain = Chain(groups.dim)
        self.choice = Choice(config)
        self.current: Pass | None = None
        self._sequence_parallel = config.sequence_parallel
        self._repeated: dict[StorageWeakRef, Pass] = {}

    def begin(self, s: int, b: int, training: bool, context: Any = None, **asked: Any) -> Pass:
        """A micro-batch enters, of b samples of s tokens, with what else `Choice.gathers` asks.

        `context` is Megatron-Core's inference context, if keys and values are cached.
        """
        gathers = self.choice.gathers(s, b, training, cache=cached_tokens(context, s), **asked)
        share = share_of(self.groups, s, b, self._sequence_parallel) if gathers else None
        rows = s // self.groups.grid.size if self._sequence_parallel else s
        self.current = Pass(s, b, rows, share)
        if not in_backward():
            self._repeated = {memory: one for memory, one in self._repeated.items() if not memory.expired()}
        self.chain.begin()
        return self.current

    def pass_of(self, states: Tensor, training: bool) -> Pass:
        """The pass in which a module is called with these states.

        Recompute calls modules in backward, when the latest pass may be another micro-batch's. It calls them with the
        very memory that forward had, which nothing else can have had since; what it computes from there follows.
        """
        if in_backward():
            self.current = self._repeated.get(StorageWeakRef(states.untyped_storage()), self.current)
        elif training and not torch.is_grad_enabled():
            self._repeated[StorageWeakRef(states.untyped_storage())] = self.current
        return self.current

    def gathers(self, states: Tensor, training: bool) -> bool:
        """Whether weights move in the pass in which a module is called; not for a layer that is called by itself."""
        passing: Pass | None = self.pass_of(states, training)
        return passing is not None and passing.share is not None


class BlockMaker:
    """Gives the layers that are built from one block spec their common block: a new one for every first layer."""

    def __init__(self) -> None:
        self._block: Block | None = None

    def block(self, groups: HeadDimGroups, config: TransformerConfig, first: bool) -> Block:
        """The block that is being built."""
        if first or self._block is None:
            self._block = Block(groups, config)
        return self._block
