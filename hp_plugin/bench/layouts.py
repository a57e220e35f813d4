"""From a model and `tp=8,pp=2` or `grid=4x4,exchange=scores` to the reference trainer's configuration."""

from __future__ import annotations

from typing import Any

from hp_plugin.cost.layout import Layout
from hp_plugin.training.checks import check_config
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.distributed import prepare_device
from hp_plugin.training.transformer import build_transformer_config

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "seq_length": 64},
    "tiny-gqa": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 2, "seq_length": 64},
}
"""Dense models by name; keys are options of the reference trainer."""

_CARRIED = {"tp", "grid", "pp", "dp", "sp", "micro_batch"}


def training_config(model: dict[str, Any], text: str, world: int, global_batch: int) -> TrainingConfig:
    """The configuration of one layout on `world` ranks, checked without starting any.

    Raises:
        ValueError: the layout does not fit the world or the model, asks for what `compare` does not run, or the model
            has an unknown key.
    """
    layout, default = Layout.parse(text, world), Layout()
    other = [name for name in vars(default) if name not in _CARRIED and getattr(layout, name) != getattr(default, name)]
    if other:
        raise ValueError(f"layout {text!r}: compare runs dense layouts of tp, grid, pp, dp, sp, mbs, not {other[0]}")
    if layout.grid is not None and layout.grid.exchange == "local":
        raise ValueError(f"layout {text!r}: exchange=local is another function, which has no stock loss to hold it to")
    options: dict[str, Any] = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "lr": 1e-3, "train_iters": 1000000}
    options |= model
    options |= {
        "micro_batch_size": layout.micro_batch,
        "global_batch_size": global_batch,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "sequence_parallel": layout.sp,
    }
    if layout.grid is not None:
        options |= {
            "head_dim_parallel": f"{layout.grid.m},{layout.grid.n}",
            "head_dim_exchange": layout.grid.exchange,
        }
    try:
        config = TrainingConfig(**options)
    except TypeError as wrong:
        raise ValueError(f"model: {str(wrong).partition('() ')[2]}") from None
    prepare_device()
    try:
        check_config(config, world)
        build_transformer_config(config)
    except ValueError as refusal:
        raise ValueError(f"layout {text!r}: {refusal}") from refusal
    return config
