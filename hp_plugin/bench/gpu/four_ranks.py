"""Ranks that share one device: losses of a few steps, and the memory that each rank takes, by layout.

    torchrun --nproc-per-node 4 -m hp_plugin.bench.gpu.four_ranks RESULT.json [--dry-run]

On one rank only the model itself is trained, which the others are compared with.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.shared_gpus.placing import GLOO, use_gpu
from hp_plugin.training.checks import check_config
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.distributed import prepare_device, running_ranks
from hp_plugin.training.peak_memory import peak_bytes, reset_peak, return_free_memory
from hp_plugin.training.step import build_trainer, train_step
from hp_plugin.training.transformer import build_transformer_config

LAYOUTS = ("tp=4", "grid=2x2,exchange=batch", "grid=2x2,exchange=weights", "grid=1x4,exchange=sequence")
ALONE = "one rank"
STEPS = 4


def main() -> None:
    """Trains every layout in turn; rank 0 writes."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description="Losses and memory of ranks that share one device.")
    parser.add_argument("result", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    args = parser.parse_args()
    prepare_device()
    if torch.cuda.is_available():
        use_gpu(GLOO)
        torch.backends.cuda.matmul.allow_tf32 = False
    else:
        torch.set_num_threads(1)
    dist.init_process_group(GLOO)
    base = _model(args.dry_run)
    layouts = LAYOUTS if dist.get_world_size() > 1 else (ALONE,)
    found = {text: _trained(replace(base, **_options(text))) for text in layouts}
    if dist.get_rank() == 0:
        args.result.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    dist.destroy_process_group()


def _options(text: str) -> dict[str, Any]:
    """A layout's options of the trainer."""
    if text == ALONE:
        return {}
    layout = Layout.parse(text)
    if layout.grid is None:
        return {"tensor_model_parallel_size": layout.tp}
    return {"head_dim_parallel": layout.grid.flag, "head_dim_exchange": layout.grid.exchange}


def _model(small: bool) -> TrainingConfig:
    """The source's proportions, heads twice as wide as any FlashAttention takes; fp32, so that losses compare."""
    size = 64 if small else 2048
    return TrainingConfig(
        num_layers=2,
        hidden_size=size,
        num_attention_heads=4,
        kv_channels=size // 4,
        ffn_hidden_size=4 * size,
        seq_length=16 if small else 1024,
        micro_batch_size=4,
        global_batch_size=4,
        train_iters=STEPS,
        lr=1e-4,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        disable_bias_linear=True,
        position_embedding_type="rope",
        distributed_backend=GLOO,
        mock_data=True,
    )


def _trained(config: TrainingConfig) -> dict[str, Any]:
    """Losses by step, and the largest peak of a rank above what was there before the model."""
    check_config(config, dist.get_world_size())
    transformer_config = build_transformer_config(config)
    with running_ranks(config) as device:
        trainer = build_trainer(config, transformer_config, device)
        return_free_memory()
        reset_peak()
        losses = []
        for step in range(STEPS):
            loss = train_step(trainer, _batches(config, step)).lm_loss
            losses.append(float(loss) if loss is not None else None)
        own: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(own, peak_bytes())
        del trainer
    for group in [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]:
        dist.destroy_process_group(group)
    return_free_memory()
    return {"losses": losses, "peak_bytes": max((one for one in own if one is not None), default=None)}


def _batches(config: TrainingConfig, step: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    shape = (config.micro_batch_size, config.seq_length + 1)
    tokens = torch.randint(config.padded_vocab_size, shape, generator=generator)
    positions = torch.arange(config.seq_length).expand(config.micro_batch_size, -1)
    yield {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": torch.ones(config.micro_batch_size, config.seq_length),
        "position_ids": positions,
    }


if __name__ == "__main__":
    main()
