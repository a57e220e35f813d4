"""Every kernel and every message of a dense layer, and what ends a step, in order, for one small model.

D = 8, 4 query and 2 key/value heads of 4 channels, an MLP of 24; 16 tokens in 16 bit, so that a hidden state is 256
bytes. QKV has (4+2+2) · 4 = 32 rows, the projection 4 · 4 = 16 columns.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from hp_plugin.planner.counts.gradients import bucket_parameters, end_of_step
from hp_plugin.planner.counts.layer import layer_passes
from hp_plugin.planner.counts.program import FusedAttention, kernels
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from tests.programs import listed

MODEL = ModelShape("tiny", 2, 8, 4, 2, 4, 24)


def share(layout: str, **changes: object) -> Share:
    return Share(replace(MODEL, **changes), Layout.parse(f"{layout},mbs=2"), Workload("train", 8, 8))


def test_a_layer_on_one_rank() -> None:
    passes = layer_passes(share("tp=1"), moe=False)
    # A norm reads and writes a hidden state; a residual reads two and writes one; q and k are rotated in place.
    norm, residual, rotary = ("norm", 2 * 256), ("residual", 3 * 256), ("rotary embedding", 2 * (4 + 2) * 4 * 16 * 2)
    assert listed(passes.forward) == [
        norm,
        ("qkv", 16, 32, 8, 1),
        rotary,
        ("attention", 2 * 4, 8, 8, 4),  # 2 samples of 4 heads
        ("proj", 16, 8, 16, 1),
        residual,
        norm,
        ("fc1", 16, 24, 8, 1),
        ("activation", (24 + 24) * 16 * 2),
        ("fc2", 16, 8, 24, 1),
        residual,
    ]
    norm_gradient = ("norm", 3 * 256)
    assert listed(passes.backward) == [
        residual,
        ("fc2 input gradient", 16, 24, 8, 1),
        ("fc2 weight gradient", 8, 24, 16, 1, "+="),
        ("activation gradient", (24 + 24 + 24) * 16 * 2),
        ("fc1 input gradient", 16, 8, 24, 1),
        ("fc1 weight gradient", 24, 8, 16, 1, "+="),
        norm_gradient,
        residual,
        ("proj input gradient", 16, 16, 8, 1),
        ("proj weight gradient", 8, 16, 16, 1, "+="),
        ("attention gradient", 2 * 4, 8, 8, 4),
        rotary,
        ("qkv input gradient", 16, 8, 32, 1),
        ("qkv weight gradient", 32, 8, 16, 1, "+="),
        norm_gradient,
    ]


def test_a_layer_under_sequence_parallelism_with_dropout() -> None:
    """Norms and residuals see half of the tokens; a dropout's mask is a byte for each of 64 elements."""
    passes = layer_passes(share("tp=2,sp", dropout=True, gated=True), moe=False)
    norm, residual, rotary = ("norm", 256), ("residual", 3 * 128 + 64), ("rotary embedding", 2 * 3 * 4 * 16 * 2)
    gather, scatter = ("all_gather", "tp", 256), ("reduce_scatter", "tp", 256)
    assert listed(passes.forward) == [
        norm,
        gather,
        ("qkv", 16, 16, 8, 1),
        rotary,
        ("attention", 2 * 2, 8, 8, 4),
        ("proj", 16, 8, 8, 1),
        scatter,
        residual,
        norm,
        gather,
        ("fc1", 16, 24, 8, 1),  # both halves of 12
        ("activation", (24 + 12) * 16 * 2),
        ("fc2", 16, 8, 12, 1),
        scatter,
        residual,
    ]
    norm_gradient = ("norm", 3 * 128)
    assert listed(passes.backward) == [
        residual,
        gather,
        ("fc2 input gradient", 16, 12, 8, 1),
        ("fc2 weight gradient", 8, 12, 16, 1, "+="),
        ("activation gradient", (24 + 24 + 12) * 16 * 2),
        ("fc1 input gradient", 16, 8, 24, 1),
        gather,
        ("fc1 weight gradient", 24, 8, 16, 1, "+="),
        scatter,
        norm_gradient,
        residual,
        gather,
        ("proj input gradient", 16, 8, 8, 1),
        ("proj weight gradient", 8, 8, 16, 1, "+="),
        ("attention gradient", 2 * 2, 8, 8, 4),
        rotary,
        ("qkv input gradient", 16, 8, 16, 1),
        gather,
        ("qkv weight gradient", 16, 8, 16, 1, "+="),
        scatter,
        norm_gradient,
    ]


def test_norms_in_kernels_of_their_own_move_twice_as_much() -> None:
    apart = listed(layer_passes(share("tp=1,fused=off"), moe=False).forward)
    assert apart[0] == ("norm", 2 * 2 * 256)
    assert listed(layer_passes(share("tp=1,fused=off"), moe=False).backward)[-1] == ("norm", 2 * 3 * 256)


