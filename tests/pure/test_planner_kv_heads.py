"""Public models at TP sizes beyond their heads: every case is one, and its row is the planner's own choice."""

from __future__ import annotations

from contextlib import suppress

import pytest

from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.models import load_model
from hp_plugin.planner.machine.hardware import load_hardware
from hp_plugin.planner.reports.kv_heads import CASES, EXCHANGES, MACHINE, WORKLOADS, row
from hp_plugin.planner.seconds.prediction import Prediction
from hp_plugin.planner.seconds.step import predict


@pytest.mark.parametrize("name", list(CASES))
def test_every_case_is_beyond_the_models_heads(name: str) -> None:
    model, (gpus, sizes) = load_model(name), CASES[name]
    for tp in sizes:
        assert tp > model.g or model.h % tp, "stock splits this model without loss"
        assert gpus % tp == 0


def fastest(model: ModelShape, attentions: list[str]) -> Prediction:
    """The fastest of all layouts of 16 GPUs with one of these attentions, enumerated here and predicted one by one."""
    workload, found = WORKLOADS["decode"], []
    for attention in attentions:
        for pp, dp in ((1, 2), (2, 1)):
            for micro_batch in (size for size in (1, 2, 4, 8, 16) if 16 // dp % size == 0):
                layout = Layout.parse(f"{attention},pp={pp},dp={dp},mbs={micro_batch}")
                with suppress(ValueError):  # the exchange does not carry it
                    found.append(predict(model, layout, workload, load_hardware(MACHINE)))
    return max(found, key=lambda one: one.tokens_per_s)


def test_a_row_is_the_fastest_of_each_side_at_that_size() -> None:
    model = load_model("qwen2.5-3b")
    found = row(model, 16, 8, "decode", None)
    stock = fastest(model, ["tp=8"])
    grid = fastest(model, [f"grid={m}x{8 // m},exchange={x}" for m in (1, 2, 4) for x in EXCHANGES["decode"]])
    assert found.stock is not None and found.grid is not None
    assert (found.stock.layout.tp, found.stock.layout.grid) == (8, None)
    assert found.grid.layout.tp == 8 and found.grid.layout.grid is not None
    assert found.stock.tokens_per_s == pytest.approx(stock.tokens_per_s)
    assert found.grid.tokens_per_s == pytest.approx(grid.tokens_per_s)
    name, h, g, gpus, tp, tokens, shape, exchange, grid_tokens, gain, waiting, any_stock = found.cells.split()
    assert (name, h, g, gpus, tp, any_stock) == ("qwen2.5-3b", "16", "2", "16", "8", "-")
    assert (shape, exchange) == (f"{grid.layout.m}x{grid.layout.n}", grid.layout.grid.exchange)
    assert float(tokens.replace(",", "")) == pytest.approx(stock.tokens_per_s, abs=0.51)
    assert float(grid_tokens.replace(",", "")) == pytest.approx(grid.tokens_per_s, abs=0.51)
    assert float(gain) == pytest.approx(grid.tokens_per_s / stock.tokens_per_s, abs=0.0051)
    assert float(waiting) == pytest.approx(grid.tpot / stock.tpot, abs=0.0051)


def test_stock_cannot_split_28_heads_over_8_ranks() -> None:
    found = row(load_model("qwen2.5-7b"), 16, 8, "decode", None)
    assert found.stock is None and found.grid is not None
    assert found.grid.layout.m == 4 and found.grid.layout.n == 2
    assert "not possible" in found.cells and "4x2 batch" in found.cells


def test_a_grid_gains_in_training_where_stock_gathers_its_activations() -> None:
    """16 ranks, 4 key/value heads, heads together twice as wide as the model: stock gathers more than a sum moves."""
    found = row(load_model("qwen3-30b-a3b"), 16, 16, "train", None)
    assert found.stock is not None and found.grid is not None
    assert found.grid.tokens_per_s > 1.1 * found.stock.tokens_per_s
    assert found.grid.tpot < found.stock.tpot
