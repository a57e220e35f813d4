#!/usr/bin/env python
"""Pretrain a GPT on Megatron-Core alone, stock or with attention on an m × n head × dimension grid.

    torchrun --nproc-per-node 4 examples/pretrain_gpt.py --head-dim-parallel 2,2 --train-iters 20 --seed 1 \\
        --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --micro-batch-size 4 --lr 1e-3

Flags are Megatron-LM's. Without --head-dim-parallel the same model trains on stock layouts, such as
--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2, from the same weights on the same batches. Without CUDA
it runs on the CPU; without --data-path it reads the source of Python's standard library, byte by byte.
"""

import time
import warnings
from collections.abc import Sequence

if __name__ == "__main__":
    from hp_plugin.processes.rank import begin_rank

    begin_rank()  # first of all: how it ends must be settled before anything can go wrong
    # Every rank would say which optional packages Megatron-Core does without and which torch calls it uses still.
    warnings.filterwarnings("ignore", module="megatron")
    warnings.filterwarnings("ignore", ".* is deprecated", FutureWarning, "torch.distributed")

from megatron.core.transformer.transformer_config import TransformerConfig

from hp_plugin.checkpoint.checks import WrongModelError
from hp_plugin.processes.interrupts import noted_signals, say_on_interrupt
from hp_plugin.processes.refusals import refuse
from hp_plugin.training.agreement import DisagreementError, stop_is_asked_for
from hp_plugin.training.arguments import parse_arguments
from hp_plugin.training.checkpoints.failures import NotSavedError
from hp_plugin.training.checkpoints.saving import Checkpoints
from hp_plugin.training.checks import check_config
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.data import TokenError, batches, build_datasets
from hp_plugin.training.distributed import find_world_size, prepare_device, running_ranks
from hp_plugin.training.log import TrainingLog, print_rank_0
from hp_plugin.training.step import build_trainer, evaluate, train_step
from hp_plugin.training.transformer import build_transformer_config


def check(config: TrainingConfig) -> TransformerConfig:
    """Refuses, as a ValueError, everything a user can get wrong, before any process group or file is made."""
    prepare_device()
    check_config(config, find_world_size())
    return build_transformer_config(config)


def pretrain(config: TrainingConfig, transformer_config: TransformerConfig) -> dict[int, float]:
    """Trains a checked configuration; returns {iteration: lm loss}, which only the last rank knows."""
    with running_ranks(config) as device:
        # Model, DDP, optimizer and schedule are Megatron-Core's; only the attention layers differ on a grid.
        trainer = build_trainer(config, transformer_config, device)
        parameters = sum(p.numel() for chunk in trainer.model for p in chunk.parameters())
        print_rank_0(f" > parameters on rank 0: {parameters} ({device.type})")

        checkpoints = Checkpoints(trainer)
        say_on_interrupt(checkpoints.what_is_saved)
        done = checkpoints.load()

        # Every rank reads the samples of its data-parallel rank from the same indexed files.
        train_set, valid_set, test_set = build_datasets(config, trainer.batch_size)
        train_batches = batches(train_set, config, config.train_iters, trainer.batch_size, done)
        evaluations = config.train_iters // (config.eval_interval or config.train_iters) + 1
        valid_batches = test_batches = None
        if config.eval_interval and valid_set is not None:
            evaluated = done // config.eval_interval * config.eval_iters
            valid_batches = batches(valid_set, config, evaluations * config.eval_iters, trainer.batch_size, evaluated)
        if config.eval_interval and test_set is not None:
            test_batches = batches(test_set, config, config.eval_iters, trainer.batch_size)

        with noted_signals(config.exit_signal_handler) as stop, TrainingLog(trainer) as log:
            iteration = done
            for iteration in range(done + 1, config.train_iters + 1):
                log.iteration(iteration, train_step(trainer, train_batches))
                last = iteration == config.train_iters
                if valid_batches is not None and (last or iteration % config.eval_interval == 0):
                    started = time.perf_counter()
                    loss = evaluate(trainer, valid_batches, config.eval_iters)
                    log.evaluation(iteration, "validation", loss, started)
                if test_batches is not None and last:
                    started = time.perf_counter()
                    loss = evaluate(trainer, test_batches, config.eval_iters)
                    log.evaluation(iteration, "test", loss, started)
                if checkpoints.after(iteration) or stop_is_asked_for(config, stop, device):
                    break
            checkpoints.finish(iteration, ended_by=stop.name)
    stop.leave_if_interrupted()
    return log.losses


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; a mistake in it ends with one line on stderr and status 2."""
    config = parse_arguments(arguments)
    try:
        transformer_config = check(config)
    except ValueError as mistake:
        refuse(str(mistake))
    try:
        pretrain(config, transformer_config)
    except (DisagreementError, NotSavedError, TokenError, WrongModelError) as mistake:
        refuse(str(mistake))


if __name__ == "__main__":
    main()