def test_norms_behind_attention_and_mlp() -> None:
    """As Gemma has them: one norm more before each residual, and its gradient behind the residual's."""
    passes = layer_passes(share("tp=1", norms=4), moe=False)
    forward, backward = listed(passes.forward), listed(passes.backward)
    assert [at for at, one in enumerate(forward) if one == ("norm", 512)] == [0, 5, 7, 11]
    assert [forward[at][0] for at in (4, 6, 10, 12)] == ["proj", "residual", "fc2", "residual"]
    assert [at for at, one in enumerate(backward) if one == ("norm", 768)] == [1, 7, 9, 16]
    assert [backward[at][0] for at in (0, 2, 8, 10)] == [
        "residual",
        "fc2 input gradient",
        "residual",
        "proj input gradient",
    ]


def test_a_quarter_of_the_channels_is_rotated() -> None:
    whole, quarter = (
        dict(listed(layer_passes(share("tp=1", **changes), moe=False).forward)[2:3])
        for changes in ({}, {"rotary_percent": 0.25})
    )
    assert whole == {"rotary embedding": 1536} and quarter == {"rotary embedding": 384}


def test_fully_sharded_layers_flatten_their_gradients() -> None:
    """800 parameters (attention 384, MLP 384, norms 32): joined 2 + 2, cast 2 + 4, divided 4 + 4 bytes."""
    passes = layer_passes(share("dp=4,zero=full"), moe=False)
    assert ("flat gradients", (4 + 6 + 8) * 800) in listed(passes.backward)
    weights, gradients = ("all_gather", "dp", 2 * 800), ("reduce_scatter", "dp", 4 * 800)
    assert listed(passes.forward)[-1] == weights and listed(passes.backward)[-2:] == [weights, gradients]


def ending(layout: str, rank: int = 0, **changes: object) -> dict[str, tuple[str, str, float]]:
    mine = share(layout, **changes)
    pp = mine.layout.pp
    return {one.name: (one.kind, one.axis, one.bytes) for one in end_of_step(mine, mine.stages[rank::pp])}


def test_what_ends_a_step() -> None:
    """Gradients in fp32: of what every tensor-parallel rank has its own part of a sum of, and of tied embeddings."""
    norm = {"gradient norm": ("all_reduce", "world", 8.0)}
    assert ending("tp=1") == {}
    assert ending("tp=2") == ending("pp=2") == norm
    # Two LayerNorms a layer and one at the end, 2 · 8 numbers each.
    assert ending("tp=2,sp") == norm | {"sum norm gradients": ("all_reduce", "tp", (2 * 2 + 1) * 16 * 4)}
    # Biases of 8 behind projection and MLP of both layers.
    biases = 2 * 2 * 8
    assert ending("tp=2,sp", biases=True)["sum norm gradients"][2] == ((2 * 2 + 1) * 16 + biases) * 4
    # Routers of 8 · 4 in both layers, and biases behind the projections alone; DeepSpeed's layer sums its own.
    experts = {"experts": 4, "top_k": 2, "biases": True}
    assert ending("tp=2,sp,ep=2", **experts)["sum norm gradients"][2] == (80 + 2 * 8 + 2 * 32) * 4
    assert ending("tp=2,sp,ep=2,moe=deepspeed", **experts)["sum norm gradients"][2] == (80 + 2 * 8) * 4
    # Norms of queries and of keys, 4 + 4 numbers with biases 4 + 4 more, of both layers: also without sp.
    assert ending("tp=1", qk_norm=True) == {}
    assert ending("tp=2", qk_norm=True)["sum norm gradients"][2] == 2 * 16 * 4
    # 10 words of 8 on the first and on the last of the stages, but on none between them.
    tied = {"sum tied embedding gradients": ("all_reduce", "ends", 10 * 8 * 4)}
    model = {"vocab": 10, "tied": True, "layers": 3}
    assert ending("pp=3", 0, **model) == ending("pp=3", 2, **model) == norm | tied
    assert ending("pp=3", 1, **model) == norm and ending("pp=2", 1, **model) == norm | tied
    assert ending("dp=2", **model) == norm


def test_buckets_of_gradients_grow_with_the_replicas() -> None:
    """Megatron-Core's default: 40 million parameters, or a million for each replica where that is more."""
    assert [bucket_parameters(replicas) for replicas in (1, 40, 41, 1000)] == [
        40_000_000,
        40_000_000,
        41_000_000,
        1_000_000_000,
    ]


@pytest.mark.parametrize(
    ("window", "pairs"), [(0, 32.0), (1, 8 * 1 - 0.5), (2, 8 * 2 - 2.0), (7, 8 * 7 - 24.5), (8, 32.0)]
)
def test_a_window_leaves_its_pairs_and_no_others(window: int, pairs: float) -> None:
    """Of 8 queries' 8 · 8 / 2 pairs s · w - w²/2, forward, backward and when core attention is computed again."""
    passes = layer_passes(share("tp=1", window=window), moe=False)
    for program in (passes.forward, passes.backward):
        assert [each.pairs for each in kernels(program) if isinstance(each, FusedAttention)] == [pairs]
    again = layer_passes(share("tp=1,recompute=selective", window=window), moe=False).backward
    assert [each.pairs for each in kernels(again) if isinstance(each, FusedAttention)] == [pairs] * 2
    # In every second of two layers all is seen: priced at the mean.
    mixed = layer_passes(share("tp=1", window=window, window_every=2), moe=False).forward
    assert [each.pairs for each in kernels(mixed) if isinstance(each, FusedAttention)] == [(pairs + 32) / 2]
