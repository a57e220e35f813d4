"""Whether attention is fused is the machine's to say: by the head dimensions that its own kernel takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hp_plugin.planner.counts.activations import layer_activations
from hp_plugin.planner.counts.feasibility import shape_refusals
from hp_plugin.planner.counts.layer import attention_backward, attention_forward
from hp_plugin.planner.counts.program import FusedAttention, kernels
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.attention_rate import FusedHeadDims
from hp_plugin.planner.machine.hardware import Hardware, load_hardware
from hp_plugin.planner.search.plan import fitting
from hp_plugin.planner.seconds.step import predict

H100 = load_hardware("h100-ib")
# Its only kernel ends at 128.
NARROW = replace(H100, name="narrow", kernels=("triton-fa1",))
MODEL = ModelShape("m", 4, 1024, 8, 8, 256, 4096)
TRAIN = Workload("train", 512, 16)


def share(hardware: Hardware, layout: str, d: int, workload: Workload = TRAIN) -> Share:
    return Share.on(hardware, replace(MODEL, d=d), Layout.parse(layout), workload)


def is_fused(mine: Share) -> bool:
    programs = attention_forward(mine) + attention_backward(mine)
    return any(isinstance(kernel, FusedAttention) for kernel in kernels(programs))


def test_shipped_kernels_end_where_their_sources_say() -> None:
    assert H100.attention_kernel(True).head_dims == FusedHeadDims(256, None)
    assert H100.attention_kernel(False).head_dims == FusedHeadDims(256, 256)
    assert load_hardware("a100-ib").attention_kernel(True).head_dims == FusedHeadDims(256, 256)
    assert NARROW.attention_kernel(True).head_dims == FusedHeadDims(128, 128)


@pytest.mark.parametrize(
    ("hardware", "d", "mode", "fused"),
    [
        (H100, 256, "train", True),
        (H100, 264, "train", False),
        (H100, 512, "forward", True),
        (NARROW, 128, "train", True),
        (NARROW, 136, "train", False),
        (NARROW, 256, "train", False),
        (NARROW, 256, "forward", False),
        (load_hardware("a100-ib"), 512, "forward", False),
    ],
)
def test_attention_is_fused_as_far_as_the_machines_kernel_goes(
    hardware: Hardware, d: int, mode: str, fused: bool
) -> None:
    assert is_fused(share(hardware, "tp=2,mbs=2", d, replace(TRAIN, mode=mode))) == fused
    # Slices that are heads of their own are as narrow as they are.
    assert is_fused(share(hardware, "grid=1x4,exchange=local,mbs=4", d, replace(TRAIN, mode=mode)))


def test_a_plain_stack_ends_with_its_own_kernel() -> None:
    forward = replace(TRAIN, mode="forward")
    assert is_fused(share(H100, "mbs=2", 512, forward))
    assert not is_fused(share(H100, "mbs=2,fused=off", 512, forward))


def test_a_wide_head_is_priced_unfused_where_the_only_kernel_is_narrow() -> None:
    layout = Layout.parse("tp=2,mbs=4")
    narrow, wide = predict(MODEL, layout, TRAIN, NARROW), predict(MODEL, layout, TRAIN, H100)
    assert "attention" in wide.kernels and "attention" not in narrow.kernels
    assert {"scores", "value gradient"} <= set(narrow.kernels)
    assert narrow.step > wide.step


def test_memory_holds_scores_where_the_only_kernel_is_narrow() -> None:
    scores = 4 * (8 // 2) * 512 * 512 * 2  # samples, heads, s², bytes
    statistics = 4 * (8 // 2) * 512 * 4
    for layout in ("tp=2,mbs=4", "grid=1x2,exchange=batch,mbs=8"):
        narrow, wide = share(NARROW, layout, 256), share(H100, layout, 256)
        kept = layer_activations(narrow, False, "none") - layer_activations(wide, False, "none")
        samples = layout.count("batch") + 1  # the grid's heads are all 8, its samples half of 8
        assert kept == pytest.approx(samples * (scores - statistics))
    found = predict(MODEL, Layout.parse("tp=2,mbs=4"), TRAIN, NARROW)
    wide_found = predict(MODEL, Layout.parse("tp=2,mbs=4"), TRAIN, H100)
    assert found.memory.activations - wide_found.memory.activations == pytest.approx(4 * (scores - statistics))
    assert found.memory.buffers - wide_found.memory.buffers == pytest.approx(2 * scores)


def test_only_scores_make_selective_recomputation_worth_trying() -> None:
    layout = Layout.parse("tp=2,mbs=4")
    needed = predict(MODEL, layout, TRAIN, NARROW).memory.total + NARROW["reserved_bytes"]
    assert fitting(MODEL, layout, TRAIN, NARROW, needed).layout.recompute == "none"
    assert fitting(MODEL, layout, TRAIN, NARROW, needed - 1).layout.recompute == "selective"
    needed = predict(MODEL, layout, TRAIN, H100).memory.total + H100["reserved_bytes"]
    assert fitting(MODEL, layout, TRAIN, H100, needed - 1).layout.recompute == "full"


def test_context_parallelism_ends_with_the_kernel() -> None:
    assert shape_refusals(share(H100, "tp=2,cp=2,mbs=2", 256)) == []
    (refusal,) = shape_refusals(share(NARROW, "tp=2,cp=2,mbs=2", 256))
    assert refusal.kind == "unfused context parallelism"
    assert refusal.text.endswith("trains with fused attention alone, which ends at head dimension 128")
    (refusal,) = shape_refusals(share(NARROW, "tp=2,cp=2,mbs=2", 256, replace(TRAIN, mode="forward")))
    assert refusal.text.endswith("runs with fused attention alone, which ends at head dimension 128")
