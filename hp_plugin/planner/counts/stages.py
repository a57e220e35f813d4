"""Which layers each virtual pipeline stage holds, and how many parameters that is per rank."""

from __future__ import annotations

from dataclasses import dataclass

from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape


@dataclass(frozen=True)
class Stage:
    """One virtual stage: its layers, dense and MoE, and whether it embeds tokens or computes the loss."""

    dense: int
    moe: int
    first: bool
    last: bool

    @property
    def layers(self) -> int:
        """Layers of both kinds."""
        return self.dense + self.moe


def split_layers(layers: int, stages: int) -> list[int] | None:
    """Layers per stage: equal, or equal but for a smaller last stage (`--decoder-last-pipeline-num-layers`).

    None where even that leaves the last stage empty.
    """
    each = -(-layers // stages)
    last = layers - each * (stages - 1)
    return [each] * (stages - 1) + [last] if last > 0 else None


def build_stages(model: ModelShape, layout: Layout) -> list[Stage]:
    """The virtual stages in order (stage = chunk · pp + rank); the layout must have passed its checks."""
    split = split_layers(model.layers, layout.stages)
    assert split is not None, "layouts whose stages are empty are refused before"
    stages = []
    at = 0
    for index, count in enumerate(split):
        moe = model.moe_layers_before(at + count) - model.moe_layers_before(at)
        stages.append(Stage(count - moe, moe, index == 0, index == len(split) - 1))
        at += count
    return stages


@dataclass(frozen=True)
class RankParameters:
    """Parameters on one rank: those every data-parallel rank has, and its experts."""

    dense: float
    experts: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.dense + self.experts


def stage_parameters(model: ModelShape, layout: Layout, stage: Stage) -> RankParameters:
    """Parameters of one virtual stage on one rank.

    Norms, biases after row-parallel layers, routers and position tables are not sharded.
    """
    tp = layout.tp
    biases = row_biases(model, stage)
    norms = model.norms * model.norm_parameters + model.qk_norm_parameters
    replicated: float = norms * stage.layers + stage.moe * model.D * model.experts + biases
    sharded = stage.layers * model.attention_parameters + stage.dense * model.mlp_parameters - biases
    if layout.shared > 1:
        replicated += stage.layers * _more_attention(model, layout)
    experts = stage.moe * model.experts // layout.ep * model.mlp_parameters
    if stage.first:
        sharded += model.vocab * model.D
        replicated += model.learned_positions * model.D
    if stage.last:
        replicated += model.norm_parameters
        if not model.tied or (layout.stages > 1 and not stage.first):
            sharded += model.vocab * model.D
    return RankParameters(sharded / tp + replicated, float(experts))


def row_biases(model: ModelShape, stage: Stage) -> int:
    """Biases after the row-parallel layers (the projection and, in dense MLPs, the second linear) of a stage."""
    after_attention = stage.layers if model.biases or model.proj_bias else 0
    after_mlp = stage.dense if model.biases or model.mlp_bias else 0
    return model.D * (after_attention + after_mlp)


def qkv_rows(model: ModelShape, layout: Layout) -> int:
    """Rows of a rank's QKV weight where ranks share a cache: whole key/value heads, as servers have them."""
    query_heads = model.h // (layout.tp if layout.dcp > 1 else layout.m)
    return (query_heads + 2 * max(1, model.g // layout.m)) * model.d


def _more_attention(model: ModelShape, layout: Layout) -> float:
    """Weights of a layer's attention that a rank has beyond its TP-th of them."""
    heads = model.h * model.d
    projection = heads / (layout.m if layout.adp > 1 else layout.tp)
    return model.D * (qkv_rows(model, layout) + projection - (2 * heads + 2 * model.g * model.d) / layout.tp)
