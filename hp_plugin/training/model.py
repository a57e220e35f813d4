"""The model of this rank: GPTModel chunks with layout-independent weights, wrapped in Megatron's own DDP."""

from __future__ import annotations

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from hp_plugin.attention.model_check import check_attention
from hp_plugin.attention.specs import finish_model
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.initialization import initialize_parameters
from hp_plugin.training.moe import check_backend
from hp_plugin.training.transformer import build_layer_spec


def build_gpt(config: TrainingConfig, transformer_config: TransformerConfig, chunk: int | None = None) -> GPTModel:
    """One pipeline stage of the model, or chunk number `chunk` of it in the interleaved schedule; stock weights."""
    stage = {"ignore_virtual": False, "vp_stage": chunk}
    model = GPTModel(
        config=transformer_config,
        transformer_layer_spec=build_layer_spec(config, transformer_config, chunk),
        vocab_size=config.padded_vocab_size,
        max_sequence_length=config.max_position_embeddings or config.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        share_embeddings_and_output_weights=not config.untie_embeddings_and_output_weights,
        position_embedding_type=config.position_embedding_type,
        rotary_percent=config.rotary_percent,
        rotary_base=config.rotary_base,
        rope_scaling=config.use_rope_scaling,
        rope_scaling_factor=config.rope_scaling_factor,
        seq_len_interpolation_factor=config.rotary_seq_len_interpolation_factor,
        vp_stage=chunk,
    )
    if config.head_dim is not None:
        check_attention(model)
        finish_model(model)
    check_backend(config, transformer_config, model)
    return model


def build_model(
    config: TrainingConfig, transformer_config: TransformerConfig, device: torch.device
) -> list[DistributedDataParallel]:
    """This rank's model chunks (one, or one per virtual stage), initialized and ready for Megatron's schedules."""
    chunks = [None] if config.virtual_pipeline is None else range(config.virtual_pipeline)
    models = [build_gpt(config, transformer_config, chunk) for chunk in chunks]
    for model in models:
        for parameter in model.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    initialize_parameters(models, transformer_config, config.seed)
    half = config.fp16 or config.bf16
    wrapped = [Float16Module(transformer_config, model.to(device)) if half else model.to(device) for model in models]
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.accumulate_allreduce_grads_in_fp32 or config.bf16,
        use_distributed_optimizer=config.use_distributed_optimizer,
    )
    return [
        DistributedDataParallel(transformer_config, settings, model, disable_bucketing=number > 0)
        for number, model in enumerate(wrapped)
    ]
