"""The shapes that docs/architecture.md gives for every step through an attention layer are those that are there."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from hp_plugin import cpu_backend
from hp_plugin.attention.registration import initialize_head_dim_parallel
from hp_plugin.config import HeadDimConfig
from tests.dist.attention_cases import Case, build, data
from tests.ranks import Ranks

PAGE = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
SIZES = {"m": 2, "n": 3, "h": 8, "g": 4, "d": 18, "s": 24, "b": 6, "D": 14}
"""Such that no two shapes of the table agree by accident."""


def documented() -> dict[str, dict[str, tuple[int, ...]]]:
    """Exchange -> step -> shape, of the table's cells that are shapes."""
    (table,) = re.findall(r"^\| step \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    (head,) = re.findall(r"^\| step \|.*$", PAGE, re.MULTILINE)
    names = [cell.strip(" `") for cell in head.strip("|").split("|")][2:]
    found: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in names}
    for line in table.splitlines():
        step, _, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for name, cell in zip(names, cells, strict=True):
            if cell.startswith("`["):
                found[name].setdefault(step, evaluated(cell))
                assert found[name][step] == evaluated(cell), f"{step} of {name} has two shapes"
    return found


def evaluated(cell: str) -> tuple[int, ...]:
    """`[s, b/n, (h/m)d]` in numbers."""
    expressions = [re.sub(r"(?<=\))(?=[(a-zD])", "*", one) for one in cell.strip("`[]").split(",")]
    return tuple(int(eval(one.replace("/", "//"), {}, dict(SIZES))) for one in expressions)


def observed(exchange: str) -> dict[str, tuple[int, ...]]:
    """Step -> shape in one forward pass on this rank."""
    case = Case(
        SIZES["m"], SIZES["n"], exchange, SIZES["h"], SIZES["g"], SIZES["d"], SIZES["s"], SIZES["b"], SIZES["D"]
    )
    found: dict[str, tuple[int, ...]] = {}
    cpu_backend.enable()
    head_dim = HeadDimConfig(case.m, case.n, exchange)
    initialize_head_dim_parallel(head_dim)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*local is another function", category=UserWarning)
        layer: Any = build(case, head_dim, case.h, case.g, case.d)
    strategy = layer._exchanges[exchange]
    to_heads, to_slices = strategy.to_heads, strategy.to_slices

    def heads(mixed: torch.Tensor) -> Any:
        found["QKV slices"] = tuple(mixed.shape)
        return to_heads(mixed)

    def slices(context: torch.Tensor) -> torch.Tensor:
        found["context"] = tuple(context.shape)
        found["context slices"] = tuple((traded := to_slices(context)).shape)
        return traded

    def attends(module: Any, args: tuple[Any, ...]) -> None:
        query, key, value, *_ = args
        assert key.shape == value.shape
        found["queries"], found["keys, values"] = tuple(query.shape), tuple(key.shape)

    strategy.to_heads, strategy.to_slices = heads, slices
    layer.core_attention.register_forward_pre_hook(attends)
    states, _ = data(case)
    output, _ = layer(states, None)
    assert output.shape == states.shape
    found["hidden states"] = tuple(output.shape)
    parallel_state.destroy_model_parallel()
    return found


@pytest.mark.parametrize("exchange", documented())
def test_the_shapes_of_the_page_are_there(ranks: Ranks, exchange: str) -> None:
    expected = documented()[exchange]
    assert len(expected) == 6
    for found in ranks.run(SIZES["m"] * SIZES["n"], observed, exchange):
        assert found == expected
