"""What exchanges send in whole passes: the rules' closed forms, held to the planner's programs call by call."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest

from hp_plugin.exchange.rules import AUTO_ORDER, RULES, choose, count, resolve, traded, with_shared_ends
from hp_plugin.exchange.sizes import AttentionShape, BlockShape
from hp_plugin.planner.counts.feasibility import shape_refusals
from hp_plugin.planner.counts.parts import parts_of, passes_of
from hp_plugin.planner.counts.program import collectives
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.refusal import RefusedError

WIDE = ModelShape("wide", 4, 96, 12, 4, 16, 288, biases=True, rotary=False)
GATED = ModelShape("gated", 6, 64, 8, 2, 24, 192, gated=True, qk_norm=True)
MIXTURE = ModelShape("mixture", 4, 64, 8, 4, 8, 128, experts=4, moe_every=2)
BLOCK_PARTS = ("dense", "moe", "dense ends", "moe ends")


def share(model: ModelShape, layout: str, s: int, mode: str) -> Share:
    return Share(model, Layout.parse(layout), Workload(mode, s, 48))


def sent(share: Share) -> float:
    """Bytes by the planner's programs of one pass through the first stage's layers, but for experts' own."""
    layout = share.layout
    sizes = {"tp": layout.tp, "head": layout.m, "dim": layout.n}
    total = 0.0
    for part, times in parts_of(share, share.stages[0]).items():
        if part in BLOCK_PARTS and times:
            passes = passes_of(share, part)
            programs = passes.forward + (passes.backward if share.workload.training else ())
            calls = [call for call in collectives(programs) if call.axis in sizes and call.kind != "send_recv"]
            # What DeepSpeed's mixture gathers by itself.
            own = [call for call in calls if call.axis == "tp" and share.model.experts and "gather" in call.name
                   and ("expert outputs" in call.name or "slot" in call.name or call.name in OF_MIXTURES)]  # fmt: skip
            total += times * sum(call.received(sizes[call.axis]) for call in calls if call not in own)
    return total


OF_MIXTURES = ("gather tokens", "gather output gradient")


MODELS = {"wide": WIDE, "gated": GATED, "mixture": MIXTURE}
GRIDS = ("2x2", "1x4", "4x1", "2x4")
BATCHES = (1, 2, 4, 8)
SWITCHES = ("", ",sp", ",recompute=full")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_the_planner_moves_what_the_rules_count(name: str, mode: str) -> None:
    model, compared = MODELS[name], 0
    for grid, b, s, switch, exchange in product(GRIDS, BATCHES, (16, 32, 64), SWITCHES, RULES):
        if mode == "forward" and "recompute" in switch:
            continue
        moe = ",moe=deepspeed,ep=4" if model.experts else ""
        mine = share(model, f"grid={grid},exchange={exchange},mbs={b}{switch}{moe}", s, mode)
        if (grid == "4x1" and (model.g % 4 or exchange != "batch")) or shape_refusals(mine):
            continue
        stage = mine.stages[0]
        counted = mine.rule.pass_bytes(mine.block_shape(stage.dense, stage.moe), 2, mode == "train")
        assert sent(mine) == pytest.approx(counted, rel=1e-12), mine.layout
        compared += 1
    assert compared >= 40


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_the_counted_choice_sends_no_more_than_the_best_fixed_exchange(mode: str) -> None:
    """Over a map of shapes, few tokens to many; bytes are the planner's, so that the rules do not judge themselves."""
    chosen: Counter[str] = Counter()
    for model, grid, b, s in product((WIDE, GATED), ("2x2", "1x4", "2x4"), (1, 2, 4, 16), (8, 64, 256, 1024)):
        fixed: dict[str, float] = {}
        for exchange in (name for name, rule in RULES.items() if rule.exact):
            mine = share(model, f"grid={grid},exchange={exchange},mbs={b}", s, mode)
            if not shape_refusals(mine):
                fixed[exchange] = sent(mine)
        stage = mine.stages[0]
        counted = count(mine.block_shape(stage.dense, stage.moe), mode == "train")
        assert set(counted.bytes) == set(fixed)
        assert fixed[counted.name] <= 1.03 * min(fixed.values()), (grid, b, s, counted.reason)
        chosen[counted.name] += 1
    assert sum(chosen.values()) == 96 and min(chosen[name] for name in ("batch", "sequence", "scores", "weights")) >= 1


