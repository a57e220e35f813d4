#!/usr/bin/env python
"""Pretrain a GPT with DeepSpeed's engine, its attention on the m × n grid that the DeepSpeed configuration names.

    torchrun --nproc-per-node 8 examples/with_deepspeed/pretrain_gpt_deepspeed.py \\
        --deepspeed_config examples/with_deepspeed/ds_config_dense_cpu.json

The configuration is all there is to write: "head_dim_parallel" is the grid, "gpt" the model and the run (the flags of
examples/pretrain_gpt.py by their names), everything else DeepSpeed's own. Without CUDA it runs on the CPU.
"""

import argparse
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from hp_plugin.processes.rank import begin_rank

    begin_rank()  # first of all: how it ends must be settled before anything can go wrong
    # Every rank would say which optional packages Megatron-Core does without and which torch calls it uses still.
    warnings.filterwarnings("ignore", module="megatron")
    warnings.filterwarnings("ignore", ".* is deprecated", FutureWarning, "torch.distributed")

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from hp_plugin.deepspeed_adapter.config import head_dim_option, load_settings
from hp_plugin.deepspeed_adapter.engine import initialize
from hp_plugin.deepspeed_adapter.settings import batch_sizes, half_precision, section, zero_config
from hp_plugin.deepspeed_adapter.weights import load_weights, save_weights
from hp_plugin.processes.refusals import refuse
from hp_plugin.training.checks import check_config
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.data import batches, build_datasets
from hp_plugin.training.distributed import find_world_size, prepare_device, running_ranks
from hp_plugin.training.initialization import initialize_parameters
from hp_plugin.training.log import print_rank_0
from hp_plugin.training.model import build_gpt
from hp_plugin.training.moe import read_moe_figures
from hp_plugin.training.transformer import build_transformer_config


def read_config(settings: dict[str, Any], world_size: int) -> TrainingConfig:
    """The model and the run from "gpt"; grid, batch sizes and precision from DeepSpeed's own keys.

    Raises:
        ValueError: a key is missing, unknown or contradicts another.
    """
    head_dim, gpt = head_dim_option(settings), settings.get("gpt")
    if not isinstance(gpt, dict):
        raise ValueError('the configuration needs a "gpt" object with the model, as ds_config_dense_cpu.json has it')
    half = half_precision(settings)
    ours = {
        "lr": section(section(settings, "optimizer"), "params").get("lr", 1e-3),
        "fp16": half == "fp16",
        "bf16": half == "bf16",
        "micro_batch_size": 1,  # until the data-parallel size is known
    }
    if head_dim is not None:
        ours |= {"head_dim_parallel": f"{head_dim.m},{head_dim.n}", "head_dim_exchange": head_dim.exchange}
    wrong = sorted(gpt.keys() & {*ours, "global_batch_size"})
    if wrong:
        raise ValueError(
            f'"gpt" cannot say {", ".join(wrong)}: DeepSpeed\'s keys say grid, batch sizes, learning rate and precision'
        )
    try:
        config = TrainingConfig.from_options(gpt | ours)
    except ValueError as mistake:
        raise ValueError(f'"gpt" (flags of examples/pretrain_gpt.py by name): {mistake}') from None
    sequences, micro_batch, _ = batch_sizes(settings, max(1, world_size // config.model_parallel))
    config = replace(config, micro_batch_size=micro_batch, global_batch_size=sequences)
    if config.pipeline_model_parallel_size > 1:
        raise ValueError("DeepSpeed's engine runs no Megatron pipeline: leave pipeline_model_parallel_size out")
    check_config(config, world_size)
    if config.num_experts is not None and config.moe_backend != "deepspeed":
        raise ValueError('"gpt" has num_experts: DeepSpeed\'s engine trains them with "moe_backend": "deepspeed" only')
    if config.num_experts is not None and zero_config(settings).stage == 3:
        raise ValueError("ZeRO stage 3 cannot split DeepSpeed-MoE's experts: set zero_optimization.stage to 1 or 2")
    return config


def build_model(config: TrainingConfig, transformer_config: TransformerConfig, device: torch.device) -> nn.Module:
    """The bare GPTModel of this rank, from weights that no layout changes."""
    model = build_gpt(config, transformer_config)
    for parameter in model.parameters():
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    initialize_parameters([model], transformer_config, config.seed)
    return model.to(device)


def train_step(engine: Any, micro_batches: Any, device: torch.device) -> float:
    """One optimizer step over gradient_accumulation_steps micro-batches; the mean loss over data-parallel ranks."""
    total = torch.zeros((), device=device)
    for _ in range(engine.gradient_accumulation_steps()):
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(micro_batches).items()}
        losses = engine(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"])
        loss = (losses.float() * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
        engine.backward(loss)
        engine.step()
        total += loss.detach() / engine.gradient_accumulation_steps()
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return total.item() / parallel_state.get_data_parallel_world_size()


def pretrain(options: argparse.Namespace, settings: dict[str, Any], config: TrainingConfig) -> list[float]:
    """Trains a checked configuration; returns the losses, which every rank knows."""
    transformer_config = build_transformer_config(config)
    with running_ranks(config) as device:
        model = build_model(config, transformer_config, device)
        if options.load_weights:
            load_weights(model, options.load_weights)
        engine, *_ = initialize(model=model, config=settings)
        done = 0
        if options.load and Path(options.load, "latest").is_file():
            _, state = engine.load_checkpoint(options.load)
            done = state["iteration"]
        batch_size = engine.train_batch_size()
        train_set, _, _ = build_datasets(config, batch_size)
        micro_batches = batches(train_set, config, config.train_iters, batch_size, done)
        losses = []
        for iteration in range(done + 1, config.train_iters + 1):
            started = time.perf_counter()
            losses.append(train_step(engine, micro_batches, device))
            seconds = time.perf_counter() - started
            figures = read_moe_figures(config, engine.gradient_accumulation_steps())
            moe = "".join(f" {name}: {value:.6E} |" for name, value in figures.items())
            print_rank_0(
                f" iteration {iteration:8d}/{config.train_iters:8d} | elapsed time per iteration (ms): "
                f"{seconds * 1000:.1f} | tokens/s: {batch_size * config.seq_length / seconds:.1f} | learning rate: "
                f"{engine.get_lr()[0]:.6E} | lm loss: {losses[-1]:.6E} |{moe} "
                f"grad norm: {engine.get_global_grad_norm()} |"
            )
        if options.save:
            engine.save_checkpoint(options.save, client_state={"iteration": config.train_iters})
        if options.save_weights:
            save_weights(engine, options.save_weights)
        return losses


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; a mistake in it ends with one line on stderr and status 2."""
    parser = argparse.ArgumentParser(description="Pretrain a GPT with DeepSpeed, attention on a grid.")
    parser.add_argument("--deepspeed_config", required=True, help="DeepSpeed's configuration: file or base64")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by older launchers")
    parser.add_argument("--save", help="folder for DeepSpeed's own checkpoint at the end; resumes on the same grid")
    parser.add_argument("--load", help="folder to resume from, if a checkpoint is there")
    parser.add_argument("--save-weights", help="empty folder for the weights at the end; loads on any grid")
    parser.add_argument("--load-weights", help="such a folder to start from")
    options = parser.parse_args(arguments)
    prepare_device()
    try:
        settings = load_settings(options.deepspeed_config)
        config = read_config(settings, find_world_size())
        build_transformer_config(config)
    except ValueError as mistake:
        refuse(str(mistake))
    pretrain(options, settings, config)


if __name__ == "__main__":
    main()
