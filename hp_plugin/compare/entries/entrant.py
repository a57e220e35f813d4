"""From a model and `tp=8,pp=2` or `grid=4x4,exchange=scores` to the reference trainer's configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hp_plugin.compare.entries.catalogue import CatalogueModel
from hp_plugin.planner.counts.feasibility import stock_heads
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.training.checks import check_config
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.distributed import prepare_device
from hp_plugin.training.transformer import build_transformer_config

FUNCTION_MARK = "≠"
"""Marks layouts of `exchange=local`, which compute another function than the model's attention."""


class NotPossibleError(ValueError):
    """Stock Megatron-Core itself refuses this layout of this model; the message is stock's."""


@dataclass(frozen=True)
class Entrant:
    """One layout in a comparison, as given and as the planner and the trainer read it."""

    name: str
    layout: Layout
    config: TrainingConfig

    @property
    def exact(self) -> bool:
        """Whether it computes the model's own attention."""
        return self.layout.exact

    @property
    def title(self) -> str:
        """The name in tables."""
        return self.name if self.exact else f"{self.name} {FUNCTION_MARK}"


def smallest_world(texts: list[str]) -> int:
    """Ranks of the largest layout; data parallelism fills the others up to it.

    Raises:
        ValueError: a malformed layout.
    """
    return max(Layout.parse(text).world for text in texts)


def enter(model: CatalogueModel, text: str, world: int) -> Entrant:
    """One layout of `model` on `world` ranks, checked without starting any.

    Raises:
        NotPossibleError: stock Megatron-Core cannot split this model so.
        ValueError: the layout does not fit the world or the model, or asks for what `compare` does not run.
    """
    layout = Layout.parse(text, world)
    if "mbs" not in text and "micro_batch" not in text:
        layout = replace(layout, micro_batch=min(model.micro_batch, max(1, model.batch // layout.dp)))
    if layout.tp_overlap or layout.kv_pieces > 1 or not layout.fused or layout.zero == "full":
        raise ValueError(
            f"layout {text!r}: compare runs no tp_overlap, kv_pieces, fused=off or zero=full; `hp-plugin plan` does"
        )
    prepare_device()
    config = TrainingConfig.from_options(_options(model, layout))
    try:
        check_config(config, world)
        build_transformer_config(config, world)
    except ValueError as refusal:
        stock = _stock_refusal(config, world) if layout.grid is None else None
        if stock is not None:
            raise NotPossibleError(stock) from refusal
        raise ValueError(f"layout {text!r}: {refusal}") from refusal
    return Entrant(text, layout, config)


def _options(model: CatalogueModel, layout: Layout) -> dict[str, Any]:
    options: dict[str, Any] = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "lr": 1e-3, "train_iters": 1_000_000}
    options |= model.options
    options |= {
        "micro_batch_size": layout.micro_batch,
        "global_batch_size": model.batch,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "context_parallel_size": layout.cp,
        "sequence_parallel": layout.sp,
        "use_distributed_optimizer": layout.zero == "optimizer" and layout.dp > 1,
    }
    if layout.vpp > 1:
        options["num_layers_per_virtual_pipeline_stage"] = options["num_layers"] // (layout.pp * layout.vpp)
    if layout.recompute != "none":
        options["recompute_granularity"] = layout.recompute
        if layout.recompute == "full":
            options |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    if layout.grid is not None:
        options |= {
            "head_dim_parallel": layout.grid.flag,
            "head_dim_exchange": layout.grid.exchange,
            "head_dim_order": layout.grid.order,
        }
    if options.get("num_experts") is not None:
        options |= {"expert_model_parallel_size": layout.ep, "moe_backend": layout.moe}
        if layout.ep > 1:
            # As the planner counts: experts are spread over ranks, none of them is split.
            options["expert_tensor_parallel_size"] = 1
    elif layout.ep > 1 or layout.moe != "megatron":
        raise ValueError(f"layout {layout}: ep and moe need a model with num_experts")
    return options


def _stock_refusal(config: TrainingConfig, world: int) -> str | None:
    """What stock's own configuration says where the TP size does not split the heads; None where it does."""
    if not stock_heads(config.num_attention_heads, config.query_groups, config.tensor_parallel):
        return None
    try:
        build_transformer_config(config, world)
    except ValueError as refusal:
        return str(refusal)
    return None
