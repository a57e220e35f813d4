"""What DeepSpeed-MoE is asked for beyond Megatron's own MoE settings, and what it cannot do of those."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from megatron.core.transformer.transformer_config import TransformerConfig

NOISE_POLICIES = ("Jitter", "RSample")
# Settings of Megatron's mixture that DeepSpeed's has too, or that change how fast a mixture is, not what it computes.
_CARRIED = {
    *("moe_layer_freq", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax", "moe_router_dtype"),
    *("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_expert_capacity_factor"),
    *("moe_pad_expert_input_to_capacity", "moe_per_layer_logging", "moe_layer_recompute", "moe_router_fusion"),
    # These say something only beside a setting that is refused.
    *("moe_router_bias_update_rate", "moe_shared_expert_gate", "moe_shared_expert_overlap"),
}
_OF_MEGATRONS_DISPATCHERS = (
    *("moe_token_dispatcher_type", "moe_flex_dispatcher_", "moe_permute_fusion", "moe_enable_deepep"),
    *("moe_deepep_", "moe_hybridep_", "moe_ncclep_"),
)


@dataclass(frozen=True)
class DeepSpeedMoEOptions:
    """DeepSpeed's gate options that Megatron-Core has no name for.

    Args:
        min_capacity: smallest capacity per expert. DeepSpeed's own default is 4; 0 leaves the capacity to
            `moe_expert_capacity_factor` alone, as in Megatron-Core.
        eval_capacity_factor: capacity factor outside training; None takes the training one.
        use_rts: with k = 1 and a capacity, drop tokens at random (random token selection) instead of the last ones.
        noisy_gate_policy: None, "Jitter" (input noise) or "RSample" (k = 1: sample the expert).
        top2_2nd_expert_sampling: with k = 2, sample the second expert. Off, as Megatron-Core has no such noise.

    Source: `deepspeed.moe.layer.MoE`.
    """

    min_capacity: int = 0
    eval_capacity_factor: float | None = None
    use_rts: bool = True
    noisy_gate_policy: str | None = None
    top2_2nd_expert_sampling: bool = False


def check_moe(config: TransformerConfig, options: DeepSpeedMoEOptions, world_size: int) -> None:
    """Refuses what DeepSpeed-MoE cannot do, before any group is made.

    Raises:
        ValueError: the first contradiction found, with the values and the way out.
    """
    for complaint in (*_sizes(config, world_size), *_router(config, options), *_features(config)):
        raise ValueError(complaint)


def _sizes(config: TransformerConfig, world_size: int) -> Iterator[str]:
    experts, ep = config.num_moe_experts, config.expert_model_parallel_size
    if experts is None:
        yield "DeepSpeed-MoE needs --num-experts"
        return
    if ep > experts:
        yield f"--expert-model-parallel-size {ep} is larger than --num-experts {experts}: some ranks would have none"
    if experts % ep:
        yield f"--num-experts {experts} do not divide over --expert-model-parallel-size {ep}"
    tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    stage = world_size // pipeline
    # Megatron-Core's default for the expert tensor size is the TP size.
    expert_tensor = config.expert_tensor_parallel_size or tensor
    if expert_tensor not in (1, tensor):
        yield (
            f"--expert-tensor-parallel-size {expert_tensor}: DeepSpeed-MoE splits experts over all {tensor} "
            "tensor-parallel ranks or not at all (1)"
        )
    if expert_tensor == 1 and tensor % ep and ep % tensor:
        yield (
            f"--expert-model-parallel-size {ep} and the TP size {tensor}: one must divide the other, "
            "or ranks with the same tokens would disagree on the capacity"
        )
    if stage % (ep * expert_tensor):
        yield (
            f"--expert-model-parallel-size {ep} × --expert-tensor-parallel-size {expert_tensor} does not divide the "
            f"{stage} ranks of a pipeline stage"
        )
    if config.context_parallel_size > 1:
        yield f"--context-parallel-size {config.context_parallel_size}: use --moe-backend megatron"


def _router(config: TransformerConfig, options: DeepSpeedMoEOptions) -> Iterator[str]:
    k, experts, factor = config.moe_router_topk, config.num_moe_experts, config.moe_expert_capacity_factor
    if not 1 <= k <= experts:
        yield f"--moe-router-topk {k} must be between 1 and --num-experts {experts}"
    if k == 1 and not config.moe_router_pre_softmax:
        yield "--moe-router-topk 1 needs --moe-router-pre-softmax"
    if k > 1 and config.moe_router_pre_softmax:
        yield (
            f"--moe-router-pre-softmax with --moe-router-topk {k}: DeepSpeed normalizes the gates over the chosen "
            "experts; leave it out"
        )
    for name, value in (
        ("--moe-expert-capacity-factor", factor),
        ("the eval capacity factor", options.eval_capacity_factor),
    ):
        if value is not None and value <= 0:
            yield f"{name} must be positive, got {value}: leave it out to drop no tokens"
    if options.min_capacity < 0:
        yield f"the smallest capacity must not be negative, got {options.min_capacity}"
    noise = options.noisy_gate_policy
    if noise is not None and noise not in NOISE_POLICIES:
        yield f"the noisy gate policy must be one of {', '.join(NOISE_POLICIES)} or none, got {noise!r}"
    if noise == "RSample" and k != 1:
        yield f"the noisy gate policy RSample samples a single expert: it needs --moe-router-topk 1, not {k}"
    balancing = config.moe_router_load_balancing_type
    if balancing not in ("aux_loss", "none"):
        yield f"--moe-router-load-balancing-type {balancing}: DeepSpeed-MoE has aux_loss or none"
    if isinstance(config.moe_aux_loss_coeff, list):
        yield f"--moe-aux-loss-coeff {config.moe_aux_loss_coeff}: DeepSpeed-MoE has one load-balancing loss"


def _features(config: TransformerConfig) -> Iterator[str]:
    """Every setting of a mixture that is given and not known to be carried, those of newer releases among them."""
    asked = {
        known.name: getattr(config, known.name)
        for known in fields(config)
        if known.name.startswith("moe_") and getattr(config, known.name) != known.default
    }
    for name, neutral in (("overlap_moe_expert_parallel_comm", False), ("cuda_graph_impl", "none")):
        if getattr(config, name, neutral) != neutral:
            asked[name] = getattr(config, name)
    for name, value in asked.items():
        if name not in _CARRIED and not name.startswith(_OF_MEGATRONS_DISPATCHERS):
            yield f"--{name.replace('_', '-')} {value}: DeepSpeed-MoE has no such thing; --moe-backend megatron has"
