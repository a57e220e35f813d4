"""Attention of an early and a late chunk of queries against all keys, on torch's own fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from hp_plugin.exchange.fused_kernels import by_kv_group, by_token, grouped_attention, mask_by_kv_group
from hp_plugin.exchange.masks import hidden_keys, mask_rows, names_documents, other_documents


def sequence_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    chunks: tuple[int, ...],
    mask: Tensor | None,
    causal: bool,
    window: tuple[int, int] | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """Exact attention of this rank's queries; memory linear in s where torch's fused kernels apply.

    Args:
        query: `[s/n, b, h/m, d]`, the chunks `chunks` = (early, late) of 2n, one behind the other; (0,): all there is.
        key, value: `[s, b, g/m, d]`, all positions.
        mask: `[b or 1, 1, s or 1, s]`, True where hidden; replaces causality, as in Megatron-Core's local attention. Or
            the number of each token's document, `[s]`, beside causality.

    Returns:
        `[s/n, b, h/m · d]`.
    """
    size, kv_groups = query.shape[0] // len(chunks), key.shape[2]
    documents, mask = (mask, None) if names_documents(mask) else (None, mask)
    outputs = []
    for chunk, part in zip(chunks, query.split(size), strict=True):
        rows = range(chunk * size, (chunk + 1) * size)
        visible = rows.stop if causal and mask is None and window is None else key.shape[0]
        hidden = bias = None
        if mask is not None and window is None:
            hidden = mask_by_kv_group(mask_rows(mask, rows), kv_groups)
        elif documents is not None:
            hidden = other_documents(documents, rows, visible)
            later = hidden_keys(rows, visible, causal, window, query.device)
            hidden = hidden if later is None else hidden | later
        elif causal and window is None:
            bias = causal_lower_right(size, visible)
        else:
            hidden = hidden_keys(rows, visible, causal, window, query.device)
        outputs.append(
            grouped_attention(
                by_kv_group(part, kv_groups),
                key[:visible],
                value[:visible],
                hidden=hidden,
                bias=bias,
                scale=scale,
                dropout=dropout,
            )
        )
    return by_token(torch.cat(outputs, dim=2), kv_groups)
