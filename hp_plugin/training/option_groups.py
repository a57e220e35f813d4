"""Every option of the reference trainer, one dataclass per group; names and meanings are Megatron-LM's."""

from __future__ import annotations

from dataclasses import dataclass

from hp_plugin.exchange.rules import AUTO, EXCHANGES
from hp_plugin.grid.ranks import DIM_INNERMOST, ORDERS
from hp_plugin.training.options import BELOW_ONE, NOT_NEGATIVE, PART, POSITIVE, SEED, option, required

BYTE_VOCABULARY = 256
IMPLEMENTATIONS = ("local", "transformer_engine")
BACKENDS = ("flash", "fused", "unfused", "local", "auto")
"""Megatron-Core's `AttnBackend`s."""
RECOMPUTED = ("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts")
"""What Megatron-Core recomputes by name, from `TransformerConfig.__post_init__`."""


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """network size"""

    num_layers: int = required("transformer layers", POSITIVE)
    hidden_size: int = required("hidden size D", POSITIVE)
    num_attention_heads: int = required("query heads h", POSITIVE)
    seq_length: int = required("sequence length s", POSITIVE)
    ffn_hidden_size: int | None = option(
        None, "MLP width (4·D; with --swiglu 2/3 of that, to a multiple of 64)", POSITIVE
    )
    kv_channels: int | None = option(None, "head dimension d (default: D / h)", POSITIVE)
    group_query_attention: bool = option(False, "grouped-query attention; --num-query-groups implies it")
    num_query_groups: int | None = option(None, "key/value heads g (default: h, with grouped queries 1)", POSITIVE)
    max_position_embeddings: int | None = option(None, "learned positions (default: the sequence length)", POSITIVE)
    position_embedding_type: str = option("learned_absolute", "positions", choices=("learned_absolute", "rope", "none"))
    rotary_percent: float = option(1.0, "share of the head dimension that is rotated", PART)
    rotary_base: int = option(10000, "base of the rotary frequencies", POSITIVE)
    rotary_interleaved: bool = option(False, "rotate neighbouring channels instead of halves")
    rotary_seq_len_interpolation_factor: int | None = option(None, "linear interpolation of rotary positions", POSITIVE)
    use_rope_scaling: bool = option(False, "Llama 3.1 scaling of rotary frequencies")
    rope_scaling_factor: float = option(8.0, "factor of --use-rope-scaling", POSITIVE)
    normalization: str = option("LayerNorm", "normalization layers", choices=("LayerNorm", "RMSNorm"))
    norm_epsilon: float = option(1e-5, "epsilon of normalization layers", POSITIVE)
    qk_layernorm: bool = option(False, "normalize every query and key head")
    swiglu: bool = option(False, "gated MLP with SiLU")
    disable_bias_linear: bool = option(False, "no biases in linear layers")
    add_qkv_bias: bool = option(False, "biases in the QKV projection even without the others")
    attention_output_gate: bool = option(False, "gate the attention output, one gate per channel")
    window_size: tuple[int, int] | None = option(
        None, "sliding window: keys left,right of each query, e.g. 127,0", NOT_NEGATIVE
    )
    untie_embeddings_and_output_weights: bool = option(False, "output weights of their own")
    vocab_size: int | None = option(
        None, f"tokens before end-of-document and padding (default {BYTE_VOCABULARY})", POSITIVE
    )
    make_vocab_size_divisible_by: int = option(
        128, "pad the vocabulary to a multiple of this, whatever the layout", POSITIVE
    )
    transformer_impl: str = option("local", "layer implementation", choices=IMPLEMENTATIONS)
    attention_backend: str = option(
        "auto", "core attention: torch's fused kernels (flash, fused), stock's own (others)", choices=BACKENDS
    )


