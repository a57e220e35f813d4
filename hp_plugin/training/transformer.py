"""TrainingConfig -> Megatron's TransformerConfig and layer spec, stock or with the grid's attention."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from hp_plugin import cpu_backend
from hp_plugin.attention.fused_core import with_fused_core
from hp_plugin.attention.specs import head_dim_spec, mended_mlps, sequence_parallel_norms
from hp_plugin.attention.transformer_config import HeadDimTransformerConfig
from hp_plugin.exchange.shapes import attention_shape
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.distributed import find_world_size
from hp_plugin.training.moe import check_mixture, moe_block_spec, moe_settings

_SAME_NAME = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "kv_channels",
    "normalization",
    "qk_layernorm",
    "add_qkv_bias",
    "attention_output_gate",
    "rotary_interleaved",
    "window_size",
    "attention_dropout",
    "hidden_dropout",
    "init_method_std",
    "use_cpu_initialization",
    "recompute_method",
    "recompute_num_layers",
    "fp16",
    "bf16",
    "attention_softmax_in_fp32",
    "pipeline_model_parallel_size",
    "context_parallel_size",
)


def params_dtype(config: TrainingConfig) -> torch.dtype:
    """The dtype of weights and activations."""
    return torch.float16 if config.fp16 else torch.bfloat16 if config.bf16 else torch.float32


def mlp_width(config: TrainingConfig) -> int:
    """The width of the MLP: as given, or Megatron's default of 4·D (gated: two thirds of it in steps of 64)."""
    if config.ffn_hidden_size is not None:
        return config.ffn_hidden_size
    return 4 * config.hidden_size if not config.swiglu else max(64, 8 * config.hidden_size // 3 // 64 * 64)


def build_transformer_config(
    config: TrainingConfig, world_size: int | None = None, cached: Sequence[tuple[int, int, int]] = ()
) -> TransformerConfig:
    """The model's configuration for `world_size` ranks (default: those of this run); needs no process group.

    Args:
        cached: to generate instead of train, every kind of pass beside a key/value cache: its tokens, its sequences,
            and the tokens of each in the cache behind it.

    Raises:
        ValueError: Megatron-Core or the grid refuses the combination.
    """
    dtype = params_dtype(config)
    # Megatron fuses elementwise chains with torch.compile: worth it on a GPU, minutes of compilation on a CPU.
    fuse = not cpu_backend.is_enabled()
    granularity = config.recompute_granularity or ("selective" if config.recompute_activations else None)
    settings: dict[str, Any] = {name: getattr(config, name) for name in _SAME_NAME}
    settings |= {
        "num_query_groups": config.query_groups,
        "ffn_hidden_size": mlp_width(config),
        "add_bias_linear": not config.disable_bias_linear,
        "gated_linear_unit": config.swiglu,
        "attention_backend": AttnBackend[config.attention_backend],
        "activation_func": F.silu if config.swiglu else F.gelu,
        "layernorm_epsilon": config.norm_epsilon,
        "recompute_granularity": granularity,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "tensor_model_parallel_size": config.tensor_parallel,
        "virtual_pipeline_model_parallel_size": config.virtual_pipeline,
        # As Megatron does: there is nothing to split over one rank.
        "sequence_parallel": config.sequence_parallel and config.tensor_parallel > 1,
        "bias_activation_fusion": fuse and (config.swiglu or not config.disable_bias_linear),
        "bias_dropout_fusion": fuse,
        # Both need CUDA extensions that come with Apex or Megatron-LM, not with Megatron-Core.
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "deallocate_pipeline_outputs": True,
        # Megatron-LM's choice for the interleaved schedule; batched messages of two stages would be mixed up.
        "overlap_p2p_comm": config.virtual_pipeline is not None,
        "batch_p2p_comm": config.virtual_pipeline is None,
        "finalize_model_grads_func": finalize_model_grads,
    }
    settings |= moe_settings(config, mlp_width(config))
    if config.recompute_modules is not None:
        settings["recompute_modules"] = list(config.recompute_modules)
    kind: type[TransformerConfig] = TransformerConfig
    if config.head_dim is not None:
        kind = HeadDimTransformerConfig
        settings |= {
            "head_dim_parallel": config.head_dim,
        }
    if config.head_dim is not None and not cached:
        settings |= {
            "micro_batch_size": config.micro_batch_size,
            "seq_length": config.seq_length // config.context_parallel_size,
        }
    try:
        with warnings.catch_warnings():
            if cached:  # for training it would be right: here ranks of one group may have the same tokens
                warnings.filterwarnings("ignore", "When using expert parallelism and tensor parallelism for training")
            transformer_config = kind(**_known(kind, settings))
    except AssertionError as refusal:
        raise ValueError(f"Megatron-Core refuses this model: {refusal}") from refusal
    if config.head_dim is not None:
        training = (config.seq_length // config.context_parallel_size, config.micro_batch_size, 0)
        for s, b, cache in cached or [training]:
            _check_exchange(config, transformer_config, s, b, cache)
    check_mixture(config, transformer_config, world_size or find_world_size())
    return transformer_config


def _check_exchange(config: TrainingConfig, transformer_config: TransformerConfig, s: int, b: int, cache: int) -> None:
    """Refuses what the exchange cannot rotate or carry: only here are rotary settings and sequence known together."""
    rotary = int(transformer_config.kv_channels * config.rotary_percent)
    shape = attention_shape(
        transformer_config,
        config.head_dim,
        b,
        s,
        rotary=rotary if config.position_embedding_type == "rope" else 0,
    )
    config.head_dim.check_shape(replace(shape, cache=cache))


def build_layer_spec(config: TrainingConfig, transformer_config: TransformerConfig, chunk: int | None = None) -> Any:
    """What GPTModel takes as `transformer_layer_spec`, for chunk number `chunk` of the interleaved schedule."""
    if config.num_experts is not None:
        spec = moe_block_spec(config, transformer_config, chunk)
    elif config.transformer_impl == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    if config.head_dim is not None:
        return head_dim_spec(spec, transformer_config, vp_stage=chunk)
    spec = mended_mlps(with_fused_core(spec, transformer_config), transformer_config)
    if transformer_config.sequence_parallel and config.transformer_impl == "local":
        return sequence_parallel_norms(spec, transformer_config, vp_stage=chunk)
    return spec


def _known(kind: type[TransformerConfig], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings this Megatron-Core release has; one it lacks is an error only if it is asked for."""
    names = {field.name for field in fields(kind)}
    for name in settings.keys() - names:
        if settings[name]:
            raise ValueError(
                f"megatron-core {version('megatron-core')} has no {name}: use a newer one, or leave it out"
            )
    return {name: value for name, value in settings.items() if name in names}
