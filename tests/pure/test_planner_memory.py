"""Memory against published formulas and counts by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hp_plugin.planner.counts.memory import Memory, memory_needed
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import load_hardware

MODEL = ModelShape("m", 8, 1024, 16, 16, 64, 4096)


def of(layout: str, model: ModelShape = MODEL, mode: str = "train", seq: int = 512, batch: int = 64) -> Memory:
    mine = Layout.parse(layout)
    workload = Workload(mode, seq, batch)
    return memory_needed(Share.on(load_hardware("h100-ib"), model, mine, workload))


def test_weights_gradients_and_optimizer_by_hand() -> None:
    count = MODEL.parameters
    one = of("mbs=1")
    assert (one.weights, one.gradients, one.optimizer) == (2 * count, 4 * count, 12 * count)
    shared = of("dp=4,mbs=1")
    assert (shared.weights, shared.gradients, shared.optimizer) == (2 * count, 4 * count, 3 * count)
    assert of("dp=4,mbs=1,zero=replicated").optimizer == 12 * count
    full = of("dp=4,mbs=1,zero=full,fused=off")
    layer = MODEL.layer_parameters(False)
    assert full.weights == 2 * 2 * layer
    assert full.gradients == count + 4 * layer
    forward = of("mbs=1", mode="forward")
    assert forward.gradients == forward.optimizer == 0.0


@pytest.mark.parametrize(("tp", "sp"), [(1, False), (4, False), (4, True)])
def test_activations_follow_korthikanti(tp: int, sp: bool) -> None:
    """arXiv 2205.05198: 34 sbh + 5 a s²b with dropout and stored scores; here without dropout and scores.

    Norm inputs, QKV and MLP inputs: 8 sbh (a t-th with sequence parallelism); q, k, v, attention output 8 sbh/t; MLP
    16 sbh/t. Fused attention keeps 4 bytes of statistics per head and token instead of scores.
    """
    s, b, h, a, layers = 512, 4, 1024, 16, 8
    kept = of(f"tp={tp},mbs={b}{',sp' if sp else ''}").activations
    sbh = s * b * h
    by_hand = layers * (8 * sbh / (tp if sp else 1) + 24 * sbh / tp + 4 * a * s * b / tp)
    assert kept == pytest.approx(by_hand)


def test_unfused_attention_keeps_its_scores() -> None:
    wide = replace(MODEL, h=2, g=2, d=512)
    scores = 8 * 4 * 2 * 512 * 512 * 2  # layers, samples, heads, s², bytes
    statistics = 8 * 4 * 512 * 2 * 4
    narrow = replace(MODEL, h=4, g=4, d=256)
    assert of("mbs=4", wide).activations - of("mbs=4", narrow).activations == pytest.approx(scores - 2 * statistics)
    assert of("mbs=4,recompute=selective", wide).activations == pytest.approx(of("mbs=4", wide).activations - scores)


def test_full_recomputation_keeps_layer_inputs() -> None:
    assert of("mbs=4,recompute=full").activations == 8 * 512 * 4 * 1024 * 2
    assert of("tp=4,mbs=4,sp,recompute=full").activations == 8 * 512 * 4 * 1024 * 2 / 4


def test_pipeline_stages_hold_several_micro_batches() -> None:
    one = of("mbs=1").activations
    assert of("pp=4,mbs=1").activations == pytest.approx(one)  # 4 micro-batches of a quarter of the layers
    assert of("pp=4,mbs=1", batch=2).activations == pytest.approx(one / 2)  # only two micro-batches at all
    # Interleaved, first of 2 ranks, 2 chunks: 5 passes in flight of a quarter of the layers each.
    assert of("pp=2,vpp=2,mbs=1").activations == pytest.approx(one * 5 / 4)


def test_grids_keep_no_more_than_stock_but_the_exchanged_output() -> None:
    stock, grid = of("tp=8,mbs=8"), of("grid=2x4,exchange=batch,mbs=8")
    output = 8 * 512 * 8 * 1024 * 2 / 8
    assert grid.activations - stock.activations == pytest.approx(output)
    assert grid.weights == stock.weights
    sequence = of("grid=2x4,exchange=sequence,mbs=8")
    whole_kv = 8 * 3 * 2 * 512 * 8 * 1024 * 2 / 8  # three more slices of k and v in every layer
    assert sequence.activations - grid.activations == pytest.approx(whole_kv)


def test_stock_beyond_its_key_value_heads_keeps_the_gathered_projection() -> None:
    gqa = replace(MODEL, g=2)
    stock, grid = of("tp=8,mbs=8", gqa), of("grid=2x4,exchange=batch,mbs=8", gqa)
    # Per layer, beside a rank's own eighth: seven eighths of (16 + 2·2) heads of 64. The grid keeps its traded output.
    gathered = 8 * 512 * 8 * (16 + 4) * 64 * 2 * 7 / 8
    output = 8 * 512 * 8 * 1024 * 2 / 8
    assert stock.activations - grid.activations == pytest.approx(gathered - output)


def test_key_value_cache_by_hand() -> None:
    # 8 layers, 64 sequences, 512 positions, k and v of 1024 channels, 2 bytes.
    cache = 8 * 64 * 512 * 2 * 1024 * 2
    assert of("mbs=64", mode="decode").cache == cache
    assert of("tp=8,mbs=64", mode="decode").cache == cache / 8
    assert of("grid=2x4,exchange=batch,mbs=64", mode="decode").cache == cache / 8
    gqa = replace(MODEL, g=2)
    # Eight stock ranks share two heads: each stores a whole one; the grid stores every head once.
    assert of("tp=8,mbs=64", gqa, mode="decode").cache == cache / 16
    assert of("grid=2x4,exchange=batch,mbs=64", gqa, mode="decode").cache == cache / 64


def test_more_ranks_never_need_more_memory() -> None:
    totals = [of(f"tp={tp},mbs=8,sp").total if tp > 1 else of("mbs=8").total for tp in (1, 2, 4, 8)]
    assert totals == sorted(totals, reverse=True)
    assert of("mbs=8").total > of("mbs=4").total
