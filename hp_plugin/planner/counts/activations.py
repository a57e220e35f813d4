"""Bytes of activations: kept from a forward pass to its backward pass, and held for a moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hp_plugin.planner.counts.moe import routed_tokens
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.counts.stages import Stage


def layer_activations(share: Share, moe: bool, recompute: str) -> float:
    """Bytes that one layer keeps for its backward pass, unless all of it is computed again.

    Generalizes the count of Korthikanti et al. (arXiv 2205.05198, section 4) to grouped-query attention, fused
    attention, gated MLPs and the grid.
    """
    share = share.within
    model, between = share.model, share.between_bytes
    # Inputs of both norms and, normed, of the QKV projection and of the MLP. Dropout keeps a byte per element of two.
    masks = 2 * between / share.e if model.dropout else 0.0
    return 4 * between + masks + _attention(share, recompute) + (_moe if moe else _mlp)(share)


def chunk_activations(share: Share, stage: Stage, recompute: str, kept: Mapping[bool, float]) -> float:
    """Bytes kept from a chunk's forward pass to its backward pass; `kept` by a layer without and with experts."""
    if recompute == "full":
        total = stage.layers * share.within.between_bytes
    else:
        total = stage.dense * kept[False] + stage.moe * kept.get(True, 0.0)
    if stage.last and share.model.vocab:
        # Logits and their fp32 softmax; input of the final norm and of the logits' product.
        total += _logits(share) * (share.e + 4) + 2 * share.between_bytes
    return total


def _attention(share: Share, recompute: str) -> float:
    """q, k, v, the attention's output and statistics, and what the exchange keeps beside them."""
    model, rule, inner = share.model, share.rule, share.inner
    kept = share.qkv_bytes + share.context_bytes + rule.kept(share.attention_shape) * share.e
    if share.gathers_qkv:
        # v is a view of the gathered projection, which therefore lives on.
        kept += share.qkv_bytes * (share.P - 1)
    rows = float(inner.samples * inner.queries * share.heads)
    if not share.keeps_scores:
        return kept + (4.0 * rows if rule.keeps_statistics else 0.0)
    if recompute == "selective":
        return kept
    # Probabilities; under dropout what is left of them and a mask's byte, too.
    per_score = share.e + (share.e + 1 if model.dropout else 0)
    return kept + per_score * rows * share.workload.seq


def _mlp(share: Share) -> float:
    """Outputs of the first linear (of both, when gated) and the second one's input."""
    inner = share.model.ffn / share.P
    return inner * (3 if share.model.gated else 2) * share.tokens * share.e


def _moe(share: Share) -> float:
    """Routed tokens into the experts and their inner activations.

    Megatron-Core weighs a token inside its expert (`TEGroupedMLP.forward`, 0.16), so that what comes out is not kept;
    DeepSpeed's layer weighs it behind, and keeps the gate's fp32 input and the chosen experts' outputs for all tokens.
    """
    model, routed = share.model, routed_tokens(share)
    deepspeed = share.layout.moe == "deepspeed"
    outside = (2 if deepspeed else 1) * model.D
    kept: float = routed * (outside + model.ffn * (3 if model.gated else 2)) * share.e
    if deepspeed:
        # An fp32 element is as large as two of 16 bit.
        kept += (2 + model.top_k) * share.hidden_bytes
    return kept


def _logits(share: Share) -> float:
    """Logits of one rank for one micro-batch."""
    return share.model.vocab / share.P * share.tokens


def buffers(share: Share, chunks: Sequence[Stage]) -> float:
    """Buffers of the moment: gradients of one layer's activations, gathered tokens, exchange and score buffers."""
    model, whole = share.model, share
    share = share.within
    first = model.ffn / share.P * (2 if model.gated else 1) * share.tokens * share.e
    # At a linear, three of [s, b, D]: its input as gathered, the input's gradient, and the residual's gradient beside
    # them. The first linear's output and attention's activations, each with its gradient.
    held = 3 * share.hidden_bytes + 2 * first + 2 * (share.qkv_bytes + share.context_bytes)
    held += share.rule.held_bytes(share.attention_shape, share.e)
    if share.keeps_scores:
        # Scores and their gradient.
        held += 2 * share.e * float(share.inner.samples * share.inner.queries * share.heads) * share.workload.seq
    if any(stage.last for stage in chunks) and model.vocab:
        # Gradient of the logits, and in fp32.
        held += _logits(whole) * (share.e + 4)
    return held
