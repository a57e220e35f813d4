"""`local`: every slice is a head of its own (the source experiments' literal method; another function)."""

from __future__ import annotations

import torch
from torch import Tensor

from hp_plugin.exchange.base import Exchange


class LocalExchange(Exchange):
    """Nothing moves: each slice runs its own softmax, scaled by its own width.

    The result is attention with h · n heads and g · n query groups of d/n channels, not the model's own.
    """

    name = "local"

    def to_heads(self, mixed: Tensor) -> Tensor:
        """A slice is a whole head here."""
        return mixed

    def to_slices(self, context: Tensor) -> Tensor:
        """A slice is a whole head here."""
        return context


def slice_angles(embedding: Tensor, n: int, interleaved: bool) -> Tensor:
    """The rotary angles of a model with heads of d/n, out of those for d: every n-th frequency.

    `embedding` is `[s, 1, 1, channels]` as `RotaryEmbedding` makes it, each frequency at both channels of its pair.
    """
    if n == 1:
        return embedding
    if interleaved:
        return embedding[..., ::2][..., ::n].repeat_interleave(2, dim=-1)
    return torch.cat((embedding.chunk(2, dim=-1)[0][..., ::n],) * 2, dim=-1)
