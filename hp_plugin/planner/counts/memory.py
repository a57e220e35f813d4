"""Bytes of device memory that a rank of each pipeline stage needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hp_plugin.exchange.scores.rule import SCORES_BLOCK
from hp_plugin.planner.counts.core_attention import is_fused
from hp_plugin.planner.counts.moe import routed_tokens
from hp_plugin.planner.counts.schedule import peak_in_flight, pipeline_order
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.counts.stages import Stage, build_stages, stage_parameters

OPTIMIZER_BYTES = 12
"""Adam in mixed precision: fp32 weight and two fp32 moments per parameter."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank, by use."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    cache: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers + self.cache


def memory(share: Share, micro_batches: int) -> Memory:
    """Memory of the pipeline rank that needs most."""
    stages = build_stages(share.model, share.layout)
    pp = share.layout.pp
    # What one layer keeps is the same in every stage.
    kept = {moe: _layer_activations(share, moe) for moe in (False, True) if not moe or share.model.experts}
    candidates = [_rank_memory(share, stages[rank::pp], rank, micro_batches, kept) for rank in range(pp)]
    return max(candidates, key=lambda candidate: candidate.total)


def _rank_memory(
    share: Share, chunks: list[Stage], rank: int, micro_batches: int, kept: Mapping[bool, float]
) -> Memory:
    model, layout, workload = share.model, share.layout, share.workload
    counts = [stage_parameters(model, layout, stage) for stage in chunks]
    dense, experts = sum(count.dense for count in counts), sum(count.experts for count in counts)
    replicas = layout.replicas
    weights: float
    weights = share.e * (dense + experts)
    gradients = optimizer = 0.0
    if workload.training:
        sharded = layout.zero != "replicated"
        gradients = workload.grad_itemsize * (dense + experts)
        # 16-bit gradients are copied to fp32 for the shard that a rank updates.
        optimizer = (OPTIMIZER_BYTES + (4 if workload.grad_itemsize < 4 else 0)) * (
            dense / (replicas if sharded else 1) + experts / (layout.expert_replicas if sharded else 1)
        )
        if layout.zero == "full":
            # Two layers' weights and one layer's gradients are whole at a time.
            layer = model.layer_parameters(any(stage.moe for stage in chunks)) / layout.tp
            weights = 2 * share.e * layer
            gradients = workload.grad_itemsize * ((dense + experts) / replicas + layer)
    largest = max(kept[bool(stage.moe)] for stage in chunks)
    activations = 0.0
    if workload.training:
        order = pipeline_order(rank, layout.pp, layout.vpp, _enough(layout.pp, layout.vpp, micro_batches), True)
        activations = peak_in_flight(order, [_chunk_activations(share, stage, kept) for stage in chunks])
    working = _working(share, chunks) + (largest if layout.recompute == "full" or not workload.training else 0.0)
    cache = 0.0
    if workload.mode == "decode":
        sequences = workload.global_batch / layout.dp / (layout.n if share.exchange == "batch" else 1)
        width = model.d // (layout.n if share.exchange == "local" else 1)
        per_token = 2.0 * share.groups * width * share.e
        cache = sequences * workload.seq * per_token * sum(stage.layers for stage in chunks)
    return Memory(weights, gradients, optimizer, activations, working, cache)


def _enough(pp: int, vpp: int, micro_batches: int) -> int:
    # More micro-batches than these are in flight on no rank.
    return min(micro_batches, 3 * pp if vpp > 1 else 2 * pp)


def _chunk_activations(share: Share, stage: Stage, kept: Mapping[bool, float]) -> float:
    """Bytes kept from a chunk's forward pass to its backward pass; `kept` by a dense and a MoE layer."""
    if share.layout.recompute == "full":
        total = stage.layers * share.between_bytes
    else:
        total = stage.dense * kept[False] + stage.moe * kept.get(True, 0.0)
    if stage.last and share.model.vocab:
        # Logits in 16 bit and their fp32 softmax.
        total += share.model.vocab / share.P * share.tokens * (share.e + 4) + 2 * share.between_bytes
    return total


def _layer_activations(share: Share, moe: bool) -> float:
    """Bytes that one layer keeps for its backward pass.

    Generalizes the count of Korthikanti et al. (arXiv 2205.05198, section 4) to grouped-query attention, fused
    attention, gated MLPs and the grid.
    """
    model, between = share.model, share.between_bytes
    masks = 2 * between / share.e if model.dropout else 0.0
    return 4 * between + masks + _attention_activations(share) + (_moe if moe else _mlp)(share)


def _attention_activations(share: Share) -> float:
    """q, k, v, the attention's output and statistics, and what the exchange keeps beside them."""
    model, name = share.model, share.exchange
    kept: float = share.qkv_bytes + share.context_bytes
    if share.gathers_qkv:
        # v is a view of the gathered projection, which therefore lives on.
        kept += share.qkv_bytes * (share.P - 1)
    if name == "sequence":
        kept += (share.layout.n - 1) * 2 * model.g * model.d / share.P * share.tokens * share.e
    if name in ("batch", "sequence"):
        kept += share.context_bytes
    if name == "scores":
        return kept
    width = model.d // (share.layout.n if name == "local" else 1)
    rows = float(share.tokens) / (share.layout.n if name in ("batch", "sequence") else 1)
    if is_fused(width, True) or name == "sequence":
        # Beyond the fused kernels' head dimensions `sequence` runs torch's memory-efficient one.
        return kept + 4.0 * share.heads * rows
    if share.layout.recompute == "selective":
        return kept
    per_score = share.e + (share.e + 1 if model.dropout else 0)
    return kept + per_score * rows * share.heads * share.workload.seq


def _mlp(share: Share) -> float:
    inner = share.model.ffn / share.P
    return inner * (3 if share.model.gated else 2) * share.tokens * share.e


def _moe(share: Share) -> float:
    """Routed tokens in and out of the experts, their inner activations; in DeepSpeed's layer also the gate's fp32 input
    and the chosen experts' outputs for all tokens."""
    model, routed = share.model, routed_tokens(share)
    kept: float = routed * (2 * model.D + model.ffn * (3 if model.gated else 2)) * share.e
    if share.layout.moe == "deepspeed":
        kept += (2 + model.top_k) * share.hidden_bytes
    return kept


def _working(share: Share, chunks: list[Stage]) -> float:
    """Buffers of the moment: gradients of one layer's activations, gathered tokens, exchange and score buffers."""
    model = share.model
    first = model.ffn / share.P * (2 if model.gated else 1) * share.tokens * share.e
    held = 3 * share.hidden_bytes + 2 * first + 2 * (share.qkv_bytes + share.context_bytes)
    name = share.exchange
    if name == "batch":
        held += 2 * share.qkv_bytes
    elif name == "sequence":
        held += 2 * (share.qkv_bytes + (share.layout.n - 1) * 2 * model.g * model.d / share.P * share.tokens * share.e)
    elif name == "scores":
        block = float(share.b * share.heads * min(SCORES_BLOCK, share.s) * share.s)
        held += block * (4 * share.e + 4 * 4)
    width = model.d // (share.layout.n if name == "local" else 1)
    if name not in ("scores", "sequence") and not is_fused(width, share.workload.training):
        rows = share.tokens / (share.layout.n if name == "batch" else 1)
        held += 2 * share.e * rows * share.heads * share.workload.seq
    if any(stage.last for stage in chunks) and model.vocab:
        held += model.vocab / share.P * share.tokens * (share.e + 4)
    return held
