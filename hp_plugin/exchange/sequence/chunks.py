"""How s tokens are spread over the n ranks of a dim group so that causal attention is the same work on each.

Of 2n chunks rank j has an early one, j, and a late one, 2n-1-j, one behind the other.
"""

from __future__ import annotations

import torch
from torch import Tensor


def chunks_of(j: int, n: int) -> tuple[int, int]:
    """Rank j's (early, late) chunk."""
    return j, 2 * n - 1 - j


def own_tokens(tokens: Tensor, j: int, n: int, axis: int = 0) -> Tensor:
    """Rank j's part of an axis of s tokens, [s, ..] -> [s/n, ..], contiguous."""
    early, late = chunks_of(j, n)
    chunks = tokens.chunk(2 * n, dim=axis)
    return torch.cat((chunks[early], chunks[late]), dim=axis)


def spread(tokens: Tensor, n: int) -> Tensor:
    """Every rank's part: [s, ..] -> [n, s/n, ..], contiguous."""
    early, late = tokens.unflatten(0, (2, n, -1)).unbind(0)
    return torch.stack((early, late.flip(0)), dim=1).flatten(1, 2)


def in_order(parts: Tensor) -> Tensor:
    """The inverse of `spread`, contiguous."""
    early, late = parts.unflatten(1, (2, -1)).unbind(1)
    return torch.cat((early, late.flip(0))).flatten(0, 1)
