"""Attention of an early and a late chunk of queries against all keys, on torch's own fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from hp_plugin.exchange.masks import hidden_keys, mask_rows

FLASH_HEAD_DIM = 256
"""Head dimensions up to this have a fused CUDA kernel that reads shared key heads in place (FlashAttention-2)."""


def sequence_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    chunks: tuple[int, int],
    mask: Tensor | None,
    causal: bool,
    window: tuple[int, int] | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """Exact attention of this rank's queries; memory linear in s where torch's fused kernels apply.

    Args:
        query: `[s/n, b, h/m, d]`, the chunks `chunks` = (early, late) of 2n, one behind the other.
        key, value: `[s, b, g/m, d]`, all positions.
        mask: `[b or 1, 1, s or 1, s]`, True where hidden; replaces causality, as in Megatron-Core's local attention.

    Returns:
        `[s/n, b, h/m · d]`.
    """
    size = query.shape[0] // 2
    share = query.shape[2] // key.shape[2]
    in_place = query.is_cuda and query.shape[3] <= FLASH_HEAD_DIM and mask is None and window is None
    if share > 1 and not in_place:
        key, value = key.repeat_interleave(share, dim=2), value.repeat_interleave(share, dim=2)
    # [s, b, heads, d] -> [b, heads, s, d]
    keys, values = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
    outputs = []
    for chunk, part in zip(chunks, query.permute(1, 2, 0, 3).split(size, dim=2), strict=True):
        rows = range(chunk * size, (chunk + 1) * size)
        visible = rows.stop if causal and mask is None and window is None else key.shape[0]
        attn_mask: Tensor | None
        if mask is not None and window is None:
            hidden = mask_rows(mask, rows)
            # Megatron-Core hides a score by -10000, so a query that sees no key at all averages over every key.
            blind = hidden.all(dim=-1, keepdim=True)
            part, attn_mask = part.masked_fill(blind, 0.0), ~hidden | blind
        elif causal and window is None:
            attn_mask = causal_lower_right(size, visible)
        else:
            hidden = hidden_keys(rows, visible, causal, window, query.device)
            attn_mask = None if hidden is None else ~hidden
        outputs.append(
            scaled_dot_product_attention(
                part,
                keys[:, :, :visible],
                values[:, :, :visible],
                attn_mask=attn_mask,
                dropout_p=dropout,
                scale=scale,
                enable_gqa=share > 1 and in_place,
            )
        )
    # [b, h/m, s/n, d] -> [s/n, b, h/m · d]
    return torch.cat(outputs, dim=2).permute(2, 0, 1, 3).flatten(2)
