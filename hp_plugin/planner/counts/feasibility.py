"""Why a layout cannot run a model: every rule that a launch would hit, in words and numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from hp_plugin.exchange.rules import RULES
from hp_plugin.planner.counts.memory import Memory
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.counts.stages import split_layers
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.machine.hardware import Hardware
from hp_plugin.refusal import Refusal, RefusedError

MAX_GPUS = 65_536
"""GPUs beyond which a number is taken for a typing error."""
MAX_STAGES = 512
"""Virtual pipeline stages beyond which a simulated step takes longer than anybody waits."""
SCORED = 2**20
"""Tokens beyond which sums of scores are not counted block by block."""
MEMORY = "memory"
"""Kind of the refusals whose amount is the bytes that are missing."""


def shape_refusals(share: Share) -> list[Refusal]:
    """Everything that keeps these sizes from fitting together; empty if nothing does."""
    model, layout = share.model, share.layout
    if layout.world > MAX_GPUS:
        return [Refusal("GPUs", f"{layout.world:,} GPUs are more than the {MAX_GPUS:,} that are planned")]
    found = [*width_refusals(model, layout), *_pipeline(model, layout)]
    found += [*_batch(share), *_features(share), *_experts(share)]
    return found or _exchange(share)


def stock_heads(h: int, g: int, tp: int) -> list[Refusal]:
    """What stock attention lacks to split h query and g key/value heads over `tp` ranks."""
    found = []
    if h % tp:
        found.append(Refusal("heads", f"h={h} query heads do not divide over TP={tp}"))
    if g % tp and tp % g:
        found.append(Refusal("kv heads", f"g={g} key/value heads neither divide over TP={tp} nor divide it"))
    return found


def width_refusals(model: ModelShape, layout: Layout) -> list[Refusal]:
    """What keeps heads and MLPs from dividing over the tensor-parallel ranks."""
    found: list[Refusal] = []
    if layout.shared > 1:
        found += _served_heads(model, layout)
    elif layout.grid is None:
        found += stock_heads(model.h, model.g, layout.tp)
    else:
        try:
            layout.grid.check_heads(model.h, model.g, model.d)
        except RefusedError as error:
            found += error.refusals
    if model.ffn % layout.tp and model.moe_layers < model.layers:
        found.append(Refusal("MLP width", f"MLP width {model.ffn} does not divide over TP={layout.tp}"))
    return found


def _served_heads(model: ModelShape, layout: Layout) -> list[Refusal]:
    """What ranks that share a cache in a server's way lack."""
    m, tp = layout.m, layout.tp
    if layout.dcp > 1:
        if m % model.g:
            said = f"dcp={layout.dcp} leaves TP/dcp = {m} ranks, no multiple of g={model.g}: they share whole caches"
            return [Refusal("decode context", said)]
        return stock_heads(model.h, model.g, tp)
    name = "kvp" if layout.kvp > 1 else "adp"
    if model.g % m or model.h % (tp if layout.kvp > 1 else m):
        said = f"{name}={layout.shared} leaves TP/{name} = {m} ranks for h={model.h} and g={model.g} heads"
        return [Refusal(f"{name} heads", said)]
    return []


def _pipeline(model: ModelShape, layout: Layout) -> list[Refusal]:
    if layout.stages > MAX_STAGES:
        return [Refusal("stages", f"pp·vpp = {layout.stages} stages are more than the {MAX_STAGES} that are planned")]
    if layout.vpp > 1 and layout.pp == 1:
        return [Refusal("virtual stages", f"vpp={layout.vpp} needs pipeline parallelism")]
    if layout.vpp > 1 and model.layers % layout.stages:
        said = f"{model.layers} layers do not divide over pp·vpp = {layout.stages} virtual stages"
        return [Refusal("layers", said)]
    if split_layers(model.layers, layout.stages) is None:
        return [Refusal("empty stage", f"{model.layers} layers leave a stage of {layout.stages} empty")]
    return []


