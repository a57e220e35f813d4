"""The loss gate: nothing is timed unless every layout computes the same function, in backward as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from hp_plugin.compare.entries.decoding import GATE_CONTEXT
from hp_plugin.compare.entries.entrant import Entrant
from hp_plugin.compare.ranks.decode import decoding
from hp_plugin.compare.ranks.running import batches, built, everywhere
from hp_plugin.exchange.rules import AUTO
from hp_plugin.grid.ranks import DIM_INNERMOST
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.step import Trainer, forward_step, train_step


def tolerance(config: TrainingConfig) -> float:
    """Largest relative difference of two losses: another order of summation moves them by a hundredth of this."""
    return 1e-2 if config.fp16 or config.bf16 else 1e-4


class LossMismatchError(ValueError):
    """Two layouts do not compute the same loss."""


def measure_losses(entrant: Entrant, training: bool) -> list[float]:
    """The loss of the first batch; in training also the one after a step, which a wrong gradient would change."""
    with built(_sensitive(entrant.config)) as trainer:
        return _losses(trainer, training)


def measure_decode_loss(entrant: Entrant) -> float:
    """The loss of tokens behind short prompts, read one at a time beside the cache."""
    config = _sensitive(entrant.config)
    with decoding(entrant, GATE_CONTEXT, config.init_method_std) as decoder:
        return decoder.loss()


def measure_twin_losses(entrant: Entrant, training: bool) -> list[float]:
    """For `exchange=local`: stock attention with h·n heads of d/n on the same weights, which it must be equal to.

    Rank for rank both hold the same blocks of the weights, so those of the grid are copied.
    """
    config = _sensitive(entrant.config)
    grid = config.head_dim
    assert grid is not None, "only a grid has slices"
    with built(config) as trainer:
        weights = [
            {name: value.detach().clone() for name, value in chunk.named_parameters()} for chunk in trainer.model
        ]
    width = config.kv_channels or config.hidden_size // config.num_attention_heads
    twin = replace(
        config,
        head_dim_parallel=None,
        head_dim_exchange=AUTO,
        head_dim_order=DIM_INNERMOST,
        tensor_model_parallel_size=grid.size,
        num_attention_heads=config.num_attention_heads * grid.n,
        num_query_groups=config.query_groups * grid.n,
        kv_channels=width // grid.n,
    )
    with built(twin) as trainer:
        with torch.no_grad():
            for chunk, known in zip(trainer.model, weights, strict=True):
                for name, value in chunk.named_parameters():
                    value.copy_(known[name])
        trainer.optimizer.reload_model_params()
        return _losses(trainer, training)


def _sensitive(config: TrainingConfig) -> TrainingConfig:
    """The timed model with weights so large that attention moves the loss, and with no token dropped.

    Initial weights are small enough for a model without any attention to have nearly the same loss; and which tokens an
    expert drops depends on the layout.
    """
    spread = max(config.init_method_std, config.hidden_size**-0.5)
    return replace(config, init_method_std=spread, moe_expert_capacity_factor=None)


def require_equal_losses(
    name: str, found: Sequence[float], other: str, expected: Sequence[float], limit: float
) -> None:
    """Refuses to go on where a layout computes another function than its reference.

    Raises:
        LossMismatchError: a loss is more than `limit` (relative) away; both layouts and their losses are named.
    """
    for want, have in zip(expected, found, strict=True):
        if not abs(have - want) <= limit * abs(want):
            raise LossMismatchError(
                f"nothing was timed: {name} has loss {list(found)} where {other} has {list(expected)}, "
                f"more than {limit:g} away"
            )


def _losses(trainer: Trainer, training: bool) -> list[float]:
    found = [everywhere(forward_step(trainer, batches(trainer)))]
    if training:
        train_step(trainer, batches(trainer))
        found.append(everywhere(forward_step(trainer, batches(trainer))))
    return found
