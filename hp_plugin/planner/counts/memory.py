"""Bytes of device memory that a rank of each pipeline stage needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hp_plugin.planner.counts.activations import buffers, chunk_activations, layer_activations
from hp_plugin.planner.counts.gradients import shared_parameters
from hp_plugin.planner.counts.schedule import Task, peak_in_flight, pipeline_order
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.counts.stages import RankParameters, Stage

OPTIMIZER_BYTES = 12
"""Adam in mixed precision: fp32 weight and two fp32 moments per parameter."""
FP32_GRADIENT_BYTES = 4
"""16-bit gradients are copied to fp32 for the shard that a rank updates."""


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


def memory_needed(share: Share) -> Memory:
    """Memory of the pipeline rank that needs most."""
    return MemoryNeeds(share).recomputing(share.layout.recompute)


class MemoryNeeds:
    """Memory of every rank of a pipeline; what does not hang on recomputation is worked out once."""

    def __init__(self, share: Share) -> None:
        self._share = share
        pp = share.layout.pp
        self._chunks = [share.stages[rank::pp] for rank in range(pp)]
        self._lasting = [_lasting(share, mine, share.parameters[rank::pp]) for rank, mine in enumerate(self._chunks)]

    def recomputing(self, recompute: str) -> Memory:
        """Memory of the pipeline rank that needs most, if `recompute` is computed again in backward."""
        share = self._share
        kept = {
            moe: layer_activations(share, moe, recompute) for moe in (False, True) if not moe or share.model.experts
        }
        found = []
        for rank, (chunks, lasting) in enumerate(zip(self._chunks, self._lasting, strict=True)):
            activations = working = 0.0
            if share.workload.training:
                by_chunk = [chunk_activations(share, stage, recompute, kept) for stage in chunks]
                activations = peak_in_flight(_order(share, rank), by_chunk)
            if recompute == "full" or not share.workload.training:
                # A layer has its activations while it is computed, whether they are kept or not.
                working = max(kept[bool(stage.moe)] for stage in chunks)
            found.append(replace(lasting, activations=activations, buffers=lasting.buffers + working))
        return max(found, key=lambda needed: needed.total)


def _lasting(share: Share, chunks: list[Stage], parameters: list[RankParameters]) -> Memory:
    """What a rank needs beside activations."""
    model, layout, workload = share.model, share.layout, share.workload
    dense, experts = sum(count.dense for count in parameters), sum(count.experts for count in parameters)
    replicas = layout.replicas
    weights = share.e * (dense + experts)
    gradients = optimizer = cache = 0.0
    if workload.training:
        sharded = layout.zero != "replicated"
        gradients = workload.grad_itemsize * (dense + experts)
        optimizer = (OPTIMIZER_BYTES + (FP32_GRADIENT_BYTES if workload.grad_itemsize < 4 else 0)) * (
            dense / (replicas if sharded else 1) + experts / (layout.expert_replicas if sharded else 1)
        )
        if layout.zero == "full":
            # Two layers' weights (one in use, the next on its way) and one layer's gradients are whole at a time.
            layer = model.layer_parameters(any(stage.moe for stage in chunks)) / layout.tp
            weights = 2 * share.e * layer
            gradients = workload.grad_itemsize * ((dense + experts) / replicas + layer)
    if not workload.training and layout.zero == "full":
        layer = model.layer_parameters(any(stage.moe for stage in chunks)) / layout.tp
        weights = share.e * ((dense + experts) / replicas + 2 * layer)
    if layout.gtp > 1:
        shared = sum(shared_parameters(share, stage) for stage in chunks)
        spared = shared - shared / layout.gtp
        gradients -= workload.grad_itemsize * spared if workload.training else 0.0
        # One layer's are whole, and the next one's on their way, or one layer's gradients.
        whole = share.block_shape(1, 0) if any(stage.dense for stage in chunks) else share.block_shape(0, 1)
        weights += share.e * (2 * whole.weights / layout.tp - spared)
    if share.rule.moves_weights:
        # Two layers' linears are whole on a head group at a time, or one and its gradient.
        block = share.block_shape(1, 0) if any(stage.dense for stage in chunks) else share.block_shape(0, 1)
        weights += 2 * share.e * (block.weights + block.biases) / layout.m
        # So are the vocabulary's while an end of the model uses them.
        if any((stage.first and share.moved_ends[0]) or (stage.last and share.moved_ends[1]) for stage in chunks):
            weights += share.e * model.vocab * model.D / layout.m
    if workload.mode == "decode":
        assert share.cached is not None, "exchanges without a cache are refused before"
        per_layer = share.cached.elements(share.groups) * share.e
        cache = float(share.micro_batches * per_layer * sum(stage.layers for stage in chunks))
    return Memory(weights, gradients, optimizer, 0.0, buffers(share, chunks), cache)


def _order(share: Share, rank: int) -> tuple[Task, ...]:
    """A rank's passes, of no more micro-batches than can be in flight."""
    pp, vpp = share.layout.pp, share.layout.vpp
    # 1F1B has at most pp in flight; an interleaved schedule, whose warm-up is 2 (pp - 1) + (vpp - 1) pp passes through
    # vpp chunks, less than 3 pp.
    enough = min(share.micro_batches, 3 * pp if vpp > 1 else 2 * pp)
    return pipeline_order(rank, pp, vpp, enough, True)