def _batch(share: Share) -> list[Refusal]:
    layout, workload = share.layout, share.workload
    found = []
    per_step = layout.dp * layout.micro_batch
    if workload.global_batch % per_step:
        said = f"global batch {workload.global_batch} is no multiple of dp·mbs = {per_step}"
        found.append(Refusal("global batch", said))
    elif layout.vpp > 1 and share.micro_batches % layout.pp:
        said = f"{share.micro_batches} micro-batches are no multiple of pp={layout.pp}, as interleaving needs"
        found.append(Refusal("micro-batches", said))
    if layout.cp > 1 and workload.seq % (2 * layout.cp):
        said = f"sequence {workload.seq} is no multiple of 2·cp = {2 * layout.cp}"
        found.append(Refusal("context parallelism", said))
    if layout.sp and share.s % layout.tp:
        said = f"{share.s} positions do not divide over TP={layout.tp} for sequence parallelism"
        found.append(Refusal("sequence parallelism", said))
    return found


def _features(share: Share) -> list[Refusal]:
    model, layout, workload = share.model, share.layout, share.workload
    found = []
    if 0 < model.learned_positions < workload.seq:
        said = f"{workload.seq} positions are more than the model's {model.learned_positions} learned ones"
        found.append(Refusal("learned positions", said))
    if layout.tp_overlap and not layout.sp:
        found.append(Refusal("overlap", "tp_overlap (--tp-comm-overlap) needs sequence parallelism"))
    if workload.mode == "decode" and (layout.sp or layout.cp > 1 or layout.vpp > 1):
        said = "decode has one position per sequence: no sequence or context parallelism, no virtual stages"
        found.append(Refusal("decode", said))
    if layout.gtp > 1 and (layout.grid is not None or layout.cp > 1 or layout.zero == "full" or not workload.training):
        said = f"gtp={layout.gtp} is planned for training with stock attention, without context parallelism or FSDP"
        found.append(Refusal("shared weights", said))
    if layout.cp_heads > 1 and (
        layout.grid is not None
        or share.heads % layout.cp_heads
        or share.groups % layout.cp_heads
        or model.g < layout.tp
    ):
        said = (
            f"cp_heads={layout.cp_heads} must divide the {share.heads} query and {share.groups} key/value heads of a "
            "rank of stock attention"
        )
        found.append(Refusal("heads of context ranks", said))
    if layout.zero == "full" and (layout.pp * layout.cp * layout.ep > 1 or layout.n > 1):
        said = "zero=full (FSDP) is planned for data and tensor parallelism alone, on a grid with n=1"
        found.append(Refusal("FSDP", said))
    if not workload.training and (layout.recompute != "none" or layout.zero == "replicated"):
        found.append(Refusal("training only", "recompute and zero concern training only (but for zero=full)"))
    if layout.shared > 1 and workload.mode != "decode":
        found.append(Refusal("decode alone", "dcp, kvp and adp spread a cache: they concern decode"))
    if workload.mode == "decode" and layout.zero == "full":
        found.append(Refusal("FSDP in decode", "zero=full (FSDP) would gather all weights for every token"))
    return found


def _experts(share: Share) -> list[Refusal]:
    model, layout = share.model, share.layout
    if not model.experts:
        return [Refusal("no experts", f"ep={layout.ep} needs a model with experts")] if layout.ep > 1 else []
    found = []
    ranks = layout.tp * layout.cp * layout.dp
    if layout.zero == "full":
        found.append(Refusal("FSDP of experts", "zero=full (FSDP) is planned for dense models alone"))
    if model.experts % layout.ep:
        found.append(Refusal("experts", f"{model.experts} experts do not divide over ep={layout.ep}"))
    if ranks % layout.ep:
        found.append(Refusal("ep", f"ep={layout.ep} does not divide the {ranks} ranks of a pipeline stage"))
    if layout.moe == "megatron" and layout.grid is None and layout.ep == 1 < layout.tp and share.workload.training:
        said = (
            f"stock Megatron-Core leaves the gradients of experts that all TP={layout.tp} ranks hold (ep=1) unsummed: "
            "spread the experts over ranks (ep), or train on a grid"
        )
        found.append(Refusal("unsummed experts", said))
    if layout.moe == "megatron" and layout.tp > 1 and not layout.sp and share.workload.mode != "decode":
        said = "Megatron-Core runs MoE under TP only with sequence parallelism (sp)"
        found.append(Refusal("Megatron MoE", said))
    if layout.moe == "deepspeed":
        found += _deepspeed_experts(model, layout)
    return found


