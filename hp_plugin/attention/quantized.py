"""What FP8 and userbuffers ask of a rank's slices, said before a kernel does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hp_plugin.config import HeadDimConfig
from hp_plugin.grid.ownership import slots_per_group
from hp_plugin.refusal import Refusal

_BLOCKS = {"mxfp8": 32, "blockwise": 128}
"""Channels that share a scale, by recipe (Transformer Engine's `is_quantizable`)."""
_TENSOR_CORE = 16
"""Bytes of a row that FP8 products go by, whatever the recipe (Transformer Engine's `assert_dim_for_fp8_exec`)."""


def quantized_refusals(config: Any, head_dim: HeadDimConfig, whole: str) -> Iterator[Refusal]:
    """What a model on slices, n > 1, cannot have of Transformer Engine's communication and quantization.

    Args:
        config: the model's configuration, or arguments under the same names.
        whole: the way out of what slices of heads cannot do.
    """
    if getattr(config, "tp_comm_overlap", False):
        said = "--tp-comm-overlap: userbuffers own the ranks of a TP group, among which the grid trades, too"
        yield Refusal("feature", f"{said}: leave it out, or {whole}")
    if not getattr(config, "fp8", None):
        return
    if getattr(config, "fp8_param", False) or getattr(config, "fp8_param_gather", False):
        said = "--fp8-param-gather keeps quantized weights, which checkpoints do not cut into a grid's pieces"
        yield Refusal("feature", f"{said}: leave it out, or {whole}")
    yield from _narrow_slices(config, head_dim)


def _narrow_slices(config: Any, head_dim: HeadDimConfig) -> Iterator[Refusal]:
    """A rank's rows of the QKV weight and columns of the projection, in blocks of the recipe."""
    h, d = config.num_attention_heads, config.kv_channels
    g = config.num_query_groups or h
    if None in (h, d) or h % head_dim.m or g % head_dim.m or d % head_dim.n:
        return
    recipe = getattr(config, "fp8_recipe", None)
    recipe = getattr(recipe, "value", recipe)
    block = _BLOCKS.get(recipe, _TENSOR_CORE)
    width = d // head_dim.n
    slots = slots_per_group(h, g, getattr(config, "attention_output_gate", False))
    held = {"rows of linear_qkv": g // head_dim.m * slots * width, "columns of linear_proj": h // head_dim.m * width}
    for what, count in held.items():
        if count % block:
            said = (
                f"fp8 ({recipe or 'delayed'}) works on blocks of {block}, and a rank of {head_dim.flag} has {count} "
                f"{what} (slices of {d} / {head_dim.n} = {width} channels)"
            )
            yield Refusal("feature", f"{said}: take a grid that divides into blocks, or leave --fp8-format out")
            return
