"""Data-parallel traffic of one step: gradient reductions and weight gathers, in Megatron-Core's buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hp_plugin.planner.counts.gathering import replicated_parameters
from hp_plugin.planner.counts.program import Collective
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.counts.stages import RankParameters, Stage, row_biases


def bucket_parameters(replicas: int) -> int:
    """Megatron-Core's default bucket, in parameters (`DistributedDataParallel.__init__`)."""
    return max(40_000_000, 1_000_000 * replicas)


@dataclass(frozen=True)
class Sync:
    """The collectives of one chunk: gradients in the order their buckets fill, weights in the order they are used."""

    gradients: tuple[Collective, ...]
    weights: tuple[Collective, ...]


def chunk_sync(share: Share, parameters: RankParameters, rank: int, chunk: int) -> Sync:
    """Reductions and gathers of one model chunk; fully sharded data parallelism has them in every pass instead.

    Megatron-Core cuts buckets on the first pipeline rank's first chunk alone.
    """
    layout, workload = share.layout, share.workload
    if not workload.training or layout.zero == "full":
        return Sync((), ())
    gradients: list[Collective] = []
    weights: list[Collective] = []
    shared = shared_parameters(share, share.stages[chunk * layout.pp + rank]) if layout.gtp > 1 else 0.0
    groups = (
        ("dp", parameters.dense - shared, layout.replicas),
        ("gdp", shared / layout.gtp, layout.replicas // layout.gtp),
        ("edp", parameters.experts, layout.expert_replicas),
    )
    for axis, count, replicas in groups:
        if not count or replicas == 1:
            continue
        buckets = max(1, round(count / bucket_parameters(replicas))) if rank == chunk == 0 else 1
        size = count / buckets
        kind = "all_reduce" if layout.zero == "replicated" else "reduce_scatter"
        gradients += [Collective("reduce gradients", kind, axis, size * workload.grad_itemsize)] * buckets
        if layout.zero == "optimizer":
            weights += [Collective("gather weights", "all_gather", axis, size * share.e)] * buckets
    return Sync(tuple(gradients), tuple(weights))


def shared_parameters(share: Share, stage: Stage) -> float:
    """Parameters of a stage on one tensor-parallel rank that data-parallel ranks share: its linears' weights."""
    return share.block_shape(stage.dense, stage.moe).weights / share.layout.tp


def end_of_step(share: Share, chunks: Sequence[Stage]) -> tuple[Collective, ...]:
    """What follows the last backward pass of a rank with these virtual stages.

    Tied embeddings; norms of queries and keys; under sequence parallelism other norms, biases after row-parallel
    layers, and routers of Megatron-Core's MoE; the gradient norm.
    """
    model, layout = share.model, share.layout
    if not share.workload.training:
        return ()
    said: list[Collective] = []
    ends = any(stage.first or stage.last for stage in chunks)
    if model.tied and layout.pp > 1 and model.vocab and ends:
        size = model.vocab / layout.tp * model.D * share.workload.grad_itemsize
        said.append(Collective("sum tied embedding gradients", "all_reduce", "ends", size))
    # Each rank's gradient of the norms that all heads share comes from its own heads.
    shared = sum(stage.layers for stage in chunks) * model.qk_norm_parameters if layout.tp > 1 else 0
    if share.sp:
        shared += sum(2 * stage.layers + stage.last for stage in chunks) * model.norm_parameters
        shared += sum(row_biases(model, stage) for stage in chunks)
        if layout.moe == "megatron":
            shared += sum(stage.moe for stage in chunks) * model.D * model.experts
    if shared:
        said.append(Collective("sum norm gradients", "all_reduce", "tp", float(shared * share.workload.grad_itemsize)))
    if share.sums_replicas:
        layers = sum(stage.layers for stage in chunks)
        biases = sum(row_biases(model, stage) for stage in chunks)
        size = float(replicated_parameters(share, layers, biases) * share.workload.grad_itemsize)
        embedded, read = share.moved_ends
        if not share.sp:
            # Of the ends, what all ranks hold: positions and the last norm.
            whole = model.learned_positions * model.D if embedded and any(stage.first for stage in chunks) else 0
            whole += model.norm_parameters if read and any(stage.last for stage in chunks) else 0
            size += whole * share.workload.grad_itemsize
        if size:
            said.append(Collective("sum replicated gradients", "all_reduce", "dim", size))
    if layout.world > 1:
        said.append(Collective("gradient norm", "all_reduce", "world", 8.0))
    return tuple(said)


OPTIMIZER_BYTES_PER_PARAMETER = 34.0
"""Memory traffic of one Adam step per parameter: norm (4), fp32 gradient, weight and two moments read (16), three
written (12), 16-bit weight written (2)."""


def optimizer_bytes(share: Share, chunks: Sequence[RankParameters]) -> float:
    """Memory traffic at the end of a step on one rank: Adam on its shard, and passes over its whole gradients.

    Megatron-Core clears the gradient buffer and, before an averaging reduction, scales it
    (`megatron.core.distributed.param_and_grad_buffer`); FSDP's gradients are a shard by then.
    """
    layout = share.layout
    total = 0.0
    for count, replicas in (
        (sum(chunk.dense for chunk in chunks), layout.replicas),
        (sum(chunk.experts for chunk in chunks), layout.expert_replicas),
    ):
        mine = count if layout.zero == "replicated" else count / replicas
        passes = 1 if layout.zero == "full" or replicas == 1 else 3
        cleared = mine if layout.zero == "full" else count
        total += OPTIMIZER_BYTES_PER_PARAMETER * mine + passes * share.workload.grad_itemsize * cleared
    return total
