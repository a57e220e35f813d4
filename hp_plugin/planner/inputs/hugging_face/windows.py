"""Sliding windows of a Hugging Face configuration: how many positions a query sees, and in which layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hp_plugin.planner.inputs.hugging_face.model_types import ModelType
from hp_plugin.refusal import shown

_FULL, _WINDOW = "full_attention", "sliding_attention"


def window_fields(kind: ModelType, get: Callable[[str], Any], layers: int) -> dict[str, int]:
    """`window` (0: none) and `window_every` (every so-manieth layer attends to all; 0: none does).

    Raises:
        ValueError: a window that is no size, kinds of layers that are not planned, or an order of layers with and
            without a window that repeats in no such way.
    """
    types = get("layer_types")
    window = get("sliding_window")
    pattern = _said(types, layers) if types is not None else _pattern(kind, get, layers)
    if not window or not any(pattern):
        return {"window": 0}
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"sliding_window takes a positive integer, got {shown(window)}")
    if all(pattern):
        return {"window": window, "window_every": 0}
    every = pattern.index(False) + 1
    if pattern != [number % every != 0 for number in range(1, layers + 1)]:
        raise ValueError(
            "layers with a sliding window in an order that is not all but every so-manieth (layer_types, "
            "max_window_layers) are not planned"
        )
    return {"window": window, "window_every": every}


def _said(types: object, layers: int) -> list[bool]:
    if not isinstance(types, list):
        raise ValueError(f"layer_types takes a list, got {shown(types)}")
    for each in types:
        if each not in (_FULL, _WINDOW):
            kind = shown(each).strip("'").replace("_", " ")
            raise ValueError(f"layers of {kind} (layer_types) are not planned")
    if len(types) != layers:
        raise ValueError(f"layer_types names {len(types)} layers of {layers}")
    return [each == _WINDOW for each in types]


def _pattern(kind: ModelType, get: Callable[[str], Any], layers: int) -> list[bool]:
    """Which layers have a window where the file does not list them, as the type's class does it."""
    numbers = range(layers)
    if kind.window == "all":
        return [True] * layers
    if kind.window == "from max_window_layers" and get("use_sliding_window"):
        first = get("max_window_layers")
        return [number >= (first if isinstance(first, int) else layers) for number in numbers]
    if kind.window == "all but every":
        every = get("sliding_window_pattern") or get("_sliding_window_pattern") or kind.window_every
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"sliding_window_pattern takes a positive integer, got {shown(every)}")
        return [(number + 1) % every != 0 for number in numbers]
    return [False] * layers
