"""A rank's own state dict loads where it was saved; elsewhere, in stock too, it ends with both shapes or both ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hp_plugin.checkpoint.weight_fence import BLOCK, fence_weights
from hp_plugin.grid.ownership import SlicedAxis
from hp_plugin.grid.ranks import Grid
from hp_plugin.training.checkpoints.state import unwrapped
from tests.adapters.checkpoint_cases import Layout, step, trainer_on, training_config
from tests.ranks import Ranks

MODEL: dict[str, Any] = {"num_query_groups": 4, "add_qkv_bias": True}


def fenced(m: int, n: int, rank: int) -> nn.Module:
    """A layer of 6 slots of 8 channels over a grid, rows of one weight and columns of another."""
    axis, grid = SlicedAxis(6, 8, m, n), Grid(m, n)
    layer = nn.ModuleDict({"rows": nn.Linear(5, axis.local_size), "columns": nn.Linear(axis.local_size, 7)})
    fence_weights(
        layer,
        {"rows.weight": (0, axis), "rows.bias": (0, axis), "columns.weight": (1, axis)},
        grid,
        *grid.coordinates(rank),
    )
    return nn.ModuleDict({"layer": layer})


def test_what_is_saved_loads_again_and_is_the_weights_own() -> None:
    layer = fenced(2, 2, 3)
    saved = layer.state_dict()
    assert saved["layer.rows.weight"].shape == (3, 4, 5)
    assert saved["layer.columns.weight"].shape == (7, 3, 4)
    assert saved[f"layer.{BLOCK}"].tolist() == [2, 2, 1, 1]
    other = fenced(2, 2, 3)
    other.load_state_dict(saved)
    for own, new in zip(layer.parameters(), other.parameters(), strict=True):
        assert torch.equal(own, new)


def test_parameters_themselves_are_left_alone() -> None:
    """As Megatron-Core asks for them, of lists of layers, to describe them."""
    layer = fenced(2, 2, 3)
    asked = layer.state_dict(keep_vars=True)
    assert asked.keys() == dict(layer.named_parameters()).keys()
    assert all(asked[name] is parameter for name, parameter in layer.named_parameters())


def test_plain_weights_load_too() -> None:
    plain = {name: parameter.detach() for name, parameter in fenced(2, 2, 3).named_parameters()}
    layer = fenced(2, 2, 3)
    layer.load_state_dict(plain)
    assert all(torch.equal(parameter, plain[name]) for name, parameter in layer.named_parameters())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("other", "said"),
    [
        ((4, 1, 3), "size mismatch for layer.rows.weight"),
        ((1, 4, 3), r"rank \(1, 1\) of a grid 2,2, and this is rank \(0, 3\) of 1,4"),
        ((2, 2, 2), r"rank \(1, 1\) of a grid 2,2, and this is rank \(1, 0\) of 2,2"),
    ],
    ids=["whole heads", "other grid", "other rank"],
)
def test_elsewhere_it_is_refused_loading_strictly_or_not(other: tuple[int, int, int], said: str, strict: bool) -> None:
    saved = fenced(2, 2, 3).state_dict()
    layer = nn.ModuleDict({"layer": nn.ModuleDict({"rows": nn.Linear(5, 12), "columns": nn.Linear(12, 7)})})
    if other[1] > 1:
        layer = fenced(*other)
    with pytest.raises((RuntimeError, ValueError), match=said):
        layer.load_state_dict(saved, strict=strict)


def test_whole_heads_are_what_stock_holds() -> None:
    assert list(fenced(3, 1, 2).state_dict()) == [name for name, _ in fenced(3, 1, 2).named_parameters()]


def exchanged(layouts: list[Layout]) -> dict[str, str]:
    """What every layout says to the state dict that every other one's `--ckpt-format torch` saves."""
    states, said = {}, {}
    for layout in layouts:
        with trainer_on(training_config(layout, **MODEL)) as trainer:
            step(trainer, 1)
            states[layout.label] = unwrapped(trainer.model[0]).state_dict_for_save_checkpoint()
    for layout in layouts:
        with trainer_on(training_config(layout, **MODEL)) as trainer:
            model = unwrapped(trainer.model[0])
            for label, state in states.items():
                said[f"{label} in {layout.label}"] = answer(lambda: model.load_state_dict(state, strict=False))  # noqa: B023
            model.load_state_dict(states[layout.label])
            again = model.state_dict_for_save_checkpoint()
            same = all(v is None or torch.equal(v, states[layout.label][k]) for k, v in again.items())
            said[f"{layout.label} again"] = (
                "the same" if same and again.keys() == states[layout.label].keys() else "else"
            )
    return said


def answer(load: Callable[[], object]) -> str:
    try:
        load()
    except (RuntimeError, ValueError) as refusal:
        return str(refusal)
    return "loaded"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_format_torch_is_refused_between_stock_and_grids(ranks: Ranks, tmp_path: Path) -> None:
    for said in ranks.run(2, exchanged, [Layout(tp=2), Layout("2,1"), Layout("1,2")]):
        assert {said[f"{name} again"] for name in ("tp2", "2x1", "1x2")} == {"the same"}
        assert said["2x1 in tp2"] == said["tp2 in 2x1"] == said["1x2 in 1x2"] == "loaded"
        for stock in ("tp2", "2x1"):
            assert "size mismatch for decoder.layers.0.self_attention.linear_qkv.weight" in said[f"1x2 in {stock}"]
