"""Lets an engine's checkpoints say on which grid they were saved, and refuses them on another one and on none.

They hold each rank's own bytes, which have the same sizes on every grid of one tensor-parallel size, and in stock.
"""

from __future__ import annotations

import json
from functools import wraps
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hp_plugin.config import HeadDimConfig

FILE = "head_dim_layout.json"
_OWNERSHIP = "block"
"""Rank (i, j) owns head group i, and of each of its heads the j-th contiguous slice (`hp_plugin.grid.ownership`)."""


def keep_to_layout(engine: Any, head_dim: HeadDimConfig | None) -> None:
    """From now on `engine.save_checkpoint` records the layout, and `engine.load_checkpoint` refuses another.

    Args:
        head_dim: the grid that the engine's model is on; None for stock.
    """
    own = None if head_dim is None else _layout(head_dim)
    save, load = engine.save_checkpoint, engine.load_checkpoint

    @wraps(save)
    def save_checkpoint(save_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        # First of all: a checkpoint that is named `latest` must have its layout.
        if save_dir and own is not None and dist.get_rank() == 0:
            folder = Path(save_dir, f"global_step{engine.global_steps}" if tag is None else str(tag))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / FILE).write_text(json.dumps(own, indent=1) + "\n")
        return save(save_dir, tag, *args, **kwargs)

    @wraps(load)
    def load_checkpoint(load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        folder = _folder(engine, load_dir, tag)
        if folder is not None and folder.is_dir():
            check_layout(folder, own)
        return load(load_dir, tag, *args, **kwargs)

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint


def check_layout(folder: Path, own: dict[str, Any] | None) -> None:
    """Refuses an engine's checkpoint that another layout saved, before anything of it is loaded.

    Args:
        own: the layout of this run, or None for stock.

    Raises:
        ValueError: the layouts differ, or a checkpoint without a record would go onto slices of heads.
    """
    path = folder / FILE
    try:
        saved = json.loads(path.read_text()) if path.is_file() else None
    except ValueError:
        raise ValueError(f"{path} is no JSON: load another checkpoint") from None
    if saved == own or (_cut(saved) == _cut(own) and _function(saved) == _function(own)):
        return
    way_out = (
        "an engine's checkpoint holds each rank's own bytes and loads only on the layout that saved it. Weights move "
        "through hp_plugin.deepspeed_adapter.weights: save_weights there, load_weights here"
    )
    if saved is None:
        raise ValueError(
            f"checkpoint {folder} has no {FILE}: it was saved in stock, or before layouts were recorded, and this run "
            f"has {_described(own)}; {way_out}. If it is of this very layout, write the file: {json.dumps(own)}"
        )
    raise ValueError(
        f"checkpoint {folder} was saved with {_described(saved)}, and this run has {_described(own)}; {way_out}"
    )


def _layout(head_dim: HeadDimConfig) -> dict[str, Any]:
    """What decides which bytes a rank holds, and what they mean."""
    grid = head_dim.grid
    return {
        "m": grid.m,
        "n": grid.n,
        "exact": head_dim.exact,
        "coordinates": [list(grid.coordinates(rank)) for rank in range(grid.size)],
        "ownership": _OWNERSHIP,
    }


def _cut(layout: dict[str, Any] | None) -> Any:
    """Which slices the ranks hold: with n = 1, stock's."""
    if layout is None or layout.get("n") == 1:
        return None
    return [layout.get(name) for name in ("m", "n", "coordinates", "ownership")]


def _function(layout: dict[str, Any] | None) -> bool:
    return layout is None or bool(layout.get("exact"))


def _described(layout: dict[str, Any] | None) -> str:
    if layout is None:
        return "no grid"
    function = "" if layout.get("exact") else " and the exchange local, which is another function"
    order = [tuple(place) for place in layout.get("coordinates") or ()]
    return f"the grid {layout.get('m')},{layout.get('n')} (ranks at {order}){function}"


def _folder(engine: Any, load_dir: Any, tag: Any) -> Path | None:
    """The folder that DeepSpeed would load from; None where it would find none."""
    if tag is None:
        latest = Path(load_dir, "latest_universal" if engine.load_universal_checkpoint() else "latest")
        if not latest.is_file():
            return None
        tag = latest.read_text().strip()
    return Path(load_dir, str(tag))
