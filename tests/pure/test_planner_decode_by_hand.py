"""Decoding one token against a cache, written out: what a rank caches, reads, holds and sends.

4 query and 2 key/value heads of 4 channels; 2 sequences with 64 tokens each in the cache, in 16 bit.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from hp_plugin.exchange.rules import RULES
from hp_plugin.planner.counts.exchange import exchanged
from hp_plugin.planner.counts.feasibility import shape_refusals
from hp_plugin.planner.counts.layer import attention_forward, layer_passes
from hp_plugin.planner.counts.memory import memory_needed
from hp_plugin.planner.counts.program import Program, received
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.counts.stages import stage_parameters
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import load_hardware
from hp_plugin.planner.reports.long_context import BATCHES, SIDES, case, case_lines, sequences_that_fit, side
from hp_plugin.planner.search.candidates import Search, candidate_layouts
from hp_plugin.planner.seconds.pricing import Cost, Pricer, group_placements
from tests.programs import listed

MODEL = ModelShape("tiny", 2, 8, 4, 2, 4, 24)
H100 = load_hardware("h100-ib")


def share(layout: str, batch: int = 8, cached: int = 64, **changes: object) -> Share:
    layout = layout if "mbs" in layout else f"{layout},mbs=2"
    return Share.on(H100, replace(MODEL, **changes), Layout.parse(layout), Workload("decode", cached, batch))


WHOLE = 2 * 2 * 2 * 64 * 4 * 2
"""Keys and values, of 2 sequences, 2 heads, 64 tokens, 4 channels, 2 bytes."""

CACHES = {
    "tp=1": WHOLE,
    "tp=2": WHOLE // 2,
    "tp=4": WHOLE // 2,  # two ranks have the same head
    "tp=4,dcp=2": WHOLE // 4,
    "tp=4,kvp=2": WHOLE // 4,
    "tp=4,kvp=4": WHOLE // 4,
    "tp=4,adp=2": WHOLE // 4,
    "grid=2x2,exchange=batch": WHOLE // 4,
    "grid=2x2,exchange=sequence": WHOLE // 4,
    "grid=1x4,exchange=sequence": WHOLE // 4,
    "grid=1x4,exchange=sequence,mbs=1": WHOLE // 8,  # fewer sequences than slices
    "grid=1x2,exchange=auto,mbs=1": WHOLE // 4,
    "grid=1x2,exchange=local": WHOLE // 2,
}


@pytest.mark.parametrize("layout", CACHES)
def test_what_is_cached_is_read_once_per_token(layout: str) -> None:
    mine = share(layout)
    assert not shape_refusals(mine)
    assert listed(exchanged(mine).core) == [("kv cache", CACHES[layout])]
    # Of every micro-batch and layer.
    assert memory_needed(mine).cache == mine.micro_batches * 2 * CACHES[layout]


def test_the_rank_with_one_token_more_has_to_hold_it() -> None:
    """41 tokens of each sequence: the first of two ranks has 21."""
    for layout, tokens in (("grid=2x2,exchange=sequence", 21), ("tp=4,dcp=2", 21), ("tp=4", 41)):
        assert listed(exchanged(share(layout, cached=41)).core) == [("kv cache", 2 * 2 * 1 * tokens * 4 * 2)]


def test_a_window_is_all_that_is_read_of_a_cache() -> None:
    assert listed(exchanged(share("tp=2", window=16)).core) == [("kv cache", WHOLE / 2 / 4)]
    assert memory_needed(share("tp=2", window=16)).cache == 4 * 2 * WHOLE / 2, "and all of it is kept"


JOINED = {
    # Queries, keys and values of both sequences, (4+2+2) · 4 channels · 2 · 2 bytes, come together; outputs of 4 heads,
    # and to each of 2 ranks an fp32 number for each head and sequence beside them.
    "grid=1x2,exchange=sequence": (128, 64, 2 * 2 * 4 * 4),
    # 2 query heads of the head group, a key and a value.
    "grid=2x2,exchange=sequence": (64, 32, 2 * 2 * 2 * 4),
    # Keys and values are made where they are cached; a rank gathers the other one's query.
    "tp=4,dcp=2": (32, 32, 2 * 2 * 2 * 4),
    # And queries are made on both.
    "tp=4,kvp=2": (0, 32, 2 * 2 * 2 * 4),
}


@pytest.mark.parametrize("layout", JOINED)
def test_outputs_of_parts_of_a_cache_are_joined(layout: str) -> None:
    gathered, outputs, sums = JOINED[layout]
    found = exchanged(share(layout))
    before = [("all_gather", "dim", gathered), ("order qkv", 2 * gathered)] if gathered else []
    assert listed(found.before) == before
    both = outputs + sums
    join = ("join outputs", both + outputs / 2)
    assert listed(found.after) == [("order partial outputs", 2 * both), ("all_to_all", "dim", both), join]


@pytest.mark.parametrize("layout", JOINED)
def test_trades_beside_attention_in_pieces_are_hidden_but_for_one(layout: str) -> None:
    whole, pieces = share(layout), share(f"{layout},kv_pieces=2")
    assert not shape_refusals(pieces)
    one, other = exchanged(whole), exchanged(pieces)
    assert listed(one.before) == listed(other.before)
    # The same bytes are read, copied and sent in two halves, and joined at once.
    reads, copies, trade, join = *listed(one.core), *listed(one.after)
    halves = [(name, *rest, size / 2) for name, *rest, size in (reads, copies, trade)]
    assert sorted(listed(other.core)) == sorted(halves * 2)
    assert listed(other.after) == [join]
    exposed, hidden = priced(one.core + one.after), priced(other.core)
    assert not exposed.hidden_by.get("dim") and hidden.hidden_by["dim"] > 0
    sent = hidden.exposed_by["dim"] + hidden.hidden_by["dim"]
    # Two collectives' latencies, of which the last one's has nothing beside it.
    assert sent > exposed.exposed_by["dim"] and hidden.exposed_by["dim"] >= sent / 2


def priced(program: Program) -> Cost:
    layout = Layout.parse("tp=4,kvp=2,mbs=2")
    return Pricer(H100, group_placements(layout, H100), 2).cost(program)


@pytest.mark.parametrize("exchange", [name for name, rule in RULES.items() if rule.exact])
@pytest.mark.parametrize(("m", "n", "b"), [(2, 2, 6), (3, 4, 4), (1, 5, 3), (6, 2, 1)])
def test_a_token_moves_what_the_rules_say(exchange: str, m: int, n: int, b: int) -> None:
    odd = ModelShape("odd", 3, 40, 12, 6, 20, 120, 104, gated=True)
    mine = Share.on(
        H100, odd, Layout.parse(f"grid={m}x{n},exchange={exchange},mbs={b}"), Workload("decode", 1000, 12 * b)
    )
    if shape_refusals(mine):
        said = " ".join(refusal.text for refusal in shape_refusals(mine))
        assert "has no key/value cache" in said or f"{b} % {n} = {b % n}" in said
        return
    moved = received(attention_forward(mine), {"tp": m * n, "dim": n, "head": m}).get("dim", 0.0)
    assert moved == pytest.approx(mine.rule.bytes(mine.attention_shape, 2), rel=1e-12)


ATTENTION = {
    # QKV has (4+2+2) · 4 rows of 8 and the projection 16 columns of 8: 384 parameters, 96 on each of four ranks.
    "tp=4": 96,
    # A query head and a whole key and value head; the projection's fourth.
    "tp=4,dcp=2": (1 + 2) * 4 * 8 + 32,
    # Both query heads of the two ranks.
    "tp=4,kvp=2": (2 + 2) * 4 * 8 + 32,
    # Half of everything, or all of it.
    "tp=4,adp=2": 192,
    "tp=4,adp=4": 384,
}


@pytest.mark.parametrize("layout", ATTENTION)
def test_weights_of_attention_on_a_rank(layout: str) -> None:
    mine = share(layout, batch=4)
    layer = ATTENTION[layout] + 2 * 24 * 8 // 4 + 2 * 16  # and a fourth of the MLP, and two norms
    found = stage_parameters(MODEL, mine.layout, mine.stages[0])
    assert found.dense == 2 * layer + 16
    assert memory_needed(mine).weights == 2 * found.dense


def test_attention_data_parallelism_by_hand() -> None:
    """2 of 4 ranks split heads, each pair has one of two sequences; a hidden state of a token is 16 bytes."""
    program = listed(layer_passes(share("tp=4,adp=2"), False).forward)
    assert program == [
        ("norm", 32),
        ("qkv", 1, 16, 8, 1),
        ("rotary embedding", 2 * (4 + 2) * 4 / 2 * 2),
        ("kv cache", WHOLE // 4),
        ("proj", 1, 8, 8, 1),
        ("all_reduce", "head", 16),
        ("residual", 48),
        ("norm", 32),
        ("all_gather", "dim", 32),
        ("fc1", 2, 6, 8, 1),
        ("activation", 2 * 2 * 6 * 2),
        ("fc2", 2, 8, 6, 1),
        ("all_reduce", "tp", 32),
        ("residual", 48),
    ]
    alone = listed(layer_passes(share("tp=2,adp=2"), False).forward)
    assert [each for each in alone if each[0] in ("all_gather", "all_reduce", "reduce_scatter")] == [
        ("all_gather", "dim", 32),
        ("reduce_scatter", "tp", 32),
    ]


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("tp=2,dcp=2", "no multiple of g=2"),
        ("tp=4,kvp=1,adp=2,mbs=1", "needs a micro-batch divisible by 2"),
        ("grid=1x2,exchange=batch,mbs=1", "needs a micro-batch size divisible by n: 1 % 2 = 1"),
        (
            "grid=1x2,exchange=scores",
            "exchange `scores` has no key/value cache; decode needs batch or sequence or weights",
        ),
        ("grid=1x2,exchange=batch,kv_pieces=2", "ranks must join what parts of a cache gave"),
        ("tp=4,kvp=2,kv_pieces=2,mbs=1", "kv_pieces=2 cuts the 1 sequences of a micro-batch"),
    ],
)
def test_layouts_that_cannot_cache_say_why(layout: str, said: str) -> None:
    assert said in "; ".join(refusal.text for refusal in shape_refusals(share(layout)))


def test_a_servers_way_concerns_decoding_alone_and_goes_alone() -> None:
    mine = Share(MODEL, Layout.parse("tp=4,adp=2,mbs=2"), Workload("train", 64, 8))
    assert [refusal.kind for refusal in shape_refusals(mine)] == ["decode alone"]
    with pytest.raises(ValueError, match="dcp=2 and kvp=2 spread attention in different ways"):
        Layout.parse("tp=4,dcp=2,kvp=2")
    with pytest.raises(ValueError, match="adp=2 and grid"):
        Layout.parse("grid=2x2,adp=2")
    with pytest.raises(ValueError, match="kvp=3 does not divide tp=4"):
        Layout.parse("tp=4,kvp=3")
    assert str(Layout.parse("tp=4,adp=2")) == "tp=4,adp=2,mbs=1"
    assert Layout.parse("tp=4,dcp=2").kind == "stock TP=4 DCP=2"


def test_searches_have_a_servers_layouts_when_asked() -> None:
    workload = Workload("decode", 64, 4)
    plain = set(candidate_layouts(MODEL, 4, workload, Search(("batch",))))
    served = set(candidate_layouts(MODEL, 4, workload, Search(("batch",), served=True)))
    assert plain < served and {layout.shared for layout in served - plain} == {2, 4}
    assert {layout.kv_pieces for layout in served if layout.kvp > 1} == {1, 2, 4}
    assert all(layout.kv_pieces == 1 for layout in served if layout.kvp == 1)
    trained = Workload("train", 64, 4)
    assert not any(layout.shared > 1 for layout in candidate_layouts(MODEL, 4, trained, Search(served=True)))


def test_the_largest_batch_is_the_last_that_fits() -> None:
    """8 layers of 2 key/value heads: 64 MB for each of 8,192 tokens · 2 · 2 · 64 · 8 · 2 bytes."""
    model = ModelShape("small", 8, 512, 8, 2, 64, 2048)
    for text in ("tp=8", "grid=2x4,exchange=batch", "grid=2x4,exchange=sequence", "tp=8,adp=4", "tp=4,dp=2"):
        layout = Layout.parse(text)
        held = sequences_that_fit(model, layout, 8192, H100)
        step = layout.n if "batch" in text or "adp" in text else layout.dp

        def total(batch: int, layout: Layout = layout) -> float:
            mine = replace(layout, micro_batch=batch // layout.dp)
            return memory_needed(Share.on(H100, model, mine, Workload("decode", 8192, batch))).total

        room = H100["memory_bytes"] - H100["reserved_bytes"]
        assert held > 1000 and total(held) <= room < total(held + step), text
    stock, grid = (sequences_that_fit(model, Layout.parse(text), 8192, H100) for text in ("tp=8", "grid=2x4"))
    assert grid / stock == pytest.approx(4, rel=0.01)
    assert sequences_that_fit(model, Layout.parse("tp=3"), 8192, H100) == 0


def test_the_table_has_the_best_of_each_side() -> None:
    found = case("llama3-8b", "h100-ib", 131_072, gpus=16, batches=(16, 32))
    head, columns, most, least, trade, pieces, *rates = case_lines(found)
    assert head == "llama3-8b, h100-ib, context 131,072: a sequence's keys and values are 17.2 GB"
    assert columns.split() == ["ms", *SIDES, "/Megatron", "/both"]
    assert {side(one.layout) for one in found.found} == set(SIDES)
    assert max(BATCHES) == 256
    for row, seconds in zip(rates, (10e-3, 20e-3, 40e-3, 80e-3), strict=True):
        for name in SIDES:
            fast = [one for one in found.found if side(one.layout) == name and one.step <= seconds]
            best = found.best(name, seconds)
            assert (best is None) == (not fast)
            if best is not None:
                assert best.tokens_per_s == max(one.tokens_per_s for one in fast)
                assert f"{best.tokens_per_s / 16:,.1f} ({best.workload.global_batch}: " in row
    quickest = min(found.found, key=lambda one: one.step)
    assert f"{quickest.step * 1e3:.1f} ms" in least
    grid = found.quickest("grid")
    assert grid is not None and not any(grid.hidden.values())
    assert trade.rstrip().endswith(f"{grid.waiting['dim'] * 1e3:.2f} + 0.00 ms")
    if found.overlapping is not None:
        assert f"{found.overlapping.step * 1e3:.1f} ms" in pieces and found.overlapping.layout.kv_pieces > 1
    assert all(f"{found.largest[name][0]:,} " in most for name in SIDES)
