"""Every kernel and every message that an exchange adds to attention, in order, for one small model.

4 query and 2 key/value heads of 4 channels; 2 sequences of 8 tokens in 16 bit. On a 1 × 2 grid a rank holds 2 channels
of all heads: q, k and v are (4+2+2) · 2 · 16 tokens · 2 = 512 bytes, the output of attention 256.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from hp_plugin.planner.counts.exchange import Exchanged, exchanged
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.attention_rate import FusedHeadDims
from tests.programs import listed

MODEL = ModelShape("tiny", 2, 8, 4, 2, 4, 24)


def parts(layout: str, mode: str = "train", **changes: object) -> Exchanged:
    return exchanged(Share(replace(MODEL, **changes), Layout.parse(f"{layout},mbs=2"), Workload(mode, 8, 8)))


def trade(what: str, size: int) -> list[tuple[object, ...]]:
    copy = (f"reorder {what}", 2 * size)
    return [copy, ("all_to_all", "dim", size), copy]


@pytest.mark.parametrize(
    ("exchange", "qkv", "attention"),
    [
        ("batch", 512, (4, 8, 8, 4)),  # whole heads of one sample
        # The slices of q, and those of k and v for either rank: (4 + 2 · 4) · 2 · 16 · 2. Half of the queries.
        ("sequence", 768, (8, 4, 8, 4)),
    ],
)
def test_trades(exchange: str, qkv: int, attention: tuple[int, ...]) -> None:
    found = parts(f"grid=1x2,exchange={exchange}")
    assert listed(found.before) == listed(found.before_gradient) == trade("qkv", qkv)
    assert listed(found.after) == listed(found.after_gradient) == trade("context", 256)
    assert listed(found.core) == [("attention", *attention)]
    assert listed(found.core_gradient) == [("attention gradient", *attention)]


@pytest.mark.parametrize(("layout", "attention"), [("tp=1", (8, 8, 8, 4)), ("grid=1x2,exchange=local", (8, 8, 8, 2))])
def test_nothing_is_traded(layout: str, attention: tuple[int, ...]) -> None:
    found = parts(layout)
    assert not any((found.before, found.after, found.after_gradient, found.before_gradient))
    assert listed(found.core) == [("attention", *attention)]


def test_scores() -> None:
    """One block of 8 × 8 scores of 2 · 4 heads, 512 in all."""
    found = parts("grid=1x2,exchange=scores", qk_norm=True)
    # All 2 channels of 6 heads have their partner on the other rank: 2 · 6 · 16 · 2 = 384 bytes come, of 768 put in.
    halves = [("pick rotary halves", 2 * 768), ("all_to_all", "dim", 768)]
    # LayerNorm sums for means and for variances: an fp32 number for each of 16 tokens and 4 query or 2 key heads.
    sums = [("all_reduce", "dim", 4 * 16 * 4), ("all_reduce", "dim", 4 * 16 * 2)] * 2
    assert listed(found.before) == sums + halves
    assert listed(found.before_gradient) == halves + sums
    assert found.after == found.after_gradient == ()
    softmax = ("softmax of blocks", (2 * 2 + 20) * 512)
    assert listed(found.core) == [
        ("partial scores", 8, 8, 2, 8),
        ("to context", 8, 2, 8, 8),
        softmax,
        ("all_reduce", "dim", 512 * 2),
    ]
    assert listed(found.core_gradient) == [
        ("partial scores", 8, 8, 2, 8),
        ("partial probability gradient", 8, 8, 2, 8),
        ("to value gradient", 8, 2, 8, 8),
        ("to query gradient", 8, 2, 8, 8),
        ("to key gradient", 8, 2, 8, 8),
        softmax,
        ("softmax gradient of blocks", (2 * 2 + 36) * 512),
        ("all_reduce", "dim", 2 * 512 * 2),
    ]
    (forward,), (backward,) = found.core, found.core_gradient
    assert forward.overlap and backward.overlap and forward.pieces == backward.pieces == 1
    assert all(kernel.slow for kernel in forward.kernels[2:] + backward.kernels[5:])


def test_without_a_kernel_attention_is_product_by_product() -> None:
    """512 scores; keys and values are repeated for 2 query heads each: read and written, 4 · 2 B · 8 · 8 · 4."""
    kernel_of_narrower_heads = FusedHeadDims(3, 3)
    narrow = Share(MODEL, Layout.parse("tp=1,mbs=2"), Workload("train", 8, 8), kernel_of_narrower_heads)
    softmax, expanded = ("softmax", 2 * 2 * 512), 4 * 2 * 8 * 8 * 4
    products = [("scores", 8, 8, 4, 8), softmax, ("context", 8, 4, 8, 8)]
    back = [
        ("value gradient", 8, 4, 8, 8),
        ("probability gradient", 8, 8, 4, 8),
        ("softmax gradient", 3 * 2 * 512),
        ("query gradient", 8, 4, 8, 8),
        ("key gradient", 8, 4, 8, 8),
    ]
    found = exchanged(narrow)
    assert listed(found.core) == [("expand k, v", expanded), *products]
    assert listed(found.core_gradient) == [*back, ("fold k, v gradients", expanded)]
    every_head_its_own = exchanged(replace(narrow, model=replace(MODEL, g=4)))
    assert listed(every_head_its_own.core) == products and listed(every_head_its_own.core_gradient) == back
    # Dropout reads and writes scores, and writes a mask of bytes.
    dropped = exchanged(replace(narrow, model=replace(MODEL, dropout=True)))
    assert listed(dropped.core)[3] == ("attention dropout", (2 * 2 + 1) * 512)
    assert listed(dropped.core_gradient)[2] == ("attention dropout gradient", (2 * 2 + 1) * 512)


def test_stock_gathers_what_it_has_too_few_heads_for() -> None:
    """Of 4 ranks and 2 key/value heads: the q, k and v of all, 32 rows · 16 · 2, are gathered and joined by a copy."""
    found = parts("tp=4")
    assert listed(found.before) == [("all_gather", "tp", 1024), ("join gathered qkv", 2 * 1024)]
    # Zeros written, the own part laid in, a copy taken apart.
    assert listed(found.before_gradient) == [("split qkv gradient", 3 * 1024), ("reduce_scatter", "tp", 1024)]
    assert listed(found.core) == [("attention", 2, 8, 8, 4)]


def test_context_parallelism_passes_keys_and_values_on() -> None:
    """Of 4 tokens and 2 samples: k and v of 2 heads, 2 · 2 · 2 · 4 · 4 · 2 bytes; in backward with their gradients."""
    found = parts("tp=1,cp=2")
    assert listed(found.core) == [("attention", 8, 4, 8, 4), ("send_recv", "cp", 256)]
    assert listed(found.core_gradient) == [("attention gradient", 8, 4, 8, 4), ("send_recv", "cp", 512)]
    assert found.core[0].overlap and found.core[0].pieces == 2


@pytest.mark.parametrize(
    ("layout", "read"),
    [
        ("tp=1", 2 * 2 * 2 * 8 * 4 * 2),  # k and v of 2 samples, 2 heads, 8 positions
        ("tp=2", 2 * 2 * 1 * 8 * 4 * 2),
        ("tp=4", 2 * 2 * 1 * 8 * 4 * 2),  # two ranks read the same head
        ("grid=1x2,exchange=batch", 2 * 1 * 2 * 8 * 4 * 2),
        ("grid=1x2,exchange=local", 2 * 2 * 2 * 8 * 2 * 2),
    ],
)
def test_decoding_reads_the_cache(layout: str, read: int) -> None:
    found = parts(layout, mode="decode")
    assert listed(found.core) == [("kv cache", read)] and found.core_gradient == ()


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_context_parallel_ranks_pass_keys_and_values_on_beside_attention(cp: int) -> None:
    """Each of cp - 1 times k and v of 2 heads of 4 channels, 8/cp positions of 2 samples; and their gradients."""
    found = parts(f"tp=1,cp={cp}")
    held = 2 * 2 * 2 * (8 // cp) * 4 * 2
    (block,), (gradient,) = found.core, found.core_gradient
    assert [(each.kind, each.axis, each.bytes) for each in block.collectives] == [("send_recv", "cp", held)] * (cp - 1)
    assert [each.bytes for each in gradient.collectives] == [2 * held] * (cp - 1)
    assert (
        (block.overlap, block.pieces) == (gradient.overlap, gradient.pieces) == ((True, cp) if cp > 1 else (False, 0))
    )
