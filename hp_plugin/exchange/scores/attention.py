"""Attention over slices: partial scores are summed over the dim axis, one block of queries at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hp_plugin.exchange.masks import hidden_keys, mask_rows
from hp_plugin.exchange.scores.rule import SCORES_BLOCK


@dataclass(frozen=True)
class ScoresSettings:
    """What one call of `scores_attention` needs beside its tensors.

    With dropout, the default generator must stand at `rng_state` when the forward pass starts, equally on all ranks of
    `dim_group`; backward draws the same masks again from that state.
    """

    dim_group: dist.ProcessGroup
    causal: bool
    window: tuple[int, int] | None
    scale: float
    dropout: float = 0.0
    rng_state: Tensor | None = None
    block: int = SCORES_BLOCK


def scores_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: ScoresSettings
) -> Tensor:
    """Exact attention from slices of every head.

    Works in blocks of queries: while one block of scores is being reduced, the next one is computed; none is kept,
    backward computes and reduces them again together with the partial gradients of the probabilities.

    Args:
        query: `[s, b, h/m, d/n]`. key, value: `[s, b, g/m, d/n]`.
        mask: `[b or 1, 1, s or 1, s]`, True where hidden; replaces causality, as in Megatron-Core's local attention.

    Returns:
        `[s, b, h/m · d/n]`, this rank's slice of the output.
    """
    return _ScoresAttention.apply(query, key, value, mask, settings)


class _ScoresAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: ScoresSettings
    ) -> Tensor:
        blocks = _Blocks(query, key, mask, settings)
        rows, columns = blocks.by_kv_group(query), blocks.by_kv_group(key)
        values = blocks.by_kv_group(value)
        output = torch.empty_like(rows)
        for block, scores in blocks.reduced(lambda block: blocks.partial(block, rows, columns)):
            dropped, _ = blocks.drop(blocks.softmax(block, scores)[0])
            output[:, :, block.start : block.stop] = blocks.split_queries(
                torch.bmm(dropped, values[:, 0, : block.keys])
            )
        ctx.save_for_backward(query, key, value, mask)
        ctx.settings = settings
        return blocks.by_token(output).flatten(2)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        blocks = _Blocks(query, key, mask, ctx.settings)
        blocks.rewind()
        rows, columns = blocks.by_kv_group(query), blocks.by_kv_group(key)
        values = blocks.by_kv_group(value)
        grads = blocks.by_kv_group(grad_output.reshape(query.shape))
        grad_rows = torch.empty_like(rows)
        # Every block adds to all keys before it: accumulated in fp32, as a fused kernel would.
        grad_columns = torch.zeros_like(columns[:, 0], dtype=torch.float32)
        grad_values = torch.zeros_like(grad_columns)

        def partials(block: _Block) -> Tensor:
            # Both partial sums travel in one all-reduce: [2, b · g/m, h/g · block, keys]
            return torch.stack((blocks.partial(block, rows, columns), blocks.product(block, grads, values)))

        for block, (scores, grad_probabilities) in blocks.reduced(partials):
            probabilities, hidden = blocks.softmax(block, scores)
            dropped, kept = blocks.drop(probabilities)
            grad_block = blocks.join_queries(grads, block)
            grad_values[:, : block.keys] += torch.bmm(dropped.transpose(1, 2), grad_block)
            grad_scores = _softmax_gradient(probabilities, grad_probabilities, kept, hidden).to(query.dtype)
            key_block, query_block = columns[:, 0, : block.keys], blocks.join_queries(rows, block)
            grad_rows[:, :, block.start : block.stop] = blocks.split_queries(
                torch.bmm(grad_scores, key_block) * ctx.settings.scale
            )
            grad_columns[:, : block.keys] += torch.bmm(grad_scores.transpose(1, 2), query_block) * ctx.settings.scale
        return (
            blocks.by_token(grad_rows),
            blocks.by_token(grad_columns.to(key.dtype).unsqueeze(1)),
            blocks.by_token(grad_values.to(value.dtype).unsqueeze(1)),
            None,
            None,
        )


@dataclass(frozen=True)
class _Block:
    """Queries [start, stop) and the keys [0, keys) they can see."""

    start: int
    stop: int
    keys: int


class _Blocks:
    """One call's blocks of queries, with heads as [b · g/m, h/g, s, d/n] so that key heads are shared in place."""

    def __init__(self, query: Tensor, key: Tensor, mask: Tensor | None, settings: ScoresSettings) -> None:
        self.s, self.b, self.heads, self.width = query.shape
        self.kv_groups = key.shape[2]
        self.mask = mask if settings.window is None else None
        self.settings = settings
        self.device = query.device
        self.dtype = query.dtype
        self.generator: torch.Generator | None = None  # the default one, in forward

    def rewind(self) -> None:
        """Draws dropout masks from where the forward pass started."""
        if self.settings.dropout:
            assert self.settings.rng_state is not None, "dropout needs the state that its masks were drawn from"
            self.generator = torch.Generator(device=self.device)
            self.generator.set_state(self.settings.rng_state)

    def __iter__(self) -> Iterator[_Block]:
        causal = self.settings.causal and self.mask is None and self.settings.window is None
        for start in range(0, self.s, self.settings.block):
            stop = min(start + self.settings.block, self.s)
            yield _Block(start, stop, stop if causal else self.s)

    def by_kv_group(self, tokens: Tensor) -> Tensor:
        """[s, b, heads, d/n] -> [b · g/m, heads per group, s, d/n]."""
        tokens = tokens.unflatten(2, (self.kv_groups, -1)).permute(1, 2, 3, 0, 4)
        return tokens.reshape(self.b * self.kv_groups, -1, self.s, self.width)

    def by_token(self, rows: Tensor) -> Tensor:
        """[b · g/m, heads per group, s, d/n] -> [s, b, heads, d/n]."""
        rows = rows.unflatten(0, (self.b, self.kv_groups)).permute(3, 0, 1, 2, 4)
        return rows.flatten(2, 3)

    def join_queries(self, rows: Tensor, block: _Block) -> Tensor:
        """One block of rows as [b · g/m, h/g · block, d/n]."""
        return rows[:, :, block.start : block.stop].flatten(1, 2)

    def split_queries(self, joined: Tensor) -> Tensor:
        """The reverse of `join_queries`: [b · g/m, h/g, block, d/n]."""
        return joined.unflatten(1, (self.heads // self.kv_groups, -1))

    def product(self, block: _Block, rows: Tensor, columns: Tensor) -> Tensor:
        """This rank's slice of a sum over channels: [b · g/m, h/g · block, keys]."""
        return torch.bmm(self.join_queries(rows, block), columns[:, 0, : block.keys].transpose(1, 2))

    def partial(self, block: _Block, rows: Tensor, columns: Tensor) -> Tensor:
        """Partial scores, scaled before they are summed so that fp16 does not overflow."""
        return torch.bmm(
            self.join_queries(rows, block) * self.settings.scale, columns[:, 0, : block.keys].transpose(1, 2)
        )

    def reduced(self, partials: Callable[[_Block], Tensor]) -> Iterator[tuple[_Block, Tensor]]:
        """Each block's partial sums, summed over the dim axis; the next block is computed while they travel."""
        waiting: tuple[_Block, Tensor, dist.Work] | None = None
        for block in self:
            buffer = partials(block)
            work = dist.all_reduce(buffer, group=self.settings.dim_group, async_op=True)
            if waiting is not None:
                waiting[2].wait()
                yield waiting[:2]
            waiting = (block, buffer, work)
        assert waiting is not None, "an attention layer without queries"
        waiting[2].wait()
        yield waiting[:2]

    def softmax(self, block: _Block, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """Probabilities [b · g/m, h/g · block, keys] in fp32, and what the mask hid, in a shape that broadcasts to
        [b, g/m, h/g, block, keys]."""
        hidden = self._hidden(block)
        weights = scores.float().view(self.b, self.kv_groups, -1, block.stop - block.start, block.keys)
        if hidden is not None:
            weights = weights.masked_fill(hidden, -10000.0)  # Megatron-Core's own value
        return torch.softmax(weights, dim=-1), hidden

    def drop(self, probabilities: Tensor) -> tuple[Tensor, Tensor | None]:
        """Dropped-out probabilities [b · g/m, h/g · block, keys] in the model's dtype, and their factors."""
        kept = None
        if self.settings.dropout:
            draw = torch.rand(probabilities.shape, generator=self.generator, device=self.device)
            kept = (draw >= self.settings.dropout).float() / (1.0 - self.settings.dropout)
            probabilities = probabilities * kept
        return probabilities.to(self.dtype).view(self.b * self.kv_groups, -1, probabilities.shape[-1]), kept

    def _hidden(self, block: _Block) -> Tensor | None:
        rows = range(block.start, block.stop)
        if self.mask is not None:
            return mask_rows(self.mask, rows).unsqueeze(1)
        return hidden_keys(rows, block.keys, self.settings.causal, self.settings.window, self.device)


def _softmax_gradient(
    probabilities: Tensor, grad_dropped: Tensor, kept: Tensor | None, hidden: Tensor | None
) -> Tensor:
    """Gradient of the scores, in fp32, from that of the dropped-out probabilities, in the shape of the latter."""
    grad = grad_dropped.float().view_as(probabilities)
    grad = grad if kept is None else grad * kept
    weighted = probabilities * grad
    grad_scores = weighted - probabilities * weighted.sum(dim=-1, keepdim=True)
    if hidden is not None:
        grad_scores = grad_scores.masked_fill(hidden, 0.0)  # matters where a query sees no key at all
    return grad_scores.view_as(grad_dropped)
