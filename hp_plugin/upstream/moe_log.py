"""What a mixture of experts records layer by layer, and how it is read after a step.

Up to 0.17 a module-wide dictionary of `moe_utils` with two functions around it, from 0.18 on an object of
`moe_logging`, beside which the functions say that they are deprecated. A writer is told every figure by both;
`total_loss_dict` names losses alone from 0.18 on. The first way can go with 0.17.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

try:
    from megatron.core.transformer.moe import moe_logging
except ImportError:
    moe_logging = None


class _Figures:
    """A writer, as TensorBoard's, that keeps what it is told."""

    def __init__(self) -> None:
        self.by_name: dict[str, float] = {}

    def add_scalar(self, name: str, value: Any, iteration: int) -> None:
        """Called once for every figure."""
        self.by_name[name] = float(value)


def record_figure(name: str, value: Tensor, layer_number: int, num_layers: int, avg_group: dist.ProcessGroup) -> None:
    """Adds one layer's figure of one micro-batch, to be averaged over a group; layers count from 1."""
    if moe_logging is None:
        moe_utils.save_to_aux_losses_tracker(name, value, layer_number, num_layers, avg_group=avg_group)
    else:
        moe_logging.get_moe_metrics_tracker().record(name, value, layer_number, num_layers, avg_group=avg_group)


def recorded_figures(
    names: Sequence[str], micro_batches: int, num_layers: int, moe_layer_freq: int | list[int]
) -> dict[str, float]:
    """Means over the MoE layers and micro-batches of a step; forgets them. A collective call over all ranks."""
    report = moe_utils.track_moe_metrics if moe_logging is None else moe_logging.get_moe_metrics_tracker().report
    figures = _Figures()
    report(
        loss_scale=1 / micro_batches,
        iteration=0,
        writer=figures,
        force_initialize=True,
        track_names=list(names),
        num_layers=num_layers,
        moe_layer_freq=moe_layer_freq,
    )
    return {name: figures.by_name[name] for name in names}


def forget_figures() -> None:
    """As if nothing had been recorded since the process started."""
    if moe_logging is None:
        moe_utils._MOE_LAYER_WISE_LOGGING_TRACKER.clear()
    else:
        moe_logging.destroy_moe_metrics_tracker()
