"""Mixtures of experts in the reference trainer: Megatron's own or DeepSpeed-MoE, from the same flags and weights."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from hp_plugin import cpu_backend
from hp_plugin.cpu_backend.mixture_of_experts import uneven_gathers
from hp_plugin.training.config import TrainingConfig
from hp_plugin.upstream.moe_log import recorded_figures


def moe_settings(config: TrainingConfig, width: int) -> dict[str, Any]:
    """Fields of TransformerConfig for the mixture, none without --num-experts; `width` is that of a dense MLP."""
    if config.num_experts is None:
        return {}
    return {
        "num_moe_experts": config.num_experts,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size or width,
        "moe_layer_freq": config.moe_layer_freq,
        "moe_router_topk": config.moe_router_topk,
        "moe_router_pre_softmax": config.moe_router_pre_softmax,
        "moe_router_load_balancing_type": "aux_loss" if config.moe_aux_loss_coeff else "none",
        "moe_aux_loss_coeff": config.moe_aux_loss_coeff,
        "moe_expert_capacity_factor": config.moe_expert_capacity_factor,
        "moe_token_dispatcher_type": "alltoall",
        **expert_sizes(config),
    }


def expert_sizes(config: TrainingConfig) -> dict[str, int]:
    """Sizes of the expert groups, under the names that TransformerConfig and parallel_state share."""
    if config.num_experts is None:
        return {}
    return {
        "expert_model_parallel_size": config.expert_model_parallel_size,
        "expert_tensor_parallel_size": config.expert_tensor_parallel_size or config.tensor_parallel,
    }


def moe_complaints(config: TrainingConfig) -> Iterator[str]:
    """What of the mixture cannot run, whatever the world; the rest is said once the TransformerConfig is there."""
    if config.num_experts is None:
        if config.expert_model_parallel_size > 1:
            yield f"--expert-model-parallel-size {config.expert_model_parallel_size} needs --num-experts"
        return
    experts, chosen = config.num_experts, config.moe_router_topk
    if chosen > experts:
        yield f"--moe-router-topk {chosen} must be at most --num-experts {experts}"
    if experts % config.expert_model_parallel_size:
        yield (
            f"--num-experts {experts} do not divide over --expert-model-parallel-size "
            f"{config.expert_model_parallel_size}"
        )
    yield from _empty_optimizer(config)
    if config.moe_backend == "deepspeed":
        if find_spec("deepspeed") is None:
            yield "--moe-backend deepspeed needs DeepSpeed, which is not installed: pip install 'hp-plugin[deepspeed]'"
        return
    spread, slices = expert_sizes(config).values()
    if config.transformer_impl == "local" and not config.disable_bias_linear and spread == 1:
        # Its MLP adds them in place to what a collective over one rank returned, which autograd forbids.
        yield (
            "Megatron-Core's local experts with biases run only where they are spread: give --disable-bias-linear, or "
            "--expert-model-parallel-size above 1 with --expert-tensor-parallel-size 1"
        )
    uneven = uneven_gathers(spread, slices) if cpu_backend.is_enabled() else None
    if uneven is not None:
        yield uneven
    if config.tensor_parallel > 1 and not config.sequence_parallel:
        yield (
            f"Megatron's MoE on {config.tensor_parallel} tensor-parallel ranks needs --sequence-parallel; "
            "--moe-backend deepspeed does not"
        )


def _empty_optimizer(config: TrainingConfig) -> Iterator[str]:
    """Where the experts' own optimizer has no parameter on a stage, of which upstream saves and loads no state.

    Source: `DistributedOptimizer.state_dict`, which asserts that all parameters, of which there are none, are equally
    old. Transformer Engine's and Apex' Adam keep their age by group.
    """
    checkpoints = config.save is not None or config.load is not None
    if HAVE_APEX_OR_TE or not config.use_distributed_optimizer or not checkpoints:
        return
    spread, slices = expert_sizes(config).values()
    if config.moe_backend == "megatron" and spread == 1 and slices == config.tensor_parallel:
        return
    stages = config.pipeline_model_parallel_size
    per_chunk = config.num_layers_per_virtual_pipeline_stage or config.num_layers // stages
    with_experts = {layer // per_chunk % stages for layer in range(0, config.num_layers, config.moe_layer_freq)}
    without = sorted(set(range(stages)) - with_experts)
    if without:
        yield (
            f"--moe-layer-freq {config.moe_layer_freq} leaves pipeline stage {without[0]} without experts, whose empty "
            "distributed optimizer Megatron-Core cannot save with torch's Adam: give every stage a mixture, or leave "
            "--use-distributed-optimizer out, or --save and --load"
        )


def check_mixture(config: TrainingConfig, transformer_config: TransformerConfig, world_size: int) -> None:
    """Refuses what the mixture cannot do on `world_size` ranks, before any group is made.

    Raises:
        ValueError: with the values and the way out.
    """
    if config.num_experts is None:
        return
    if config.moe_backend == "deepspeed":
        from hp_plugin.deepspeed_adapter.moe.options import DeepSpeedMoEOptions, check_moe

        check_moe(transformer_config, DeepSpeedMoEOptions(), world_size)
    experts, slices = expert_sizes(config).values()
    stage = world_size // config.pipeline_model_parallel_size
    if stage % (experts * slices):
        raise ValueError(
            f"--expert-model-parallel-size {experts} × --expert-tensor-parallel-size {slices} does not divide the "
            f"{stage} ranks of a pipeline stage"
        )


def moe_block_spec(config: TrainingConfig, transformer_config: TransformerConfig, chunk: int | None) -> Any:
    """The layers of this pipeline stage (or chunk of it), dense and MoE as --moe-layer-freq says."""
    spec = get_gpt_decoder_block_spec(
        transformer_config,
        use_transformer_engine=config.transformer_impl == "transformer_engine",
        normalization=config.normalization,
        vp_stage=chunk,
    )
    if config.moe_backend == "megatron":
        return spec
    from hp_plugin.deepspeed_adapter.moe.specs import deepspeed_moe_spec

    # A stage can hold dense layers alone.
    return deepspeed_moe_spec(spec, required=False)


def check_backend(config: TrainingConfig, transformer_config: TransformerConfig, model: nn.Module) -> None:
    """Asks a built model whether its mixtures are those that --moe-backend names.

    Raises:
        RuntimeError: they are the other's.
    """
    if config.num_experts is not None and config.moe_backend == "deepspeed":
        from hp_plugin.deepspeed_adapter.moe.model_check import check_mixtures

        check_mixtures(model, transformer_config)


def read_moe_figures(config: TrainingConfig, micro_batches: int) -> dict[str, float]:
    """Load-balancing loss, without its coefficient, and share of dropped choices, of the last iteration.

    Means over MoE layers, micro-batches and data-parallel ranks, equal on all ranks. Empty without a mixture.
    """
    if config.num_experts is None:
        return {}
    names = ["load_balancing_loss"] if config.moe_aux_loss_coeff else []
    names += ["dropped_token_share"] if config.moe_backend == "deepspeed" else []
    if not names:
        return {}
    return recorded_figures(names, micro_batches, config.num_layers, config.moe_layer_freq)


def global_expert(local: int, experts: int) -> int:
    """The number in the whole layer of this rank's expert number `local`."""
    ranks = parallel_state.get_expert_model_parallel_world_size()
    return parallel_state.get_expert_model_parallel_rank() * (experts // ranks) + local
