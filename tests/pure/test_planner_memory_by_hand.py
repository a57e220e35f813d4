"""Bytes that a rank keeps and holds, written out tensor by tensor for one small model.

D = 8, 4 query and 2 key/value heads of 4 channels, an MLP of 24, 2 layers; micro-batches of 2 sequences of 8 tokens, so
16 tokens, in 16 bit. A hidden state is 16 · 8 · 2 = 256 bytes. Of each layer, Megatron-Core keeps for backward:

    hidden states   4 · 256           = 1024   inputs of both norms; their outputs, which are QKV's and the MLP's inputs
    q, k, v         (4+2+2) · 4 · 16 · 2 = 1024   inputs of core attention
    output          4 · 4 · 16 · 2       =  512   of core attention, which is the projection's input
    statistics      4 heads · 16 · 4     =  256   fused attention's log-sum-exp, fp32
    MLP             2 · 24 · 16 · 2      = 1536   output of fc1, input of fc2

4352 bytes in all.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from hp_plugin.planner.counts.memory import Memory, memory_needed
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.attention_rate import FusedHeadDims
from hp_plugin.planner.machine.hardware import load_hardware

MODEL = ModelShape("tiny", 2, 8, 4, 2, 4, 24)
H100 = load_hardware("h100-ib")


def of(layout: str, mode: str = "train", batch: int = 8, grad_itemsize: int = 4, **changes: object) -> Memory:
    model = replace(MODEL, **changes)
    workload = Workload(mode, 8, batch, grad_itemsize=grad_itemsize)
    share = Share.on(H100, model, Layout.parse(f"{layout.replace('unfused', 'tp=1')},mbs=2"), workload)
    # A kernel for heads of up to 3 channels takes none of this model's.
    return memory_needed(replace(share, fused_heads=FusedHeadDims(3, 3)) if "unfused" in layout else share)


KEPT = {
    "dense": ("tp=1", {}, 4352),
    # fc1 has two halves, and fc2's input is their product: 3 · 24 · 16 · 2 = 2304 instead of 1536.
    "gated": ("tp=1", {"gated": True}, 4352 + 768),
    # A byte per element for each of the two dropouts of hidden states; fused attention draws its own again.
    "dropout": ("tp=1", {"dropout": True}, 4352 + 2 * 16 * 8),
    # Probabilities, 2 samples · 4 heads · 8 · 8 · 2 bytes, in place of the statistics.
    "unfused": ("unfused", {}, 4352 - 256 + 1024),
    # Also the probabilities that dropout leaves, and its mask of bytes: 2 + 2 + 1 bytes a score.
    "unfused dropout": ("unfused", {"dropout": True}, 4352 + 256 - 256 + 5 * 512),
    # Core attention is computed again from q, k and v.
    "unfused selective": ("unfused,recompute=selective", {"dropout": True}, 4352 + 256 - 256),
    # Two ranks share everything but hidden states.
    "tp=2": ("tp=2", {}, 1024 + 512 + 256 + 128 + 768),
    "tp=2 sp dropout": ("tp=2,sp", {"dropout": True}, 512 + 128 + 512 + 256 + 128 + 768),
    # Stock ranks beyond the 2 key/value heads: each keeps the q, k, v of all 4 (1024) beside its own (256).
    "tp=4": ("tp=4", {}, 1024 + 256 + 1024 - 256 + 128 + 64 + 384),
    # Whole heads of one sample: statistics 1 · 8 · 4 heads · 4; the output as attention made it, and as it was traded.
    "batch": ("grid=1x2,exchange=batch", {}, 1024 + 512 + 2 * 256 + 128 + 768),
    # The other rank's slices of k and v, too: (2+2) · 2 channels · 16 · 2 bytes.
    "sequence": ("grid=1x2,exchange=sequence", {}, 1024 + 512 + 256 + 2 * 256 + 128 + 768),
    # Slices stay, and scores are summed again in backward.
    "scores": ("grid=1x2,exchange=scores", {}, 1024 + 512 + 256 + 768),
    # All 4 heads are there, 2 channels wide: 16 · 4 · 4 bytes of statistics.
    "local": ("grid=1x2,exchange=local", {}, 1024 + 512 + 256 + 256 + 768),
}
# Experts in place of the MLP; 16 tokens seen by 2 experts each are 32 rows: in 8, inside 2 · 24 channels. What comes
# out is kept where gates weigh it behind the expert, as DeepSpeed's do; Megatron-Core's weigh it inside.
EXPERTS = {"experts": 4, "top_k": 2}
MOE = {
    "megatron": ("dp=2,ep=2", {}, 4352 - 1536 + 32 * (8 + 48) * 2),
    "megatron gated": ("dp=2,ep=2", {"gated": True}, 4352 - 1536 + 32 * (8 + 72) * 2),
    "megatron, one expert a token": ("dp=2,ep=2", {"top_k": 1}, 4352 - 1536 + 16 * (8 + 48) * 2),
    # Each of two ranks routes the 8 tokens that it holds.
    "megatron tp=2 sp": ("tp=2,sp,ep=2", {}, 512 + 512 + 256 + 128 + 16 * (8 + 48) * 2),
    # The gate's input in fp32, 16 · 8 · 4, and what either choice's expert gave for every token, 2 · 256.
    "deepspeed": ("dp=2,ep=2,moe=deepspeed", {}, 4352 - 1536 + 32 * (16 + 48) * 2 + 512 + 512),
    "deepspeed, one expert a token": (
        "dp=2,ep=2,moe=deepspeed",
        {"top_k": 1},
        4352 - 1536 + 16 * (16 + 48) * 2 + 512 + 256,
    ),
    # Half of the rows on each rank, but gate and choices of all tokens on both.
    "deepspeed tp=2": ("tp=2,ep=2,moe=deepspeed", {}, 1024 + 512 + 256 + 128 + 16 * (16 + 48) * 2 + 512 + 512),
}


@pytest.mark.parametrize(("layout", "changes", "per_layer"), KEPT.values(), ids=KEPT)
def test_kept_by_a_layer(layout: str, changes: dict[str, object], per_layer: int) -> None:
    assert of(layout, **changes).activations == 2 * per_layer


@pytest.mark.parametrize(("layout", "changes", "per_layer"), MOE.values(), ids=MOE)
def test_kept_by_a_layer_of_experts(layout: str, changes: dict[str, object], per_layer: int) -> None:
    assert of(layout, **{**EXPERTS, **changes}).activations == 2 * per_layer


def test_kept_where_some_layers_have_experts() -> None:
    moe = 4352 - 1536 + 32 * (8 + 48) * 2
    assert of("dp=2,ep=2", **EXPERTS, moe_every=2).activations == 4352 + moe
    # Layers 0 and 2 of 3.
    assert of("dp=2,ep=2", **EXPERTS, moe_every=2, layers=3).activations == 4352 + 2 * moe


def test_kept_behind_the_last_layer() -> None:
    """10 words: logits and their fp32 softmax, 10 · 16 · (2 + 4); input and output of the final norm, 2 · 256."""
    assert of("tp=1", vocab=10).activations == 2 * 4352 + 960 + 512
    assert of("tp=2,sp", vocab=10).activations == 2 * (512 + 512 + 256 + 128 + 768) + 480 + 256
    # Layers keep their inputs alone; nothing of the end is computed again.
    assert of("tp=1,recompute=full", vocab=10).activations == 2 * 256 + 960 + 512
    # Two stages of a layer: the first holds two micro-batches, which is more than the end's one and what is behind it.
    assert of("pp=2", vocab=10).activations == 2 * 4352
    assert of("pp=2", vocab=10, batch=2).activations == 4352 + 960 + 512


BUFFERS = {
    # Gathered tokens, their gradient and its sum, 3 · 256; fc1's output, 768, and q, k, v and the output of attention,
    # 1536, each with its gradient.
    "dense": ("tp=1", {}, 768 + 2 * 768 + 2 * 1536),
    "gated": ("tp=1", {"gated": True}, 768 + 4 * 768 + 2 * 1536),
    "tp=2": ("tp=2", {}, 768 + 768 + 1536),
    # Scores and their gradient, 2 · 4 · 8 · 8 · 2 bytes each.
    "unfused": ("unfused", {}, 5376 + 2 * 1024),
    # Gradients of the logits in 16 and 32 bit.
    "vocabulary": ("tp=1", {"vocab": 10}, 5376 + 160 * 6),
    # What is traded as it is sent and as it comes: all of q, k and v.
    "batch": ("grid=1x2,exchange=batch", {}, 3072 + 2 * 512),
    # q, and k and v once for each of the two ranks.
    "sequence": ("grid=1x2,exchange=sequence", {}, 3072 + 2 * (256 + 2 * 256)),
    "local": ("grid=1x2,exchange=local", {}, 3072),
    # 2 samples · 4 heads · 8 · 8 scores: four in 16 bit, four in fp32.
    "scores": ("grid=1x2,exchange=scores", {}, 3072 + 512 * (4 * 2 + 4 * 4)),
    # The layer that is being computed again.
    "full recomputation": ("tp=1,recompute=full", {}, 5376 + 4352),
}


@pytest.mark.parametrize(("layout", "changes", "held"), BUFFERS.values(), ids=BUFFERS)
def test_held_for_a_moment(layout: str, changes: dict[str, object], held: int) -> None:
    assert of(layout, **changes).buffers == held


def test_a_forward_pass_keeps_nothing_but_has_a_layer_at_a_time() -> None:
    found = of("tp=1", mode="forward")
    assert (found.activations, found.gradients, found.optimizer, found.buffers) == (0, 0, 0, 5376 + 4352)
    # Each rank has a chunk with experts (layers 0 and 3 of 4) and one without; the larger kind counts.
    mixed = of("pp=2,vpp=2,dp=2,ep=2", mode="forward", **EXPERTS, moe_every=3, layers=4)
    assert mixed.buffers == 5376 + 4352 - 1536 + 32 * (8 + 48) * 2


def test_only_the_last_stage_holds_gradients_of_logits() -> None:
    # The first of two stages is the fuller one, with two micro-batches; the last one alone has one and the end.
    assert of("pp=2", vocab=10).buffers == 5376
    assert of("pp=2", vocab=10, batch=2).buffers == 5376 + 960


def test_parameters_and_what_adam_keeps_of_each() -> None:
    """Attention 8·(4+2·2)·4 + 16·8 = 384, MLP 2·8·24 = 384, two LayerNorms 2·2·8 = 32: 800 a layer; at the end 16."""
    count = 2 * 800 + 16
    assert MODEL.parameters == count
    found = of("tp=1")
    assert (found.weights, found.gradients, found.optimizer) == (2 * count, 4 * count, 12 * count)
    # Gradients in 16 bit are copied to fp32 for the update.
    half = of("tp=1", grad_itemsize=2)
    assert (half.gradients, half.optimizer) == (2 * count, (12 + 4) * count)
    # Norms are on both ranks of TP = 2.
    split = 2 * (768 // 2 + 32) + 16
    assert (of("tp=2").weights, of("tp=2").optimizer) == (2 * split, 12 * split)
    # 4 experts in each of 2 layers, half of them on each rank; routers of 8 · 4.
    dense, experts = 2 * (384 + 32 + 32) + 16, 2 * 2 * 384
    found = of("dp=4,ep=2", **EXPERTS)
    assert (found.weights, found.gradients) == (2 * (dense + experts), 4 * (dense + experts))
    assert found.optimizer == 12 * (dense / 4 + experts / 2)
    replicated = of("dp=4,ep=2,zero=replicated", **EXPERTS)
    assert replicated.optimizer == 12 * (dense + experts)


def test_total_is_the_sum_of_all() -> None:
    assert Memory(1.0, 20.0, 300.0, 4000.0, 50000.0, 600000.0).total == 654321.0


def test_cached_keys_and_values() -> None:
    """8 sequences of 8 positions in 2 layers: k and v of 2 heads of 4 channels, 2 bytes."""
    whole = 8 * 8 * 2 * 2 * 2 * 4 * 2
    assert of("tp=1", mode="decode").cache == whole
    assert of("tp=1,dp=2", mode="decode").cache == whole / 2
    assert of("pp=2", mode="decode").cache == whole / 2
    assert of("grid=1x2,exchange=batch", mode="decode").cache == whole / 2
    assert of("grid=1x2,exchange=local", mode="decode").cache == whole / 2
    # Two of four stock ranks hold the same head.
    assert of("tp=4", mode="decode").cache == whole / 2
    assert of("tp=1").cache == of("tp=1", mode="forward").cache == 0
