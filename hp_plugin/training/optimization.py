"""Megatron's optimizer and learning-rate schedule from a TrainingConfig."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.transformer import params_dtype


def build_optimizer(config: TrainingConfig, chunks: Sequence[nn.Module]) -> MegatronOptimizer:
    """Adam or SGD with Megatron's mixed precision, clipping and, if asked for, its distributed optimizer."""
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer=config.optimizer,
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            sgd_momentum=config.sgd_momentum,
            clip_grad=config.clip_grad,
            fp16=config.fp16,
            bf16=config.bf16,
            params_dtype=params_dtype(config),
            loss_scale=config.loss_scale,
            initial_loss_scale=config.initial_loss_scale,
            min_loss_scale=config.min_loss_scale,
            loss_scale_window=config.loss_scale_window,
            hysteresis=config.hysteresis,
            use_distributed_optimizer=config.use_distributed_optimizer,
        ),
        list(chunks),
    )


def build_scheduler(config: TrainingConfig, optimizer: MegatronOptimizer, batch_size: int) -> OptimizerParamScheduler:
    """The learning-rate schedule; it counts samples, `batch_size` per iteration."""
    decay = config.lr_decay_iters or config.train_iters
    warmup = config.lr_warmup_iters if config.lr_warmup_fraction is None else config.lr_warmup_fraction * decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr_warmup_init,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup * batch_size,
        lr_decay_steps=decay * batch_size,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=config.train_iters * batch_size,
        wd_incr_style="constant",
        # Both concern checkpoints: a resumed schedule is the one of the command line.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
