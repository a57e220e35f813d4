"""Every option of the reference trainer, one dataclass per group; names and meanings are Megatron-LM's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hp_plugin.config import WIDEST, HeadDimConfig
from hp_plugin.exchange.rules import AUTO, EXCHANGES
from hp_plugin.grid.ranks import DIM_INNERMOST, ORDERS

BYTE_VOCABULARY = 256


def _opt(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


def _required(text: str) -> Any:
    return field(metadata={"help": text, "choices": None})


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """network size"""

    num_layers: int = _required("transformer layers")
    hidden_size: int = _required("hidden size D")
    num_attention_heads: int = _required("query heads h")
    seq_length: int = _required("sequence length s")
    ffn_hidden_size: int | None = _opt(None, "MLP width (4·D; with --swiglu 2/3 of that, to a multiple of 64)")
    kv_channels: int | None = _opt(None, "head dimension d (default: D / h)")
    group_query_attention: bool = _opt(False, "grouped-query attention; --num-query-groups implies it")
    num_query_groups: int | None = _opt(None, "key/value heads g (default: h, with grouped queries 1)")
    max_position_embeddings: int | None = _opt(None, "learned positions (default: the sequence length)")
    position_embedding_type: str = _opt("learned_absolute", "positions", ("learned_absolute", "rope", "none"))
    rotary_percent: float = _opt(1.0, "share of the head dimension that is rotated")
    rotary_base: int = _opt(10000, "base of the rotary frequencies")
    rotary_interleaved: bool = _opt(False, "rotate neighbouring channels instead of halves")
    rotary_seq_len_interpolation_factor: int | None = _opt(None, "linear interpolation of rotary positions")
    use_rope_scaling: bool = _opt(False, "Llama 3.1 scaling of rotary frequencies")
    rope_scaling_factor: float = _opt(8.0, "factor of --use-rope-scaling")
    normalization: str = _opt("LayerNorm", "normalization layers", ("LayerNorm", "RMSNorm"))
    norm_epsilon: float = _opt(1e-5, "epsilon of normalization layers")
    qk_layernorm: bool = _opt(False, "normalize every query and key head")
    swiglu: bool = _opt(False, "gated MLP with SiLU")
    disable_bias_linear: bool = _opt(False, "no biases in linear layers")
    add_qkv_bias: bool = _opt(False, "biases in the QKV projection even without the others")
    attention_output_gate: bool = _opt(False, "gate the attention output, one gate per channel")
    window_size: tuple[int, int] | None = _opt(None, "sliding window: keys left,right of each query, e.g. 127,0")
    untie_embeddings_and_output_weights: bool = _opt(False, "output weights of their own")
    vocab_size: int | None = _opt(None, f"tokens before end-of-document and padding (default {BYTE_VOCABULARY})")
    make_vocab_size_divisible_by: int = _opt(128, "pad the vocabulary to a multiple of this, whatever the layout")
    transformer_impl: str = _opt("local", "layer implementation", ("local", "transformer_engine"))


@dataclass(frozen=True, kw_only=True)
class RegularizationOptions:
    """regularization"""

    attention_dropout: float = _opt(0.1, "dropout of attention probabilities")
    hidden_dropout: float = _opt(0.1, "dropout of hidden states")
    weight_decay: float = _opt(0.01, "weight decay; biases and norms have none")
    clip_grad: float = _opt(1.0, "largest global gradient norm; 0 switches clipping off")
    adam_beta1: float = _opt(0.9, "Adam's first-moment coefficient")
    adam_beta2: float = _opt(0.999, "Adam's second-moment coefficient")
    adam_eps: float = _opt(1e-8, "Adam's epsilon")
    sgd_momentum: float = _opt(0.9, "momentum of SGD")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """training"""

    micro_batch_size: int = _required("sequences per rank and forward pass, b")
    train_iters: int = _required("iterations to train")
    global_batch_size: int | None = _opt(None, "sequences per iteration (default: micro-batch × data parallel)")
    optimizer: str = _opt("adam", "optimizer", ("adam", "sgd"))
    seed: int = _opt(1234, "seed of weights, data order and dropout")
    init_method_std: float = _opt(0.02, "standard deviation of the initial weights")
    use_cpu_initialization: bool = _opt(False, "create parameters on the CPU (values do not depend on it)")
    recompute_activations: bool = _opt(False, "short for --recompute-granularity selective")
    recompute_granularity: str | None = _opt(None, "recompute activations", ("full", "selective"))
    recompute_method: str | None = _opt(None, "which layers full recompute covers", ("uniform", "block"))
    recompute_num_layers: int | None = _opt(None, "layers per recomputed chunk, or recomputed layers per stage")
    recompute_modules: tuple[str, ...] | None = _opt(None, "submodules of selective recompute (core_attn)")


@dataclass(frozen=True, kw_only=True)
class LearningRateOptions:
    """learning rate"""

    lr: float = _required("largest learning rate")
    min_lr: float = _opt(0.0, "smallest learning rate")
    lr_decay_style: str = _opt("linear", "shape of the decay", ("constant", "linear", "cosine", "inverse-square-root"))
    lr_decay_iters: int | None = _opt(None, "iterations of decay (default: --train-iters)")
    lr_warmup_iters: int = _opt(0, "iterations of linear warm-up")
    lr_warmup_fraction: float | None = _opt(None, "warm-up as a share of the decay iterations")
    lr_warmup_init: float = _opt(0.0, "learning rate where the warm-up starts")


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """mixed precision"""

    fp16: bool = _opt(False, "train in fp16 with loss scaling")
    bf16: bool = _opt(False, "train in bfloat16")
    loss_scale: float | None = _opt(None, "static loss scale (default: dynamic)")
    initial_loss_scale: float = _opt(2.0**32, "first dynamic loss scale")
    min_loss_scale: float = _opt(1.0, "smallest dynamic loss scale")
    loss_scale_window: float = _opt(1000, "good iterations before the scale is doubled")
    hysteresis: int = _opt(2, "bad iterations before the scale is halved")
    attention_softmax_in_fp32: bool = _opt(False, "softmax of attention in fp32")
    accumulate_allreduce_grads_in_fp32: bool = _opt(False, "gradients in fp32; always so with --bf16")


@dataclass(frozen=True, kw_only=True)
class DistributedOptions:
    """distributed"""

    tensor_model_parallel_size: int | None = _opt(None, "tensor-parallel ranks (default 1, or m·n of the grid)")
    pipeline_model_parallel_size: int = _opt(1, "pipeline stages")
    num_layers_per_virtual_pipeline_stage: int | None = _opt(None, "layers per chunk of the interleaved schedule")
    context_parallel_size: int = _opt(1, "context-parallel ranks")
    sequence_parallel: bool = _opt(False, "split norms and dropouts over the sequence between TP ranks")
    use_distributed_optimizer: bool = _opt(False, "spread optimizer state over data-parallel ranks")
    distributed_backend: str | None = _opt(None, "default: nccl with CUDA, gloo without", ("nccl", "gloo"))
    distributed_timeout_minutes: float = _opt(10.0, "time after which a hanging collective is an error")
    head_dim_parallel: str | None = _opt(
        None, "attention grid m,n: m head groups × n slices of every head; auto = widest m for the given TP size"
    )
    head_dim_exchange: str = _opt(AUTO, "what the n ranks of a dim group exchange", tuple(EXCHANGES))
    head_dim_order: str = _opt(DIM_INNERMOST, "which axis of the grid has neighbouring ranks", ORDERS)


@dataclass(frozen=True, kw_only=True)
class MixtureOptions:
    """mixture of experts"""

    num_experts: int | None = _opt(None, "experts per MoE layer (default: dense MLPs)")
    moe_backend: str = _opt("megatron", "whose mixture of experts", ("megatron", "deepspeed"))
    moe_router_topk: int = _opt(2, "experts per token")
    moe_router_pre_softmax: bool = _opt(False, "softmax before choosing experts; top-1 needs it")
    moe_aux_loss_coeff: float = _opt(0.0, "coefficient of the load-balancing loss")
    moe_expert_capacity_factor: float | None = _opt(None, "drop tokens above this times an equal share (default: none)")
    moe_layer_freq: int = _opt(1, "one MoE layer in every so many")
    moe_ffn_hidden_size: int | None = _opt(None, "width of an expert (default: that of a dense MLP)")
    expert_model_parallel_size: int = _opt(1, "ranks that share the experts")
    expert_tensor_parallel_size: int | None = _opt(None, "ranks that share one expert (default: the TP size)")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """data"""

    data_path: tuple[str, ...] | None = _opt(
        None, "prefixes of .bin/.idx files, or weight prefix pairs (default: Python's own source as bytes)"
    )
    split: str = _opt("969,30,1", "shares of train, validation and test documents")
    data_cache_path: str | None = _opt(None, "directory of built data and sample indices (~/.cache/hp_plugin)")
    mock_data: bool = _opt(False, "Megatron's mock data set: counting sequences")
    reset_position_ids: bool = _opt(False, "restart positions after end-of-document")
    reset_attention_mask: bool = _opt(False, "no attention across end-of-document")
    eod_mask_loss: bool = _opt(False, "no loss at end-of-document tokens")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """validation and logging"""

    eval_interval: int | None = _opt(None, "iterations between evaluations (default: no evaluation)")
    eval_iters: int = _opt(100, "iterations of one evaluation")
    log_interval: int = _opt(1, "iterations between log lines")
    tensorboard_dir: str | None = _opt(None, "directory of TensorBoard events")
    loss_file: str | None = _opt(None, 'JSON file for {iteration: lm loss}, e.g. {"1": 5.6}')


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """checkpointing"""

    save: str | None = _opt(None, "directory to save checkpoints to; the last iteration is always saved")
    load: str | None = _opt(None, "directory to resume from; one without a checkpoint starts from the beginning")
    save_interval: int | None = _opt(None, "iterations between checkpoints")
    exit_interval: int | None = _opt(None, "end the run after an iteration divisible by this")
    async_save: bool = _opt(False, "write checkpoints while training goes on")
    ckpt_format: str = _opt("torch_dist", "torch_dist loads on any layout, torch on its own", ("torch_dist", "torch"))
    finetune: bool = _opt(False, "load weights alone and start at iteration 0")
    head_dim_allow_other_function: bool = _opt(
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


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(
    NetworkOptions,
    RegularizationOptions,
    TrainingOptions,
    LearningRateOptions,
    PrecisionOptions,
    DistributedOptions,
    MixtureOptions,
    DataOptions,
    ReportOptions,
    CheckpointOptions,
):
    """All options of one run; `checks.check_config` says whether they fit a world."""

    @property
    def query_groups(self) -> int:
        """Key/value heads g."""
        if self.num_query_groups is not None:
            return self.num_query_groups
        return 1 if self.group_query_attention else self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Vocabulary with end-of-document, padded by --make-vocab-size-divisible-by alone: equal on all layouts."""
        tokens = (BYTE_VOCABULARY if self.vocab_size is None else self.vocab_size) + 1
        return -(-tokens // self.make_vocab_size_divisible_by) * self.make_vocab_size_divisible_by

    @property
    def head_dim(self) -> HeadDimConfig | None:
        """The attention grid, or None for a stock run.

        Raises:
            ValueError: no valid m,n, or it contradicts --tensor-model-parallel-size.
        """
        if self.head_dim_parallel is None:
            return None
        given = self.tensor_model_parallel_size
        if self.head_dim_parallel == WIDEST:
            if given is None:
                raise ValueError("--head-dim-parallel auto needs --tensor-model-parallel-size, whose m·n it picks")
            return HeadDimConfig.widest(given, self.query_groups, self.head_dim_exchange, self.head_dim_order)
        head_dim = HeadDimConfig.parse(self.head_dim_parallel, self.head_dim_exchange, self.head_dim_order)
        head_dim.check_tensor_parallel_size(given)
        return head_dim

    @property
    def tensor_parallel(self) -> int:
        """Tensor-parallel ranks P."""
        head_dim = self.head_dim
        return head_dim.size if head_dim is not None else self.tensor_model_parallel_size or 1

    @property
    def model_parallel(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_parallel * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def virtual_pipeline(self) -> int | None:
        """Model chunks per rank of the interleaved schedule, or None."""
        per_chunk = self.num_layers_per_virtual_pipeline_stage
        return None if per_chunk is None else self.num_layers // self.pipeline_model_parallel_size // per_chunk

    def batch_size(self, world_size: int) -> int:
        """Sequences per iteration over the whole world."""
        return self.global_batch_size or self.micro_batch_size * (world_size // self.model_parallel)

    def micro_batches(self, world_size: int) -> int:
        """Micro-batches per rank and iteration."""
        return self.batch_size(world_size) // (self.micro_batch_size * (world_size // self.model_parallel))
