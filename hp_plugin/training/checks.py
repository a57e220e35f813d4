"""What a TrainingConfig must satisfy in a world of a given size, said in words before any group or file is made."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from hp_plugin.grid.ranks import DIM_INNERMOST
from hp_plugin.refusal import shown
from hp_plugin.training.checkpoints.saving import check_load
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.data import empty_split, parse_blend
from hp_plugin.training.indexed_files import data_complaint
from hp_plugin.training.moe import moe_complaints
from hp_plugin.training.option_groups import BYTE_VOCABULARY
from hp_plugin.training.writable import unwritable_file, unwritable_folder


def check_config(config: TrainingConfig, world_size: int) -> None:
    """Refuses a configuration that cannot run on `world_size` ranks.

    Raises:
        ValueError: the first contradiction found, with the values and the way out.
    """
    for complaint in _complaints(config, world_size):
        raise ValueError(complaint)
    check_load(config)


def _complaints(config: TrainingConfig, world_size: int) -> Iterator[str]:
    yield from _layout(config, world_size)
    yield from _batch(config, world_size)
    yield from _model(config)
    yield from moe_complaints(config)
    yield from _precision_and_schedule(config)
    yield from _data_and_reports(config)
    yield from _checkpoints(config)


def _layout(config: TrainingConfig, world_size: int) -> Iterator[str]:
    pipeline, context, tensor = (
        config.pipeline_model_parallel_size,
        config.context_parallel_size,
        config.tensor_parallel,  # also refuses a contradicting or malformed grid
    )
    if config.head_dim is None and config.head_dim_order != DIM_INNERMOST:
        yield f"--head-dim-order {config.head_dim_order} says how a grid's ranks lie: give --head-dim-parallel with it"
    if config.head_dim is not None:
        config.head_dim.check_world_size(world_size, pipeline, context)
    elif world_size % config.model_parallel:
        yield (
            f"world size {world_size} is not a multiple of TP × PP × CP = {tensor} × {pipeline} × {context}"
            f" = {config.model_parallel}: start {config.model_parallel} ranks or a multiple"
        )
    if config.num_layers % pipeline:
        yield f"--num-layers {config.num_layers} does not divide over --pipeline-model-parallel-size {pipeline}"
    per_chunk = config.num_layers_per_virtual_pipeline_stage
    if per_chunk is not None:
        per_stage = config.num_layers // pipeline
        if pipeline == 1:
            yield "--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size of at least 2"
        if per_stage % per_chunk:
            yield (
                f"--num-layers-per-virtual-pipeline-stage {per_chunk} does not divide the {per_stage} layers of "
                f"a pipeline stage ({config.num_layers} layers over {pipeline} stages)"
            )
    if config.padded_vocab_size % tensor:
        yield (
            f"the padded vocabulary of {config.padded_vocab_size} does not divide over {tensor} tensor-parallel "
            f"ranks: make --make-vocab-size-divisible-by ({config.make_vocab_size_divisible_by}) a multiple of {tensor}"
        )
    if config.sequence_parallel and config.seq_length % (tensor * context):
        yield (
            f"--sequence-parallel needs --seq-length ({config.seq_length}) divisible by TP × CP = {tensor * context}"
        )
    if context > 1:
        if config.transformer_impl == "local":
            yield (
                f"--context-parallel-size {context} needs --transformer-impl transformer_engine: Megatron-Core's "
                "local attention has no context parallelism"
            )
        if config.seq_length % (2 * context):
            yield f"--seq-length {config.seq_length} must be divisible by 2 · CP = {2 * context}"


def _batch(config: TrainingConfig, world_size: int) -> Iterator[str]:
    data_parallel = world_size // config.model_parallel
    per_pass = config.micro_batch_size * data_parallel
    batch = config.batch_size(world_size)
    if batch % per_pass:
        yield (
            f"--global-batch-size {batch} is not a multiple of --micro-batch-size {config.micro_batch_size} × "
            f"{data_parallel} data-parallel ranks = {per_pass}"
        )
    pipeline, passes = config.pipeline_model_parallel_size, config.micro_batches(world_size)
    if config.virtual_pipeline is not None and passes % pipeline:
        yield (
            f"the interleaved schedule needs a multiple of {pipeline} micro-batches per iteration (one per pipeline "
            f"stage), got {passes}: make --global-batch-size ({batch}) a multiple of {per_pass * pipeline}"
        )


def _model(config: TrainingConfig) -> Iterator[str]:
    heads, kv_groups = config.num_attention_heads, config.query_groups
    if config.kv_channels is None and config.hidden_size % heads:
        yield (
            f"--hidden-size {config.hidden_size} is not a multiple of --num-attention-heads {heads}: "
            "choose another, or give the head dimension as --kv-channels"
        )
    if heads % kv_groups:
        yield f"--num-attention-heads {heads} is not a multiple of --num-query-groups {kv_groups}"
    positions = config.max_position_embeddings
    if positions is not None and positions < config.seq_length:
        yield f"--max-position-embeddings {positions} is smaller than --seq-length {config.seq_length}"
    if config.transformer_impl == "transformer_engine" and find_spec("transformer_engine") is None:
        yield "--transformer-impl transformer_engine needs Transformer Engine, which is not installed: use local"
    if config.recompute_granularity == "full" and config.recompute_method is None:
        yield "--recompute-granularity full needs --recompute-method uniform or block"
    if config.recompute_activations and config.recompute_granularity == "full":
        yield "--recompute-activations means selective: leave it or --recompute-granularity full out"


def _precision_and_schedule(config: TrainingConfig) -> Iterator[str]:
    if config.fp16 and config.bf16:
        yield "--fp16 and --bf16 exclude each other"
    if config.optimizer == "sgd" and config.use_distributed_optimizer:
        yield "--use-distributed-optimizer spreads Adam's state alone: leave it out, or --optimizer sgd"
    if config.lr < config.min_lr:
        yield f"--min-lr {config.min_lr} is above --lr {config.lr}"
    decay = config.lr_decay_iters or config.train_iters
    if config.lr_warmup_fraction is not None and config.lr_warmup_iters:
        yield "give --lr-warmup-fraction or --lr-warmup-iters, not both"
    warmup = config.lr_warmup_iters if config.lr_warmup_fraction is None else config.lr_warmup_fraction * decay
    if not 0 <= warmup < decay:
        yield f"the warm-up of {warmup:g} iterations must be shorter than the decay of {decay} (--lr-decay-iters)"


def _data_and_reports(config: TrainingConfig) -> Iterator[str]:
    if config.data_path is not None:
        if config.mock_data:
            yield "give --data-path or --mock-data, not both"
        vocabulary = BYTE_VOCABULARY if config.vocab_size is None else config.vocab_size
        for prefix in parse_blend(config.data_path)[0]:
            for ending in (".bin", ".idx"):
                if not Path(prefix + ending).is_file():
                    yield f"--data-path {prefix}: there is no file {prefix}{ending}"
            damage = data_complaint(prefix, vocabulary)
            if damage is not None:
                yield damage
    elif config.vocab_size is not None and config.vocab_size < 256 and not config.mock_data:
        yield f"--vocab-size {config.vocab_size} is too small for the byte tokens of the default data: leave it out"
    shares = config.split.split(",")
    try:
        valid = 1 <= len(shares) <= 3 and all(float(share) >= 0 for share in shares) and float(shares[0]) > 0
    except ValueError:
        valid = False
    if not valid:
        yield f"--split takes up to three shares, the first positive, for example 969,30,1; got {shown(config.split)}"
    empty = empty_split(config)
    if empty is not None:
        yield f"{empty}: change --split, or leave --eval-interval out"
    if config.tensorboard_dir is not None and find_spec("tensorboard") is None:
        yield "--tensorboard-dir needs the package tensorboard, which is not installed"
    for flag, path, complaint in (
        ("--loss-file", config.loss_file, unwritable_file),
        ("--tensorboard-dir", config.tensorboard_dir, unwritable_folder),
    ):
        unusable = None if path is None else complaint(path)
        if unusable is not None:
            yield f"{flag} {unusable}"
    if config.distributed_backend == "nccl" and not torch.cuda.is_available():
        yield "--distributed-backend nccl needs CUDA, which this machine does not have: leave it out or give gloo"


def _checkpoints(config: TrainingConfig) -> Iterator[str]:
    if config.save is None:
        if config.save_interval is not None:
            yield f"--save-interval {config.save_interval} needs --save, the directory to save to"
        if config.async_save:
            yield "--async-save needs --save, the directory to save to"
        if config.exit_signal_handler:
            yield "--exit-signal-handler needs --save, the directory to save to"
    else:
        unusable = unwritable_folder(config.save)
        if unusable is not None:
            yield f"--save {unusable}"
    if config.load is not None and not config.load.strip():
        yield f"--load {config.load!r} is empty: name the directory that --save named, or leave the flag out"
    if config.load is not None and Path(config.load).exists() and not Path(config.load).is_dir():
        yield f"--load {config.load} is a file: name the directory that --save named"
    if config.finetune and config.load is None:
        yield "--finetune needs --load, the checkpoint to start from"
    if config.ckpt_format == "torch" and config.async_save:
        yield "--async-save needs --ckpt-format torch_dist, got torch"
    if config.ckpt_format == "torch" and config.use_distributed_optimizer:
        yield "--use-distributed-optimizer needs --ckpt-format torch_dist, got torch"