def test_where_weights_begin_to_send_less() -> None:
    """The design's bounds, T > W/(4mD) in forward and 3W/(8mD) in training, for many layers and narrow attention."""
    D, width, m, n = 64, 2048, 2, 4
    for training, bound in ((False, 1 / 4), (True, 3 / 8)):
        for times, expected in ((0.9, False), (1.1, True)):
            weights = D * 2 * width + 4 * 2 * D
            tokens = round(times * bound * weights / (m * D) / (2 * n)) * 2 * n
            shape = AttentionShape(s=tokens, b=1, h=2, g=2, d=4, m=m, n=4)
            fewest = count(BlockShape(shape, D, width, dense=200), training).name
            assert RULES[fewest].moves_weights is expected, (training, times)


def test_one_slice_leaves_nothing_to_choose() -> None:
    shape = AttentionShape(s=16, b=2, h=4, g=4, d=8, m=4, n=1)
    assert list(count(BlockShape(shape, 32, 64, dense=2), True).bytes) == ["batch"]


def test_a_shape_that_nothing_carries_is_refused_in_words() -> None:
    # Odd sequence, one sample, and rotary pairs that slices cut apart.
    shape = AttentionShape(s=15, b=1, h=4, g=4, d=6, m=2, n=2, rotary=6, rotary_interleaved=True)
    with pytest.raises(RefusedError, match="needs an even slice when rotary pairs are interleaved"):
        count(BlockShape(shape, 24, 64, dense=2), True)


def test_what_is_left_open_is_counted_and_what_is_named_is_taken() -> None:
    shape = AttentionShape(s=64, b=4, h=8, g=8, d=8, m=2, n=2)
    block = BlockShape(shape, 64, 128, dense=2)
    free = choose("auto", block, True, 2)
    assert free.bytes == count(block, True).bytes and free.name == "weights"
    lying = choose("auto", block, True, 2, lambda rule: not rule.moves_weights)
    assert lying.name == traded("auto", shape, True, 2) == "batch"
    for name in AUTO_ORDER:
        named = choose(name, block, True, 2, lambda rule: False)
        assert named.bytes == {name: free.bytes[name]}


@pytest.mark.parametrize("training", [False, True])
def test_attention_trades_what_sends_fewest_bytes(training: bool) -> None:
    seen = set()
    for s, b, m, n in product((2, 4, 8, 15, 64), (1, 2, 3, 4), (1, 2), (2, 4)):
        shape = AttentionShape(s=s, b=b, h=4, g=2, d=16, m=m, n=n, rotary=16)
        fits = [name for name in AUTO_ORDER if RULES[name].refusal(shape) is None]
        sent = {name: RULES[name].bytes(shape, 2) + training * RULES[name].bytes_backward(shape, 2) for name in fits}
        assert sent[traded("auto", shape, training, 2)] == min(sent.values())
        assert resolve("auto", shape) == fits[0]
        seen.add(traded("auto", shape, training, 2))
    assert seen == set(AUTO_ORDER)


def test_ends_on_a_share_send_what_their_bounds_say() -> None:
    """What `embedding_moves_less` and `output_moves_less` compare, in whole passes: at bounds nothing is gained."""
    for sequence_parallel, (m, n), training in product((False, True), ((2, 2), (1, 4), (2, 4)), (False, True)):
        shape = AttentionShape(s=64, b=n, h=4, g=4, d=8, m=m, n=n)
        block = BlockShape(shape, 32, 64, dense=2, sequence_parallel=sequence_parallel)
        tokens, size = 64 * n, m * n
        # Rows of a vocabulary at which gathering it is as much as moving tokens.
        per_token = {
            (False, False): (2, 1),
            (False, True): (3 / 2, 1),
            (True, False): (1 + 1 / size, 1 + 1 / size),
            (True, True): (1 + 1 / size, 1 + 2 / (3 * size)),
        }[sequence_parallel, training]
        rule, alone = RULES["weights"], RULES["weights"].pass_bytes(block, 2, training)
        for end, bound in zip(("embedding_shared", "output_shared"), per_token, strict=True):
            for times, sign in ((0.5, 1), (1, 0), (2, -1)):
                shared = replace(block, vocabulary=round(times * bound * m * tokens), **{end: True})
                gained = alone - rule.pass_bytes(shared, 2, training)
                assert abs(gained) <= 2 * 2 * 32 if sign == 0 else gained * sign > 0, (end, m, n, training)
    free = with_shared_ends(BlockShape(AttentionShape(s=64, b=4, h=4, g=4, d=8, m=2, n=2), 32, 64, dense=2), 600)
    assert (free.vocabulary, free.embedding_shared, free.output_shared) == (600, True, False)
