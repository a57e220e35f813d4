"""Attention of whole heads on torch's fused kernels, in the conventions of Megatron-Core's local attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hp_plugin.exchange.masks import hidden_keys

WINDOW_BLOCK = 256
"""Queries of a windowed layer that go through one kernel call, at least: enough rows for a kernel's tiles."""


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    causal: bool,
    window: tuple[int, int] | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """Exact attention; where torch has a fused kernel for it, memory linear in s, forward and backward.

    Torch's kernels: FlashAttention for d up to 256 without a mask, the memory-efficient one for any d and mask on CUDA,
    its own on the CPU for all of them. Dropout draws from the current generator; on the CPU it takes the unfused way.

    Args:
        query: `[s_q, b, h, d]`, the last s_q of the s positions.
        key, value: `[s, b, g, d]`.
        mask: `[b or 1, h or 1, s_q or 1, s]`, True where hidden; replaces causality.
        causal: without a mask, and s_q = s, hides later keys.
        window: (left, right) in positions, -1 for unlimited; replaces mask and causality.

    Returns:
        `[s_q, b, h · d]`.
    """
    s_q, s, kv_groups = query.shape[0], key.shape[0], key.shape[2]
    if window is not None and min(window) >= 0:
        return by_token(_windowed(query, key, value, window, scale, dropout), kv_groups)
    if window is not None:
        causal = window == (-1, 0) and s_q == s
        hidden = None if causal else hidden_keys(range(s - s_q, s), s, False, window, query.device)
    else:
        causal = causal and mask is None
        hidden = None if mask is None else mask_by_kv_group(mask, kv_groups)
    output = grouped_attention(
        by_kv_group(query, kv_groups), key, value, hidden=hidden, causal=causal, scale=scale, dropout=dropout
    )
    return by_token(output, kv_groups)


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    hidden: Tensor | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
    scale: float,
    dropout: float,
) -> Tensor:
    """One call of torch's attention, in which the query heads of a group read their key head in place.

    Groups count as samples, so every kernel can: torch's own switch for grouped queries is FlashAttention's alone.

    Args:
        query: `[b·g, h/g, s_q, d]`, from `by_kv_group`.
        key, value: `[s, b, g, d]`.
        hidden: True where hidden, broadcast to `[b·g, h/g, s_q, s]`. A query that sees no key averages over all, as
            Megatron-Core's own does, which hides a score by -10000.
        causal: hides later keys; s_q = s.
        bias: one of torch's causal biases, in place of both.

    Returns:
        `[b·g, h/g, s_q, d]`.
    """
    shared = query.shape[1]
    # [s, b, g, d] -> [b·g, h/g, s, d], every head of a group the same memory
    keys, values = (
        states.permute(1, 2, 0, 3).flatten(0, 1).unsqueeze(1).expand(-1, shared, -1, -1) for states in (key, value)
    )
    visible: Tensor | None = bias
    if hidden is not None:
        blind = hidden.all(dim=-1, keepdim=True)
        query, visible = query.masked_fill(blind, 0.0), ~hidden | blind
    return scaled_dot_product_attention(
        query, keys, values, attn_mask=visible, dropout_p=dropout, is_causal=causal, scale=scale
    )


def by_kv_group(query: Tensor, kv_groups: int) -> Tensor:
    """[s, b, h, d] -> [b·g, h/g, s, d], in place where the query is contiguous."""
    return query.unflatten(2, (kv_groups, -1)).permute(1, 2, 3, 0, 4).flatten(0, 1)


def by_token(output: Tensor, kv_groups: int) -> Tensor:
    """[b·g, h/g, s, d] -> [s, b, h · d], contiguous."""
    return output.unflatten(0, (-1, kv_groups)).permute(3, 0, 1, 2, 4).flatten(2)


def mask_by_kv_group(mask: Tensor, kv_groups: int) -> Tensor:
    """[b or 1, h or 1, ..] -> [b·g or 1, h/g or 1, ..]; only masks of single samples are copied, once per group."""
    b, heads = mask.shape[:2]
    if heads > 1:
        return mask.unflatten(1, (kv_groups, -1)).flatten(0, 1)
    return mask if b == 1 else mask.repeat_interleave(kv_groups, dim=0)


def _windowed(
    query: Tensor, key: Tensor, value: Tensor, window: tuple[int, int], scale: float, dropout: float
) -> Tensor:
    """Blocks of queries against the keys that their windows touch: `[b·g, h/g, s_q, d]`.

    Keys are cut into pieces of the same size, and each block is given the pieces it needs: neither work nor memory
    grows with the square of the sequence, in backward neither.
    """
    left, right = window
    s_q, s = query.shape[0], key.shape[0]
    size = max(WINDOW_BLOCK, left + right + 1)
    pieces = [states.split(size) for states in (key, value)]
    outputs = []
    for start in range(0, s_q, size):
        rows = range(start + s - s_q, min(start + size, s_q) + s - s_q)
        first, last = max(0, rows.start - left) // size, min(s - 1, rows.stop - 1 + right) // size
        keys, values = (torch.cat(cut[first : last + 1]) for cut in pieces)
        moved = range(rows.start - first * size, rows.stop - first * size)
        hidden = hidden_keys(moved, keys.shape[0], False, window, query.device)
        outputs.append(
            grouped_attention(
                by_kv_group(query[start : start + len(rows)], key.shape[2]),
                keys,
                values,
                hidden=hidden,
                scale=scale,
                dropout=dropout,
            )
        )
    return torch.cat(outputs, dim=2)
