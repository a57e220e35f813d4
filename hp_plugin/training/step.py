"""One training step and one forward-only step of a model on Megatron's schedules, as plain functions on a value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.data import Batches
from hp_plugin.training.model import build_model
from hp_plugin.training.moe import read_moe_figures
from hp_plugin.training.optimization import build_optimizer, build_scheduler
from hp_plugin.upstream.batch import batch_on_this_cp_rank


@dataclass(frozen=True)
class Trainer:
    """What a step works on: the configuration and this rank's model chunks, optimizer and schedule."""

    config: TrainingConfig
    transformer_config: TransformerConfig
    model: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    device: torch.device
    batch_size: int
    micro_batches: int


@dataclass(frozen=True)
class StepResult:
    """One iteration: the global batch's mean loss (last pipeline stage only), gradient norm, and what was done."""

    lm_loss: Tensor | None
    grad_norm: float | None
    learning_rate: float
    loss_scale: float
    skipped: bool
    moe: dict[str, float] = field(default_factory=dict)
    """Figures of the mixture of experts, by the names Megatron logs them under."""


def build_trainer(config: TrainingConfig, transformer_config: TransformerConfig, device: torch.device) -> Trainer:
    """Model, optimizer and schedule on running ranks."""
    world_size = dist.get_world_size()
    batch_size = config.batch_size(world_size)
    model = build_model(config, transformer_config, device)
    optimizer = build_optimizer(config, model)
    scheduler = build_scheduler(config, optimizer, batch_size)
    transformer_config.grad_scale_func = optimizer.scale_loss
    # Gradients are reduced once per iteration, after the last micro-batch.
    no_sync = [chunk.no_sync for chunk in model]
    transformer_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return Trainer(
        config=config,
        transformer_config=transformer_config,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        device=device,
        batch_size=batch_size,
        micro_batches=config.micro_batches(world_size),
    )


def train_step(trainer: Trainer, batches: Batches) -> StepResult:
    """Forward and backward over one global batch and one optimizer step, as Megatron-LM's training loop does them."""
    for chunk in trainer.model:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    lm_loss = _forward_backward(trainer, batches, forward_only=False)
    updated, grad_norm, _ = trainer.optimizer.step()
    if updated:
        trainer.scheduler.step(increment=trainer.batch_size)
    return StepResult(
        lm_loss=lm_loss,
        grad_norm=None if grad_norm is None else float(grad_norm),
        learning_rate=next(
            group["lr"] for group in trainer.optimizer.param_groups if not group.get("is_decoupled_lr", False)
        ),
        loss_scale=float(trainer.optimizer.get_loss_scale()),
        skipped=not updated,
        moe=read_moe_figures(trainer.config, trainer.micro_batches),
    )


def forward_step(trainer: Trainer, batches: Batches) -> Tensor | None:
    """Forward alone over one global batch, without dropout; the mean loss on the last pipeline stage, else None."""
    for chunk in trainer.model:
        chunk.eval()
    try:
        with torch.no_grad():
            return _forward_backward(trainer, batches, forward_only=True)
    finally:
        for chunk in trainer.model:
            chunk.train()


def evaluate(trainer: Trainer, batches: Batches, iterations: int) -> float | None:
    """Mean loss over `iterations` global batches on the last pipeline stage, else None."""
    losses = [forward_step(trainer, batches) for _ in range(iterations)]
    known = [loss for loss in losses if loss is not None]
    return torch.stack(known).mean().item() if known else None


def _forward_backward(trainer: Trainer, batches: Batches, forward_only: bool) -> Tensor | None:
    config = trainer.config
    reports = get_forward_backward_func()(
        forward_step_func=partial(_micro_step, trainer.device),
        data_iterator=batches,
        model=trainer.model,
        num_microbatches=trainer.micro_batches,
        seq_length=config.seq_length,
        micro_batch_size=config.micro_batch_size,
        decoder_seq_length=config.seq_length,
        forward_only=forward_only,
    )
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    return _mean_loss([report["lm loss"] for report in reports])


def _micro_step(device: torch.device, batches: Iterator[dict[str, Tensor]], model: nn.Module) -> tuple[Tensor, Any]:
    """One micro-batch through one model chunk; the schedule calls the returned loss function on the last stage."""
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
    batch = batch_on_this_cp_rank(batch)
    losses = model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"])
    return losses, partial(_token_losses, batch["loss_mask"])


def _token_losses(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of unmasked token losses, number of tokens, and both for the report; losses and mask are [b, s]."""
    loss = torch.sum(losses.float() * loss_mask)
    tokens = loss_mask.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack((loss.detach(), tokens.to(loss.dtype)))}


def _mean_loss(reports: Sequence[Tensor]) -> Tensor:
    """Mean loss over all tokens of the global batch, from this rank's (sum, tokens) per micro-batch."""
    total = torch.stack(list(reports)).sum(dim=0)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return total[0] / total[1]
