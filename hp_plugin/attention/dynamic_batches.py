"""Keeps Megatron-Core's dynamic batches off grids with slices, before anything is reserved for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from megatron.core.inference.contexts import DynamicInferenceContext

from hp_plugin.grid.groups import HeadDimGroups


def refuse_dynamic_batches(groups: HeadDimGroups) -> Callable[[], None]:
    """Refuses to make a `DynamicInferenceContext` while this grid is registered; returns what takes that back.

    Its pages are of a stock rank's heads, and its requests, in one row, are no sequences that n divides.
    Megatron-Core's `StaticInferenceEngine` goes on with static batches by itself where the context cannot be made.
    """
    grid, original = groups.grid, DynamicInferenceContext.__init__
    if grid.n == 1:
        return lambda: None

    @wraps(original)
    def refuse(self: DynamicInferenceContext, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"dynamic batching pages the cache of whole heads, which a {grid.m} x {grid.n} grid divides otherwise: use "
            "static batches (StaticInferenceContext, --use-legacy-static-engine)"
        )

    def take_away() -> None:
        DynamicInferenceContext.__init__ = original

    DynamicInferenceContext.__init__ = refuse
    return take_away
