"""Layouts as text, and every reason why one cannot run a model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hp_plugin.config import HeadDimConfig
from hp_plugin.planner.counts.feasibility import MEMORY, memory_refusal, shape_refusals
from hp_plugin.planner.counts.memory import Memory
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import load_hardware
from hp_plugin.planner.seconds.step import predict

MODEL = ModelShape("m", 8, 64, 8, 4, 8, 256, 128)
TRAIN = Workload("train", 64, 32)


def problems(model: ModelShape, layout: str, workload: Workload) -> str:
    """All that keeps a layout from running on H100s, in words."""
    share = Share.on(load_hardware("h100-ib"), model, Layout.parse(layout), workload)
    return "; ".join(refusal.text for refusal in shape_refusals(share))


@pytest.mark.parametrize(
    "text",
    [
        "tp=8,pp=2,mbs=4",
        "grid=4x4,exchange=batch,mbs=8",
        "grid=4x2,exchange=scores,order=head-innermost,mbs=8",
        "tp=2,pp=2,vpp=2,cp=2,dp=2,mbs=1,sp,tp_overlap,recompute=full",
        "tp=1,dp=4,ep=4,mbs=2,zero=replicated,moe=deepspeed",
        "tp=1,dp=8,mbs=3,zero=full,fused=off",
    ],
)
def test_layouts_survive_the_round_trip_through_text(text: str) -> None:
    layout = Layout.parse(text)
    assert Layout.parse(str(layout)) == layout


def test_data_parallelism_fills_the_world() -> None:
    assert Layout.parse("tp=8,pp=2", 64).dp == 4
    layout = Layout.parse("grid=4x2", 16)
    assert (layout.tp, layout.dp, layout.grid) == (8, 2, HeadDimConfig(4, 2, "auto"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tp=8,ppp=2", "unknown key 'ppp'; did you mean pp"),
        ("tp=eight", "tp takes an integer, got 'eight'"),
        ("tp=0", "tp must be at least 1"),
        ("tp=2,tp=4", "tp is given twice"),
        ("grid=44", "grid takes MxN"),
        ("grid=4x4,tp=8", "grid 4x4 makes tp=16, not 8"),
        ("exchange=batch", "exchange=batch needs grid=MxN"),
        ("order=head-innermost", "order=head-innermost needs grid=MxN"),
        ("grid=2x2,order=heads", "unknown head-dim-order 'heads': choose from dim-innermost, head-innermost"),
        ("grid=2x2,exchange=bach", "unknown exchange 'bach'"),
        ("tp=2,sp=yes", "sp takes on or off"),
        ("tp=2,recompute=some", "recompute must be one of none, selective, full"),
        ("tp=3", "takes a multiple of tp·pp·cp = 3 GPUs, and 16 is none"),
        ("tp=2,dp=2", "takes tp·pp·cp·dp = 4 GPUs, not 16"),
    ],
)
def test_what_a_layout_cannot_say(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Layout.parse(text, 16)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tp=16", "h=8 query heads do not divide over TP=16"),
        ("grid=8x2", "m=8 must divide both num_attention_heads (8) and num_query_groups (4)"),
        ("grid=1x16", "n=16 must divide the head dimension kv_channels (8)"),
        ("pp=16", "8 layers leave a stage of 16 empty"),
        ("tp=2,vpp=2", "vpp=2 needs pipeline parallelism"),
        ("pp=2,vpp=3", "8 layers do not divide over pp·vpp = 6"),
        ("pp=4,vpp=2,mbs=16", "2 micro-batches are no multiple of pp=4"),
        ("dp=3", "global batch 32 is no multiple of dp·mbs = 3"),
        ("cp=64", "sequence 64 is no multiple of 2·cp = 128"),
        ("tp=2,tp_overlap", "tp_overlap (--tp-comm-overlap) needs sequence parallelism"),
        ("dp=2,ep=2", "ep=2 needs a model with experts"),
        ("pp=2,zero=full", "zero=full (FSDP) is planned for data and tensor parallelism alone"),
        ("grid=1x2,mbs=2,zero=full", "zero=full (FSDP) is planned for data and tensor parallelism alone"),
        ("grid=2x2,mbs=1,exchange=batch", "needs a micro-batch size divisible by n: 1 % 2 = 1"),
        ("grid=2x2,cp=2,mbs=2,exchange=sequence", "exchange `sequence` cannot do context parallelism; batch can"),
        ("grid=2x2,cp=2,mbs=2,exchange=scores", "exchange `scores` cannot do context parallelism; batch can"),
    ],
)
def test_why_a_layout_cannot_run(text: str, said: str) -> None:
    assert said in problems(MODEL, text, TRAIN)


def test_batch_is_named_where_it_fits_alone() -> None:
    assert problems(MODEL, "grid=2x2,cp=2,mbs=1,exchange=scores", TRAIN).endswith("cannot do context parallelism")
    assert "divisible by n" in problems(MODEL, "grid=2x2,cp=2,mbs=1,exchange=batch", TRAIN)


def test_context_parallelism_trains_with_fused_attention_alone() -> None:
    wide = replace(MODEL, d=512)
    unfused = "context parallelism trains with fused attention alone, which ends at head dimension 256"
    assert problems(wide, "tp=2,cp=2", TRAIN) == unfused
    assert problems(wide, "tp=2,cp=2", Workload("forward", 64, 32)) == ""
    assert problems(wide, "grid=2x2,cp=2,exchange=local", TRAIN) == ""


def test_sizes_that_do_run_have_no_problems() -> None:
    for text in ("tp=8", "grid=4x2,mbs=2", "grid=1x8,exchange=scores", "pp=4,vpp=2,mbs=8", "cp=2,tp=2,sp", "pp=3"):
        assert problems(MODEL, text, TRAIN) == "", text


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("tp=2,ep=3", "train", "8 experts do not divide over ep=3"),
        ("tp=2,ep=4", "train", "ep=4 does not divide the 2 ranks of a pipeline stage"),
        ("tp=2,ep=2", "train", "Megatron-Core runs MoE under TP only with sequence parallelism"),
        ("tp=2,ep=2", "forward", "Megatron-Core runs MoE under TP only with sequence parallelism"),
        ("tp=2,cp=2,ep=2,moe=deepspeed", "train", "cannot do context parallelism (cp=2)"),
        ("dp=2,zero=full", "train", "zero=full (FSDP) is planned for dense models alone"),
        ("grid=1x2,mbs=2,exchange=scores", "decode", "has no key/value cache; decode needs batch"),
        ("tp=2,sp", "decode", "decode has one position per sequence"),
        ("dp=2,recompute=full", "forward", "recompute and zero concern training only"),
    ],
)
def test_why_experts_or_decode_cannot_run(text: str, mode: str, said: str) -> None:
    model = replace(MODEL, experts=8, top_k=2)
    assert said in problems(model, text, Workload(mode, 64, 32))


def test_experts_and_the_dense_layers_between_them_have_their_own_rules() -> None:
    mixed = replace(MODEL, experts=12, moe_every=2, ffn=250)
    workload = Workload("train", 64, 36)
    said = problems(mixed, "tp=4,dp=3,ep=6,moe=deepspeed", workload)
    assert "DeepSpeed-MoE needs ep=6 to divide TP=4 or to be a multiple of it" in said
    assert "MLP width 250 does not divide over TP=4" in said
    only_experts = replace(mixed, moe_every=1)
    assert problems(only_experts, "tp=4,dp=3,ep=4,moe=deepspeed", workload) == ""


def test_communication_overlap_ends_with_the_node() -> None:
    model = ModelShape("wide", 2, 256, 32, 32, 8, 1024)
    hardware = load_hardware("h100-ib")
    predict(model, Layout.parse("tp=8,sp,tp_overlap"), TRAIN, hardware)
    with pytest.raises(ValueError, match="in one fast-link domain of 8, and TP=16 spans 2"):
        predict(model, Layout.parse("tp=16,sp,tp_overlap"), TRAIN, hardware)


def test_prediction_names_every_problem() -> None:
    with pytest.raises(ValueError, match=r"h=8 query heads .* TP=16; 8 layers leave a stage"):
        predict(MODEL, Layout.parse("tp=16,pp=16"), TRAIN, load_hardware("h100-ib"))


def test_memory_that_does_not_suffice_is_told_with_its_largest_part() -> None:
    hardware = load_hardware("h100-ib")
    needed = Memory(1e9, 2e9, 3e9, 70e9, 1e9, 0.0)
    refusal = memory_refusal(needed, hardware)
    assert refusal is not None
    assert refusal.text == "needs 77.0 GB of 74.0 GB that 80 GB leave (most of it activations: 70.0 GB)"
    assert (refusal.kind, refusal.amount) == (MEMORY, pytest.approx(3e9))
    assert memory_refusal(needed, hardware, 90e9) is None


@pytest.mark.parametrize(
    ("changes", "layout", "workload", "said"),
    [
        ({"learned_positions": 64}, "tp=1", TRAIN, ""),
        ({"learned_positions": 63}, "tp=1", TRAIN, "64 positions are more than the model's 63 learned ones"),
        ({"learned_positions": 0}, "tp=1", TRAIN, ""),
        ({"learned_positions": 1}, "tp=1", TRAIN, "64 positions are more than the model's 1 learned ones"),
        ({"experts": 4, "top_k": 2}, "dp=2,ep=2,moe=deepspeed", TRAIN, ""),
        ({"experts": 4, "top_k": 3}, "dp=2,ep=2,moe=deepspeed", TRAIN, "DeepSpeed-MoE beyond top-2 is not planned"),
        ({}, "tp=1,pp=1", TRAIN, ""),
        ({}, "tp=1,vpp=2", TRAIN, "vpp=2 needs pipeline parallelism"),
        ({}, "tp=1,ep=2,dp=2", TRAIN, "ep=2 needs a model with experts"),
        ({}, "cp=2", Workload("train", 6, 32), "sequence 6 is no multiple of 2·cp = 4"),
        ({}, "cp=2", Workload("train", 8, 32), ""),
    ],
)
def test_limits_hold_exactly_where_they_are(
    changes: dict[str, int], layout: str, workload: Workload, said: str
) -> None:
    found = problems(replace(MODEL, **changes), layout, workload)
    assert said in found and bool(said) == bool(found)


def test_memory_is_enough_to_the_byte() -> None:
    hardware = load_hardware("h100-ib")
    needed = Memory(10.0, 20.0, 30.0, 40.0, 50.0, 60.0)
    room = hardware["reserved_bytes"]
    assert memory_refusal(needed, hardware, room + 210.0) is None
    refused = memory_refusal(needed, hardware, room + 209.0)
    assert refused is not None and refused.amount == 1.0
    assert "most of it key/value cache" in refused.text