@dataclass(frozen=True, kw_only=True)
class RegularizationOptions:
    """regularization"""

    attention_dropout: float = option(0.1, "dropout of attention probabilities", BELOW_ONE)
    hidden_dropout: float = option(0.1, "dropout of hidden states", BELOW_ONE)
    weight_decay: float = option(0.01, "weight decay; biases and norms have none", NOT_NEGATIVE)
    clip_grad: float = option(1.0, "largest global gradient norm; 0 switches clipping off", NOT_NEGATIVE)
    adam_beta1: float = option(0.9, "Adam's first-moment coefficient", BELOW_ONE)
    adam_beta2: float = option(0.999, "Adam's second-moment coefficient", BELOW_ONE)
    adam_eps: float = option(1e-8, "Adam's epsilon", POSITIVE)
    sgd_momentum: float = option(0.9, "momentum of SGD", BELOW_ONE)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """training"""

    micro_batch_size: int = required("sequences per rank and forward pass, b", POSITIVE)
    train_iters: int = required("iterations to train", POSITIVE)
    global_batch_size: int | None = option(
        None, "sequences per iteration (default: micro-batch × data parallel)", POSITIVE
    )
    optimizer: str = option("adam", "optimizer", choices=("adam", "sgd"))
    seed: int = option(1234, "seed of weights, data order and dropout", SEED)
    init_method_std: float = option(0.02, "standard deviation of the initial weights", POSITIVE)
    use_cpu_initialization: bool = option(False, "create parameters on the CPU (values do not depend on it)")
    recompute_activations: bool = option(False, "short for --recompute-granularity selective")
    recompute_granularity: str | None = option(None, "recompute activations", choices=("full", "selective"))
    recompute_method: str | None = option(None, "which layers full recompute covers", choices=("uniform", "block"))
    recompute_num_layers: int | None = option(
        None, "layers per recomputed chunk, or recomputed layers per stage", POSITIVE
    )
    recompute_modules: tuple[str, ...] | None = option(
        None, "submodules of selective recompute (core_attn)", choices=RECOMPUTED
    )


@dataclass(frozen=True, kw_only=True)
class LearningRateOptions:
    """learning rate"""

    lr: float = required("largest learning rate", POSITIVE)
    min_lr: float = option(0.0, "smallest learning rate", NOT_NEGATIVE)
    lr_decay_style: str = option(
        "linear", "shape of the decay", choices=("constant", "linear", "cosine", "inverse-square-root")
    )
    lr_decay_iters: int | None = option(None, "iterations of decay (default: --train-iters)", POSITIVE)
    lr_warmup_iters: int = option(0, "iterations of linear warm-up", NOT_NEGATIVE)
    lr_warmup_fraction: float | None = option(None, "warm-up as a share of the decay iterations", BELOW_ONE)
    lr_warmup_init: float = option(0.0, "learning rate where the warm-up starts", NOT_NEGATIVE)


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """mixed precision"""

    fp16: bool = option(False, "train in fp16 with loss scaling")
    bf16: bool = option(False, "train in bfloat16")
    loss_scale: float | None = option(None, "static loss scale (default: dynamic)", POSITIVE)
    initial_loss_scale: float = option(2.0**32, "first dynamic loss scale", POSITIVE)
    min_loss_scale: float = option(1.0, "smallest dynamic loss scale", POSITIVE)
    loss_scale_window: float = option(1000, "good iterations before the scale is doubled", POSITIVE)
    hysteresis: int = option(2, "bad iterations before the scale is halved", POSITIVE)
    attention_softmax_in_fp32: bool = option(False, "softmax of attention in fp32")
    accumulate_allreduce_grads_in_fp32: bool = option(False, "gradients in fp32; always so with --bf16")


@dataclass(frozen=True, kw_only=True)
class DistributedOptions:
    """distributed"""

    tensor_model_parallel_size: int | None = option(
        None, "tensor-parallel ranks (default 1, or m·n of the grid)", POSITIVE
    )
    pipeline_model_parallel_size: int = option(1, "pipeline stages", POSITIVE)
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "layers per chunk of the interleaved schedule", POSITIVE
    )
    context_parallel_size: int = option(1, "context-parallel ranks", POSITIVE)
    sequence_parallel: bool = option(False, "split norms and dropouts over the sequence between TP ranks")
    use_distributed_optimizer: bool = option(False, "spread optimizer state over data-parallel ranks")
    distributed_backend: str | None = option(None, "default: nccl with CUDA, gloo without", choices=("nccl", "gloo"))
    distributed_timeout_minutes: float = option(10.0, "time after which a hanging collective is an error", POSITIVE)
    head_dim_parallel: str | None = option(
        None, "attention grid m,n: m head groups × n slices of every head; auto = widest m for the given TP size"
    )
    head_dim_exchange: str = option(AUTO, "what the n ranks of a dim group exchange", choices=tuple(EXCHANGES))
    head_dim_order: str = option(DIM_INNERMOST, "which axis of the grid has neighbouring ranks", choices=ORDERS)


