"""Core attention with Transformer Engine's checks, computed product by product."""

import os
from contextlib import nullcontext

import torch

from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
from transformer_engine.released import bound

MASKS = ("no_mask", "padding", "causal", "padding_causal", "causal_bottom_right", "padding_causal_bottom_right")
FUSED_HEAD_DIM = 256

__all__ = ["DotProductAttention", "apply_rotary_pos_emb"]


class DotProductAttention(TransformerEngineBaseModule):
    def __init__(self, *args, **kwargs):
        given = bound("DotProductAttention.__init__", args, kwargs)
        super().__init__()
        self.qkv_format = given.get("qkv_format", "sbhd")
        self.attn_mask_type = given.get("attn_mask_type", "causal")
        self.window_size = given.get("window_size")
        self._join(given.get("tp_group"), given.get("tp_size", 1))
        self.num_attention_heads = given["num_attention_heads"]
        self.layer_number = given.get("layer_number")
        channels = given["kv_channels"]
        self.hidden_size_per_attention_head_k = channels if isinstance(channels, int) else channels[0]
        self.hidden_size_per_attention_head_v = channels if isinstance(channels, int) else channels[1]
        self.num_gqa_groups = given.get("num_gqa_groups") or self.num_attention_heads
        self.num_gqa_groups_per_partition = int(self.num_gqa_groups // self.tp_size)
        assert self.num_attention_heads % self.num_gqa_groups == 0, "groups do not divide the attention heads"
        tracker, sequence_parallel = given.get("get_rng_state_tracker"), given.get("sequence_parallel")
        self.dropout_context = nullcontext if sequence_parallel or tracker is None else tracker().fork
        self.attention_dropout = given.get("attention_dropout", 0.0)
        assert given.get("attention_type", "self") in ("self", "cross")
        scale = given.get("softmax_scale")
        self.softmax_scale = self.hidden_size_per_attention_head_k**-0.5 if scale is None else scale
        assert given.get("cp_group") is None, "the stub has no context parallelism"

    def forward(self, *args, **kwargs):
        given = bound("DotProductAttention.forward", args, kwargs)
        query, key, value = (given[f"{name}_layer"] for name in ("query", "key", "value"))
        self._prepare(query)
        mask_type = given.get("attn_mask_type") or self.attn_mask_type
        assert mask_type in (*MASKS, "arbitrary"), f"attn_mask_type {mask_type} is not supported"
        assert query.dtype == key.dtype == value.dtype, "Queries, keys and values must have the same data type!"
        assert key.shape[:-1] == value.shape[:-1], "Keys and values must have the same batch, length and heads!"
        heads, groups = query.shape[-2], key.shape[-2]
        assert heads % groups == 0, "The number of attention heads must be divisible by the number of GQA groups!"
        assert query.shape[-1] == key.shape[-1] == self.hidden_size_per_attention_head_k, (
            f"Queries and keys must have head_dim = {self.hidden_size_per_attention_head_k}, got {query.shape[-1]}!"
        )
        assert value.shape[-1] == self.hidden_size_per_attention_head_v, "Values have another head_dim!"
        assert groups == self.num_gqa_groups_per_partition, (
            f"Keys and values must have {self.num_gqa_groups_per_partition} heads! Found {groups}."
        )
        assert query.dim() == 4 and self.qkv_format == "sbhd", "the stub knows [s, b, heads, channels]"
        mask = given.get("attention_mask")
        assert mask is not None or mask_type in ("no_mask", "causal", "causal_bottom_right"), (
            f"{mask_type} needs a mask"
        )
        if query.shape[-1] > FUSED_HEAD_DIM and os.environ.get("NVTE_UNFUSED_ATTN", "1") == "0":
            raise ValueError("No dot product attention backend is available for the provided inputs.")
        return self._attend(query, key, value, mask, mask_type)

    def _attend(self, query, key, value, mask, mask_type):
        shared = query.shape[2] // key.shape[2]
        key, value = key.repeat_interleave(shared, 2), value.repeat_interleave(shared, 2)
        query, key, value = (states.permute(1, 2, 0, 3) for states in (query, key, value))
        s_q, s = query.shape[2], key.shape[2]
        hidden = torch.zeros(s_q, s, dtype=torch.bool)
        if "causal" in mask_type:
            hidden = torch.ones(s_q, s, dtype=torch.bool).triu(1 + (s - s_q if "bottom_right" in mask_type else 0))
        if self.window_size not in (None, (-1, -1)) and self.window_size[0] >= 0:
            position, keys = torch.arange(s_q).unsqueeze(1) + s - s_q, torch.arange(s)
            hidden = hidden | (keys < position - self.window_size[0])
        if mask is not None and (mask_type == "arbitrary" or "padding" in mask_type):
            hidden = hidden | mask
        scores = (query @ key.transpose(2, 3) * self.softmax_scale).masked_fill(hidden, -10000.0)
        probabilities = scores.float().softmax(-1).to(query.dtype)
        with self.dropout_context():
            probabilities = torch.nn.functional.dropout(probabilities, self.attention_dropout, self.training)
        return (probabilities @ value).permute(2, 0, 1, 3).flatten(2)
