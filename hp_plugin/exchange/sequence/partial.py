"""Attention to some of the keys, with what it takes to join it with attention to the others."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor
from torch.distributed import ProcessGroup

HIDDEN = -10000.0
"""A hidden score, as in Megatron-Core's unfused attention."""
QUERY_BLOCK = 256
"""Queries whose scores are there at a time."""


def partial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    *,
    start: int,
    mask: Tensor | None,
    causal: bool,
    window: tuple[int, int] | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of all queries to these keys alone; memory linear in both.

    Args:
        query: `[s, b, h/m, d]`, at positions from `start` on.
        key, value: `[t, b, g/m, d]`; t may be 0.
        positions: `[t]`, those of the keys, ascending.
        mask: `[b or 1, 1, s or 1, t]`, True where hidden; replaces causality, as in Megatron-Core's local attention.

    Returns:
        Outputs `[s, b, h/m, d]`, and in fp32 the log-sum-exp of each query's scores, `[s, b, h/m]`.
    """
    s, b, heads, _ = query.shape
    kv_groups = key.shape[2]
    if key.shape[0] == 0:
        return torch.zeros_like(query), query.new_full((s, b, heads), -torch.inf, dtype=torch.float32)
    # [t, b, g/m, d] -> [b · g/m, t, d], in place
    keys, values = (tokens.permute(1, 2, 0, 3).flatten(0, 1) for tokens in (key, value))
    outputs, sums = [], []
    for first in range(0, s, QUERY_BLOCK):
        block = query[first : first + QUERY_BLOCK]
        # [rows, b, h/m, d] -> [b · g/m, h/g · rows, d]
        rows = block.unflatten(2, (kv_groups, -1)).permute(1, 2, 3, 0, 4).flatten(0, 1).flatten(1, 2)
        scores = torch.bmm(rows * scale, keys.transpose(1, 2)).float()
        by_row = scores.view(b, kv_groups, -1, block.shape[0], positions.shape[0])
        hidden = _hidden(range(first, first + block.shape[0]), start, positions, mask, causal, window)
        if hidden is not None:
            by_row.masked_fill_(hidden, HIDDEN)
        sums.append(scores.logsumexp(dim=-1).view(b, kv_groups, -1, block.shape[0]))
        found = torch.bmm(scores.softmax(dim=-1).to(value.dtype), values)
        outputs.append(found.view(b, kv_groups, -1, block.shape[0], found.shape[-1]))
    output, total = torch.cat(outputs, dim=3), torch.cat(sums, dim=3)
    # [b, g/m, h/g, s, d] -> [s, b, h/m, d]
    return output.permute(3, 0, 1, 2, 4).flatten(2, 3), total.permute(3, 0, 1, 2).flatten(2, 3)


def _hidden(
    rows: range, start: int, positions: Tensor, mask: Tensor | None, causal: bool, window: tuple[int, int] | None
) -> Tensor | None:
    """True where a key is hidden, in a shape that broadcasts to [b, g/m, h/g, rows, t]; None where none is."""
    if window is None and mask is not None:
        own = mask if mask.shape[2] == 1 else mask[:, :, rows.start : rows.stop]
        return own.unsqueeze(2)
    if window is None and (not causal or len(rows) == 1):  # nothing is cached behind the last query
        return None
    query = torch.arange(start + rows.start, start + rows.stop, device=positions.device).unsqueeze(1)
    if window is None:
        return positions > query
    left, right = window
    hidden = torch.zeros(len(rows), len(positions), dtype=torch.bool, device=positions.device)
    if left >= 0:
        hidden |= positions < query - left
    if right >= 0:
        hidden |= positions > query + right
    return hidden


def join(output: Tensor, sums: Tensor, dim: ProcessGroup) -> Tensor:
    """This rank's slices of what the ranks of a dim group found together, [s, b, h/m, d] -> [s, b, h/m, d/n].

    One all-to-all over the dim axis carries the outputs, in their dtype, and the fp32 log-sum-exps beside them:
    receives (n-1)/n of the outputs and (n-1) · s · b · h/m sums.
    """
    # [s, b, h/m, d] -> [n, s, b, h/m, d/n]
    parts = output.unflatten(3, (dim.size(), -1)).movedim(3, 0)
    # The bits of an fp32 number as one, two or four of the outputs' dtype.
    bits = sums.unsqueeze(-1).contiguous().view(output.dtype)
    sent = torch.cat((parts, bits.expand(dim.size(), *bits.shape)), dim=-1)
    received, bits = all_to_all(dim, sent).split([parts.shape[-1], bits.shape[-1]], dim=-1)
    weights = bits.contiguous().view(torch.float32).softmax(dim=0)
    return (received.float() * weights).sum(dim=0).to(output.dtype)
