"""What a checkpoint says about the grid it was trained on, and which grids may load it; no torch."""

from __future__ import annotations

from typing import Any

from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.rules import AUTO
from hp_plugin.grid.ranks import DIM_INNERMOST, Grid

OVERRIDE_FLAG = "--head-dim-allow-other-function"
TRUST_FLAG = "--trust-checkpoint"


def record_head_dim(arguments: Any, head_dim: HeadDimConfig | None) -> None:
    """Sets `head_dim_parallel` ("m,n"), `_exchange` and `_order`, or None, on a namespace that checkpoints keep."""
    arguments.head_dim_parallel = None if head_dim is None else head_dim.flag
    arguments.head_dim_exchange = None if head_dim is None else head_dim.exchange
    arguments.head_dim_order = None if head_dim is None else head_dim.order


def recorded_head_dim(arguments: Any) -> HeadDimConfig | None:
    """The grid that a checkpoint's arguments name; None for stock ones, also from before the plugin.

    Raises:
        ValueError: the record is not one this release understands.
    """
    recorded = getattr(arguments, "head_dim_parallel", None)
    if recorded is None:
        return None
    exchange, order = (getattr(arguments, f"head_dim_{name}", None) for name in ("exchange", "order"))
    return HeadDimConfig.parse(recorded, exchange or AUTO, order or DIM_INNERMOST)


def check_same_function(saved: HeadDimConfig | None, own: HeadDimConfig | None, override: bool = False) -> None:
    """Refuses a checkpoint whose weights mean another attention here than where they were trained.

    The shapes agree, so nothing else would notice. `local` with n slices is attention with h · n narrow heads: it may
    go to any m with the same n, under `local`. All exact exchanges, and stock, are one function.

    Raises:
        ValueError: both sides, what it would do, and the ways out.
    """
    theirs, ours = _function(saved), _function(own)
    if theirs == ours or override:
        return
    raise ValueError(
        f"the checkpoint was trained with {_described(saved)}, and this run has {_described(own)}: the same weights "
        f"would compute another function. Keep n and the exchange of the checkpoint, or give {OVERRIDE_FLAG} to train "
        "on from these weights all the same"
    )


def check_same_layout(what: str, saved: HeadDimConfig | None, own: HeadDimConfig | None) -> None:
    """Refuses contents that are a rank's own bytes (`what`) on a grid that cuts them otherwise.

    Raises:
        ValueError: the grids own different slices of the attention weights.
    """
    if _slices(saved) != _slices(own):
        raise ValueError(
            f"{what} loads only on the layout that saved it: the checkpoint is from {_described(saved)}, this run has "
            f"{_described(own)}. Load it there and save it with --ckpt-format torch_dist (distributed optimizer: "
            "fully_reshardable), which loads everywhere"
        )


def _function(head_dim: HeadDimConfig | None) -> int:
    """Slices that run a softmax of their own: 1 for everything exact."""
    return 1 if head_dim is None or head_dim.exact else head_dim.n


def _slices(head_dim: HeadDimConfig | None) -> Grid | None:
    """Grids with n = 1 hold what stock holds; their TP size is compared elsewhere."""
    return None if head_dim is None or head_dim.n == 1 else head_dim.grid


def _described(head_dim: HeadDimConfig | None) -> str:
    if head_dim is None:
        return "no grid (stock attention)"
    return " ".join(head_dim.flags)
