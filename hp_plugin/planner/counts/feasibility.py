"""Why a layout cannot run a model: every rule that a launch would hit, in words and numbers."""

from __future__ import annotations

from hp_plugin.planner.counts.core_attention import FUSED_HEAD_DIM, is_fused
from hp_plugin.planner.counts.memory import Memory
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.counts.stages import split_layers
from hp_plugin.planner.machine.hardware import Hardware


def shape_problems(share: Share) -> list[str]:
    """Everything that keeps these sizes from fitting together; empty if nothing does."""
    problems = [*_heads(share), *_pipeline(share), *_batch(share), *_features(share)]
    return problems or _exchange(share)


def _heads(share: Share) -> list[str]:
    model, layout = share.model, share.layout
    said = []
    if layout.grid is None:
        if model.h % layout.tp:
            said.append(f"h={model.h} query heads do not divide over TP={layout.tp}")
        if model.g % layout.tp and layout.tp % model.g:
            said.append(f"g={model.g} key/value heads neither divide over TP={layout.tp} nor divide it")
    else:
        try:
            layout.grid.check_heads(model.h, model.g, model.d)
        except ValueError as error:
            said.append(str(error))
    if model.ffn % layout.tp and model.moe_layers < model.layers:
        said.append(f"MLP width {model.ffn} does not divide over TP={layout.tp}")
    return said


def _pipeline(share: Share) -> list[str]:
    model, layout = share.model, share.layout
    if layout.vpp > 1 and layout.pp == 1:
        return [f"vpp={layout.vpp} needs pipeline parallelism"]
    if layout.vpp > 1 and model.layers % layout.stages:
        return [f"{model.layers} layers do not divide over pp·vpp = {layout.stages} virtual stages"]
    if split_layers(model.layers, layout.stages) is None:
        return [f"{model.layers} layers leave a stage of {layout.stages} empty"]
    return []


def _batch(share: Share) -> list[str]:
    layout, workload = share.layout, share.workload
    said = []
    per_step = layout.dp * layout.micro_batch
    if workload.global_batch % per_step:
        said.append(f"global batch {workload.global_batch} is no multiple of dp·mbs = {per_step}")
    elif layout.vpp > 1 and workload.global_batch // per_step % layout.pp:
        count = workload.global_batch // per_step
        said.append(f"{count} micro-batches are no multiple of pp={layout.pp}, as interleaving needs")
    if layout.cp > 1 and workload.seq % (2 * layout.cp):
        said.append(f"sequence {workload.seq} is no multiple of 2·cp = {2 * layout.cp}")
    if layout.sp and share.s % layout.tp:
        said.append(f"{share.s} positions do not divide over TP={layout.tp} for sequence parallelism")
    return said


def _features(share: Share) -> list[str]:
    model, layout, workload = share.model, share.layout, share.workload
    said = []
    if 0 < model.learned_positions < workload.seq:
        said.append(f"{workload.seq} positions are more than the model's {model.learned_positions} learned ones")
    if layout.tp_overlap and not layout.sp:
        said.append("tp_overlap (--tp-comm-overlap) needs sequence parallelism")
    if workload.mode == "decode" and (layout.sp or layout.cp > 1 or layout.vpp > 1):
        said.append("decode has one position per sequence: no sequence or context parallelism, no virtual stages")
    if layout.zero == "full" and layout.tp * layout.pp * layout.cp * layout.ep > 1:
        said.append("zero=full (FSDP) is planned for data parallelism alone")
    if not workload.training and (layout.recompute != "none" or layout.zero != "optimizer"):
        said.append("recompute and zero concern training only")
    if not model.experts:
        if layout.ep > 1:
            said.append(f"ep={layout.ep} needs a model with experts")
        return said
    ranks = layout.tp * layout.cp * layout.dp
    if layout.zero == "full":
        said.append("zero=full (FSDP) is planned for dense models alone")
    if model.experts % layout.ep:
        said.append(f"{model.experts} experts do not divide over ep={layout.ep}")
    if ranks % layout.ep:
        said.append(f"ep={layout.ep} does not divide the {ranks} ranks of a pipeline stage")
    if layout.moe == "megatron" and layout.tp > 1 and not layout.sp and workload.mode != "decode":
        said.append("Megatron-Core runs MoE under TP only with sequence parallelism (sp)")
    if layout.moe == "deepspeed" and layout.cp > 1:
        said.append(f"DeepSpeed-MoE counts tokens per rank and cannot do context parallelism (cp={layout.cp})")
    if layout.moe == "deepspeed" and layout.ep % layout.tp and layout.tp % layout.ep:
        said.append(f"DeepSpeed-MoE needs ep={layout.ep} to divide TP={layout.tp} or to be a multiple of it")
    if layout.moe == "deepspeed" and model.top_k > 2:
        said.append(f"DeepSpeed-MoE beyond top-2 is not planned (top_k={model.top_k})")
    return said


def _exchange(share: Share) -> list[str]:
    layout, workload = share.layout, share.workload
    decode = workload.mode == "decode"
    # Asked first: whether one position suits `sequence` is beside the point.
    name = layout.grid.exchange if decode and layout.grid and layout.n > 1 else None
    if name not in ("sequence", "scores"):
        try:
            name = share.exchange
        except ValueError as error:
            return [str(error)]
    width = share.model.d // (layout.n if name == "local" else 1)
    if layout.cp > 1 and not is_fused(width, workload.training):
        return [f"context parallelism trains with fused attention alone, which ends at head dimension {FUSED_HEAD_DIM}"]
    if name in ("sequence", "scores"):
        if layout.cp > 1:
            return [f"exchange `{name}` cannot do context parallelism; batch can"]
        if decode:
            return [f"exchange `{name}` has no key/value cache; decode needs batch"]
    return []


def memory_problem(needed: Memory, hardware: Hardware, capacity: float | None = None) -> str | None:
    """Why the model does not fit into a device's memory (or into `capacity` bytes of it), or None."""
    whole = capacity if capacity is not None else hardware["memory_bytes"]
    free = max(0.0, whole - hardware["reserved_bytes"])
    if needed.total <= free:
        return None
    parts = {
        "weights": needed.weights,
        "gradients": needed.gradients,
        "optimizer": needed.optimizer,
        "activations": needed.activations,
        "buffers": needed.buffers,
        "key/value cache": needed.cache,
    }
    largest = max(parts, key=lambda part: parts[part])
    return (
        f"needs {needed.total / 1e9:.1f} GB of {free / 1e9:.1f} GB that {whole / 1e9:.0f} GB leave "
        f"(most of it {largest}: {parts[largest] / 1e9:.1f} GB)"
    )
