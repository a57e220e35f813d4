"""`local`: every slice is a head of its own (the source experiments' literal method; another function)."""

from __future__ import annotations

import copy
import warnings
from functools import cache

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from hp_plugin.exchange.local.rule import LocalRule
from hp_plugin.exchange.strategy import Angles, Exchange


class LocalExchange(Exchange):
    """Nothing moves: each slice runs its own softmax, scaled by its own width.

    The result is attention with h · n heads and g · n query groups of d/n channels, not the model's own.
    """

    rule = LocalRule()

    @property
    def stock_group(self) -> ProcessGroup:
        """The literal method is stock attention with more and narrower heads, on the whole TP group."""
        return self.groups.tp

    def stock_config(self, config: TransformerConfig) -> TransformerConfig:
        """h · n heads and g · n groups of d/n channels; warns once per shape that this is another function."""
        h, g, d = config.num_attention_heads, config.num_query_groups, config.kv_channels
        _warn_another_function(self.n, h, g, d)
        config = copy.copy(config)
        config.num_attention_heads, config.num_query_groups, config.kv_channels = h * self.n, g * self.n, d // self.n
        return config

    def to_heads(self, mixed: Tensor) -> Tensor:
        """A slice is a whole head here."""
        return mixed

    def to_slices(self, context: Tensor) -> Tensor:
        """A slice is a whole head here."""
        return context

    def split_angles(self, angles: Angles, config: TransformerConfig) -> tuple[Angles, Angles]:
        """Each slice rotates as the h · n-head model would."""
        query, key = (
            None if angle is None else slice_angles(angle, self.n, config.rotary_interleaved) for angle in angles
        )
        return (query, key), (None, None)


@cache
def _warn_another_function(n: int, h: int, g: int, d: int) -> None:
    """Warns once per shape and process that `local` is not the model's own attention."""
    warnings.warn(
        f"--head-dim-exchange local is another function than the model's attention: each of the {n} slices "
        f"runs its own softmax, which is attention with {h * n} heads and {g * n} query groups of "
        f"{d // n} channels instead of {h}, {g} and {d}; every other exchange is exact",
        UserWarning,
        stacklevel=4,
    )


def slice_angles(embedding: Tensor, n: int, interleaved: bool) -> Tensor:
    """The rotary angles of a model with heads of d/n, out of those for d: every n-th frequency.

    `embedding` is `[s, 1, 1, channels]` as `RotaryEmbedding` makes it, each frequency at both channels of its pair.
    """
    if n == 1:
        return embedding
    if interleaved:
        return embedding[..., ::2][..., ::n].repeat_interleave(2, dim=-1)
    return torch.cat((embedding.chunk(2, dim=-1)[0][..., ::n],) * 2, dim=-1)
