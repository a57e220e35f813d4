"""Public models at TP sizes beyond their heads: every case is one, and its row is the planner's own choice."""

from __future__ import annotations

import pytest

from hp_plugin.planner.inputs.model_shape import load_model
from hp_plugin.planner.machine.hardware import load_hardware
from hp_plugin.planner.reports.kv_heads import CASES, MACHINE, WORKLOADS, row
from hp_plugin.planner.search.candidates import Search
from hp_plugin.planner.search.plan import make_plan


@pytest.mark.parametrize("name", list(CASES))
def test_every_case_is_beyond_the_models_heads(name: str) -> None:
    model, (gpus, sizes) = load_model(name), CASES[name]
    for tp in sizes:
        assert tp > model.g or model.h % tp, "stock splits this model without loss"
        assert gpus % tp == 0


def test_a_row_is_what_a_search_of_that_size_finds() -> None:
    model = load_model("qwen2.5-3b")
    found = row(model, 16, 8, "decode", None)
    search = Search(("batch", "sequence"), max_micro_batch=8, tensor_parallel=(8,))
    plan = make_plan(model, 16, WORKLOADS["decode"], load_hardware(MACHINE), search)
    assert found.stock is not None and found.grid is not None
    assert found.stock.layout == next(one.layout for one in plan.found if one.layout.grid is None)
    assert found.grid.layout == next(one.layout for one in plan.found if one.layout.grid is not None)
    assert f"{found.grid.tokens_per_s / found.stock.tokens_per_s:.2f}" in found.cells
    assert found.cells.endswith(" -")  # no stock layout of any size was asked for


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