def _deepspeed_experts(model: ModelShape, layout: Layout) -> list[Refusal]:
    found = []
    if layout.cp > 1:
        said = f"DeepSpeed-MoE counts tokens per rank and cannot do context parallelism (cp={layout.cp})"
        found.append(Refusal("DeepSpeed-MoE cp", said))
    if layout.ep % layout.tp and layout.tp % layout.ep:
        said = f"DeepSpeed-MoE needs ep={layout.ep} to divide TP={layout.tp} or to be a multiple of it"
        found.append(Refusal("DeepSpeed-MoE ep", said))
    if model.top_k > 2:
        said = f"DeepSpeed-MoE beyond top-2 is not planned (top_k={model.top_k})"
        found.append(Refusal("DeepSpeed-MoE top-k", said))
    return found


def _exchange(share: Share) -> list[Refusal]:
    exchange = share.layout.exchange
    decode = share.workload.mode == "decode"
    asked = RULES.get(exchange)
    if decode and asked is not None and asked.cached(share.attention_shape) is None:
        # Said first: whether one position suits the exchange is beside the point.
        return [_no_cache(share, asked.name)]
    try:
        rule = share.rule
    except RefusedError as error:
        return [Refusal(f"exchange {exchange}", str(error))]
    pieces, samples = share.layout.kv_pieces, share.layout.micro_batch
    if pieces > 1 and (not decode or not rule.joined(share.attention_shape) or samples % pieces):
        said = f"kv_pieces={pieces} cuts the {samples} sequences of a micro-batch that decode beside caches by tokens"
        return [
            Refusal("pieces of caches", f"{said}: it must divide them, and ranks must join what parts of a cache gave")
        ]
    if share.layout.shared > 1:
        refusal = rule.refusal(share.attention_shape)
        return [] if refusal is None else [refusal]
    if share.workload.seq > SCORED and rule.score_blocks(replace(share.attention_shape, s=1)):
        return [Refusal("long scores", f"exchange `{rule.name}` is planned for up to {SCORED:,} tokens")]
    if share.layout.cp > 1:
        if not share.fused_attention:
            return [_no_fused_kernel(share)]
        if not rule.stock_core or rule.moves_weights:
            able = [other for other in RULES.values() if other.exact and other.stock_core and not other.moves_weights]
            others = _listed(other.name for other in able if other.refusal(share.attention_shape) is None)
            said = f"exchange `{rule.name}` cannot do context parallelism" + (f"; {others} can" if others else "")
            return [Refusal(f"context parallelism under {rule.name}", said)]
    return [_no_cache(share, rule.name)] if decode and share.cached is None else []


def _no_cache(share: Share, name: str) -> Refusal:
    shape = share.attention_shape
    others = _listed(other.name for other in RULES.values() if other.exact and other.cached(shape) is not None)
    return Refusal(f"cache under {name}", f"exchange `{name}` has no key/value cache; decode needs {others}")


def _no_fused_kernel(share: Share) -> Refusal:
    training = share.workload.training
    largest = share.fused_heads.training if training else share.fused_heads.forward
    said = (
        f"context parallelism {'trains' if training else 'runs'} with fused attention alone, which ends at head "
        f"dimension {largest}"
    )
    return Refusal("unfused context parallelism", said)


def _listed(names: Iterable[str]) -> str:
    return " or ".join(names)


def memory_refusal(needed: Memory, hardware: Hardware, capacity: float | None = None) -> Refusal | None:
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
    said = (
        f"needs {needed.total / 1e9:.1f} GB of {free / 1e9:.1f} GB that {whole / 1e9:.0f} GB leave "
        f"(most of it {largest}: {parts[largest] / 1e9:.1f} GB)"
    )
    return Refusal(MEMORY, said, needed.total - free)
