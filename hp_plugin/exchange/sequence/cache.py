"""This rank's blocks of tokens in the memory of a static-batching context."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hp_plugin.exchange.kv_cache import reserved
from hp_plugin.exchange.sequence.blocks import Blocks
from hp_plugin.exchange.sizes import cache_block


class TokenCache:
    """Rotated keys, and values, of every n-th block of tokens of all sequences, in one layer and one pass.

    Args:
        context: a static-batching context.
        layer: number of the layer in the whole model.
        n, j: ranks of the dim group, and this one.
        s, b: tokens and sequences of the pass.
    """

    def __init__(self, context: Any, layer: int, n: int, j: int, s: int, b: int) -> None:
        self._context, self._layer = context, layer
        self._blocks = Blocks(n, j, cache_block(context.max_sequence_length, n))
        self._sequences = slice(context.batch_size_offset, context.batch_size_offset + b)
        self.start, self.stop = context.sequence_len_offset, context.sequence_len_offset + s

    def of_pass(self, tokens: Tensor) -> Tensor:
        """What belongs to the tokens of this pass, of all positions there can be: [S, ..] -> [s, ..]."""
        return tokens[self.start : self.stop]

    def own(self, tokens: Tensor) -> Tensor:
        """What this rank caches of the tokens of this pass: [s, ..] -> [own tokens, ..]."""
        size = self._blocks.size
        if self.stop - self.start == 1:  # a view, which decoding has every time
            mine = self.start // size % self._blocks.n == self._blocks.j
            return tokens[: int(mine)]
        return tokens.index_select(0, _positions(self._blocks, self.start, self.stop, tokens.device) - self.start)

    def keep(self, key: Tensor, value: Tensor) -> None:
        """Caches keys and values of this rank's own tokens, `[own tokens, b, g/m, d]`."""
        rows = slice(self._blocks.rows(self.start), self._blocks.rows(self.stop))
        for memory, states in zip(self._memory(key), (key, value), strict=True):
            memory[rows, self._sequences] = states

    def read(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values `[cached tokens, b, g/m, d]` of this rank, up to this pass's, and their positions."""
        rows = self._blocks.rows(self.stop)
        key, value = (memory[:rows, self._sequences] for memory in self._memory(like))
        return key, value, _positions(self._blocks, 0, self.stop, like.device)

    def _memory(self, like: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self._blocks.rows(self._context.max_sequence_length)
        return reserved(self._context, self._layer, tokens, self._context.max_batch_size, like)


@lru_cache(maxsize=8)  # a pass asks for the same ones in every layer
def _positions(blocks: Blocks, start: int, stop: int, device: torch.device) -> Tensor:
    return torch.tensor(blocks.positions(start, stop), dtype=torch.long, device=device)