@dataclass(frozen=True, kw_only=True)
class MixtureOptions:
    """mixture of experts"""

    num_experts: int | None = option(None, "experts per MoE layer (default: dense MLPs)", POSITIVE)
    moe_backend: str = option("megatron", "whose mixture of experts", choices=("megatron", "deepspeed"))
    moe_router_topk: int = option(2, "experts per token", POSITIVE)
    moe_router_pre_softmax: bool = option(False, "softmax before choosing experts; top-1 needs it")
    moe_aux_loss_coeff: float = option(0.0, "coefficient of the load-balancing loss", NOT_NEGATIVE)
    moe_expert_capacity_factor: float | None = option(
        None, "drop tokens above this times an equal share (default: none)", POSITIVE
    )
    moe_layer_freq: int = option(1, "one MoE layer in every so many", POSITIVE)
    moe_ffn_hidden_size: int | None = option(None, "width of an expert (default: that of a dense MLP)", POSITIVE)
    expert_model_parallel_size: int = option(1, "ranks that share the experts", POSITIVE)
    expert_tensor_parallel_size: int | None = option(
        None, "ranks that share one expert (default: the TP size)", POSITIVE
    )


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """data"""

    data_path: tuple[str, ...] | None = option(
        None, "prefixes of .bin/.idx files, or weight prefix pairs (default: Python's own source as bytes)"
    )
    split: str = option("969,30,1", "shares of train, validation and test documents")
    data_cache_path: str | None = option(None, "directory of built data and sample indices (~/.cache/hp_plugin)")
    mock_data: bool = option(False, "Megatron's mock data set: counting sequences")
    reset_position_ids: bool = option(False, "restart positions after end-of-document")
    reset_attention_mask: bool = option(False, "no attention across end-of-document")
    eod_mask_loss: bool = option(False, "no loss at end-of-document tokens")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """validation and logging"""

    eval_interval: int | None = option(None, "iterations between evaluations (default: no evaluation)", POSITIVE)
    eval_iters: int = option(100, "iterations of one evaluation", POSITIVE)
    log_interval: int = option(1, "iterations between log lines", POSITIVE)
    tensorboard_dir: str | None = option(None, "directory of TensorBoard events")
    loss_file: str | None = option(None, 'JSON file for {iteration: lm loss}, e.g. {"1": 5.6}')


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """checkpointing"""

    save: str | None = option(None, "directory to save checkpoints to; the last iteration is always saved")
    load: str | None = option(None, "directory to resume from; one without a checkpoint starts from the beginning")
    save_interval: int | None = option(None, "iterations between checkpoints", POSITIVE)
    exit_interval: int | None = option(None, "end the run after an iteration divisible by this", POSITIVE)
    exit_signal_handler: bool = option(
        False, "end with a checkpoint after the iteration in which SIGTERM, SIGUSR1 or Ctrl-C arrives"
    )
    async_save: bool = option(False, "write checkpoints while training goes on")
    ckpt_format: str = option(
        "torch_dist", "torch_dist loads on any layout, torch on its own", choices=("torch_dist", "torch")
    )
    finetune: bool = option(False, "load weights alone and start at iteration 0")
    trust_checkpoint: bool = option(
        False, "let reading the checkpoint of --load run what its files name, for folders whose writer you trust"
    )
    head_dim_allow_other_function: bool = option(
        False, "load a checkpoint of --head-dim-exchange local where its weights mean another attention"
    )


GROUPS: dict[str, type] = {
    "network size": NetworkOptions,
    "regularization": RegularizationOptions,
    "training": TrainingOptions,
    "learning rate": LearningRateOptions,
    "mixed precision": PrecisionOptions,
    "distributed": DistributedOptions,
    "mixture of experts": MixtureOptions,
    "data": DataOptions,
    "validation and logging": ReportOptions,
    "checkpointing": CheckpointOptions,
}
"""The groups of `--help`, by their titles."""
