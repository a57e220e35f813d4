"""A layout's model on ranks that stay: built, run on the same tokens as every other layout, and taken down again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.distributed import running_ranks
from hp_plugin.training.peak_memory import return_free_memory
from hp_plugin.training.step import Trainer, build_trainer
from hp_plugin.training.transformer import build_transformer_config
from hp_plugin.upstream.rotary_cache import forget_angles


@contextmanager
def built(config: TrainingConfig) -> Iterator[Trainer]:
    """The trainer of one layout; its model and process groups are gone after the block."""
    with taken_down(config), running_ranks(config) as device:
        trainer = build_trainer(config, build_transformer_config(config), device)
        yield trainer
        _drop_graphs(trainer)
        del trainer


@contextmanager
def taken_down(config: TrainingConfig) -> Iterator[None]:
    """Ends, after the block, what the ranks of one layout leave behind in it."""
    yield
    if config.num_experts is not None and config.moe_backend == "deepspeed":
        from hp_plugin.deepspeed_adapter.moe.groups import forget_expert_groups

        forget_expert_groups()
    forget_angles()
    _end_groups()
    gc.collect()
    return_free_memory()


def _drop_graphs(trainer: Trainer) -> None:
    """Cuts what MoE layers keep of their last pass: through its graph a model holds itself, unseen by Python."""
    for chunk in trainer.model:
        for module in chunk.modules():
            for holder in (module, getattr(module, "token_dispatcher", module)):
                kept = [name for name, value in vars(holder).items() if isinstance(value, Tensor) and value.grad_fn]
                for name in kept:
                    setattr(holder, name, None)


def _end_groups() -> None:
    """Megatron-Core forgets its groups without ending them; gloo's have threads, which would slow down what follows."""
    for group in [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]:
        dist.destroy_process_group(group)


def batches(trainer: Trainer) -> Iterator[dict[str, Tensor]]:
    """This rank's micro-batches of one global batch of random tokens [B, s], the same batch under every layout."""
    config = trainer.config
    generator = torch.Generator().manual_seed(config.seed)
    shape = (trainer.batch_size, config.seq_length + 1)
    tokens = torch.randint(config.padded_vocab_size, shape, generator=generator)
    own = tokens.chunk(parallel_state.get_data_parallel_world_size())[parallel_state.get_data_parallel_rank()]
    for part in own.split(config.micro_batch_size):
        positions = torch.arange(config.seq_length).expand(len(part), -1)
        mask = torch.ones(len(part), config.seq_length)
        yield {"tokens": part[:, :-1], "labels": part[:, 1:], "loss_mask": mask, "position_ids": positions}


def everywhere(loss: Tensor | None) -> float:
    """The loss of the last pipeline stage, on every rank."""
    known: list[float | None] = [None] * dist.get_world_size()
    dist.all_gather_object(known, None if loss is None else float(loss))
    return next(value for value in known if value is not None)
