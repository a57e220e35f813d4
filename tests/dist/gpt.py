"""A small GPTModel, stock or on a grid, trained a few steps on the ranks of a test: what layouts are compared by."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import num_microbatches_calculator, parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from hp_plugin.attention.registration import initialize_head_dim_parallel
from hp_plugin.attention.specs import finish_model, head_dim_spec
from hp_plugin.attention.transformer_config import HeadDimTransformerConfig
from hp_plugin.config import HeadDimConfig
from tests.dist.gpt_parts import Part, collect, fill
from tests.ranks import prepare_device

VOCABULARY = 64
SEQUENCE = 16


@dataclass(frozen=True)
class Case:
    """A layout and what is switched on in it; the model and its global batch are always the same."""

    tp: int = 1
    pp: int = 1
    vp: int | None = None
    dtype: torch.dtype = torch.float32
    loss_scale: float | None = None
    distributed_optimizer: bool = False
    overlap: bool = False
    bucket_size: int | None = None
    """Parameters per gradient bucket of Megatron's data parallelism; all in one if None."""
    clip_grad: float = 0.0
    steps: int = 2
    micro_batch: int = 2
    batches: tuple[int, ...] = ()
    """Samples of each micro-batch of a step, where they are not all of one size."""
    evaluate: bool = False
    """Whether a pass without gradients goes before every step, in micro-batches of `micro_batch`."""
    layers: int = 4
    tied: bool = True
    own_masks: bool = False
    """Every sample hides keys of its own, by its tokens."""
    positions: str = "rope"
    ends: bool = True
    """Whether the exchange may change what is around the layers."""
    grid: HeadDimConfig | None = None
    """Attention on this grid; `tp` is its size then."""
    model: dict[str, Any] = field(default_factory=dict)
    """Further fields of TransformerConfig."""

    def but(self, **fields: Any) -> "Case":
        """The same case with other fields of TransformerConfig."""
        return replace(self, model={**self.model, **fields})


@dataclass
class Outcome:
    """What one rank saw: values per step, then tensors by global name with the axis they are split on."""

    losses: list[float]
    grad_norms: list[float]
    zeros: list[float]
    skipped: list[bool]
    loss_scales: list[float]
    grads: dict[str, Part]
    params: dict[str, Part]
    evaluations: list[float] = field(default_factory=list)


def train(case: Case) -> Outcome:
    """Train `case.steps` steps of 8 samples, in micro-batches spread over the data-parallel ranks."""
    prepare_device()
    start(case)
    chunks = build(case)
    optimizer = build_optimizer(case, chunks)
    outcome = Outcome([], [], [], [], [], {}, {})
    for step in range(case.steps):
        if case.evaluate:
            outcome.evaluations.append(evaluate(case, chunks, step))
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        outcome.losses.append(run_step(case, chunks, step))
        if step == 0:
            outcome.grads = collect(chunks, lambda p: p.main_grad)
        updated, norm, zeros = optimizer.step()
        outcome.skipped.append(not updated)
        outcome.loss_scales.append(float(optimizer.get_loss_scale()))
        outcome.grad_norms.append(float(norm or 0.0))
        outcome.zeros.append(float(zeros or 0.0))
    if case.overlap and case.distributed_optimizer:
        for chunk in chunks:  # else the next forward pass would gather what the last step updated
            chunk.start_param_sync(force_sync=True)
    outcome.params = collect(chunks, lambda p: p.data)
    return outcome


def start(case: Case) -> None:
    if case.grid is None:
        parallel_state.initialize_model_parallel(case.tp, case.pp, case.vp)
    else:
        initialize_head_dim_parallel(
            case.grid, pipeline_model_parallel_size=case.pp, virtual_pipeline_model_parallel_size=case.vp
        )
    tensor_parallel.model_parallel_cuda_manual_seed(123)
    num_microbatches_calculator.init_num_microbatches_calculator(
        dist.get_rank(), None, 8, case.micro_batch, parallel_state.get_data_parallel_world_size()
    )


def build(case: Case) -> list[Any]:
    """The model chunks of this rank, wrapped for data parallelism, with weights that no layout changes."""
    config_class: Any = TransformerConfig if case.grid is None else HeadDimTransformerConfig
    config = config_class(
        **({} if case.grid is None else {"head_dim_parallel": case.grid}),
        **{
            "num_layers": case.layers,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "ffn_hidden_size": 64,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "tensor_model_parallel_size": case.tp,
            "pipeline_model_parallel_size": case.pp,
            "virtual_pipeline_model_parallel_size": case.vp,
            "pipeline_dtype": case.dtype if case.pp > 1 else None,
            # Two stages of an interleaved schedule trade in both directions at once: only this keeps them apart.
            "overlap_p2p_comm": case.vp is not None,
            "batch_p2p_comm": case.vp is None,
            "params_dtype": case.dtype,
            "bf16": case.dtype is torch.bfloat16,
            "fp16": case.dtype is torch.float16,
            "attention_softmax_in_fp32": True,
            "deallocate_pipeline_outputs": case.pp > 1,
            # Of micro-batches of several sizes, which one of its dispatchers of experts' tokens cannot do.
            "variable_seq_lengths": case.pp > 1 and bool(case.batches),
            "moe_token_dispatcher_type": "alltoall",
            "finalize_model_grads_func": finalize_model_grads,
            "gradient_accumulation_fusion": False,
            **case.model,
        },
    )
    chunks: list[Any] = []
    for vp_stage in range(case.vp or 1):
        stage = {"vp_stage": vp_stage if case.vp else None}
        model = GPTModel(
            config,
            layer_spec(config, case, stage["vp_stage"]),
            VOCABULARY,
            SEQUENCE,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, **stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, **stage),
            share_embeddings_and_output_weights=case.tied,
            position_embedding_type=case.positions,
            **stage,
        )
        model.model_type = ModelType.encoder_or_decoder
        if case.grid is not None and case.ends:
            finish_model(model)
        fill(model)
        model.cuda(torch.cuda.current_device())
        inner = model if case.dtype is torch.float32 else Float16Module(config, model)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=case.distributed_optimizer,
            overlap_grad_reduce=case.overlap,
            overlap_param_gather=case.overlap and case.distributed_optimizer,
            bucket_size=case.bucket_size,
        )
        chunks.append(DistributedDataParallel(config, ddp, inner, disable_bucketing=vp_stage > 0))
    return chunks


def layer_spec(config: TransformerConfig, case: Case, vp_stage: int | None) -> Any:
    """Stock's local layers; with sequence parallelism also the norms, which Megatron-Core leaves to other packages."""
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    if case.grid is not None:
        return head_dim_spec(spec, config, vp_stage)
    if not config.sequence_parallel:
        return spec
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = SequenceParallelNorm
    stages = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
    return TransformerBlockSubmodules([spec] * (config.num_layers // stages), SequenceParallelNorm)


class SequenceParallelNorm(torch.nn.LayerNorm):
    """LayerNorm of one rank's share of the tokens, whose gradients Megatron sums over the TP group."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype)
        for param in self.parameters():
            param.sequence_parallel = True


def build_optimizer(case: Case, chunks: list[Any]) -> Any:
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        weight_decay=0.01,
        clip_grad=case.clip_grad,
        bf16=case.dtype is torch.bfloat16,
        fp16=case.dtype is torch.float16,
        params_dtype=case.dtype,
        use_distributed_optimizer=case.distributed_optimizer,
        overlap_param_gather=case.overlap and case.distributed_optimizer,
        initial_loss_scale=case.loss_scale or 1.0,
        min_loss_scale=1.0,
        loss_scale_window=1000,
        hysteresis=1,
        log_num_zeros_in_grad=True,
    )
    optimizer = get_megatron_optimizer(config, chunks)
    chunks[0].config.grad_scale_func = optimizer.scale_loss
    if case.overlap:
        chunks[0].config.no_sync_func = [c.no_sync for c in chunks] if len(chunks) > 1 else chunks[0].no_sync
    return optimizer


def evaluate(case: Case, chunks: list[Any], step: int) -> float:
    """The mean loss of a global batch, without gradients and dropout."""
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        loss = run_step(replace(case, batches=()), chunks, step, forward_only=True)
    for chunk in chunks:
        chunk.train()
    return loss


def run_step(case: Case, chunks: list[Any], step: int, forward_only: bool = False) -> float:
    """One forward and backward pass of the whole global batch; the mean loss, on every rank."""
    samples = torch.Generator().manual_seed(step)
    # The upper eighth of the vocabulary never occurs: without tying, its embeddings have zero gradients.
    tokens = torch.randint(VOCABULARY - VOCABULARY // 8, (8, SEQUENCE + 1), generator=samples)
    dp, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    if case.batches:
        mine: Any = tokens.view(dp, -1, SEQUENCE + 1)[rank].split(case.batches)
    else:
        mine = tokens.view(-1, dp, case.micro_batch, SEQUENCE + 1)[:, rank]
    losses = get_forward_backward_func()(
        forward_step_func=partial(forward_step, case),
        data_iterator=[iter(mine) for _ in chunks] if len(chunks) > 1 else iter(mine),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(mine),
        seq_length=SEQUENCE,
        micro_batch_size=case.micro_batch,
        forward_only=forward_only,
    )
    mean = torch.tensor(sum(float(loss["lm loss"]) for loss in losses) / len(losses) if losses else 0.0)
    dist.all_reduce(mean, group=parallel_state.get_data_parallel_group())
    mean /= dp
    dist.all_reduce(mean, dist.ReduceOp.MAX)  # only the last stage has it
    return float(mean)


def forward_step(case: Case, iterator: Any, model: Any) -> Any:
    tokens = next(iterator).cuda()
    positions = torch.arange(SEQUENCE, device="cuda").expand(len(tokens), -1)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool, device="cuda").triu(1)
    if case.own_masks:
        mask = mask | (tokens[:, None, None, :-1] % 3 == 0) & ~torch.eye(SEQUENCE, dtype=torch.bool, device="cuda")
    output = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])
    return output, partial(mean_loss)


def mean_loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = output.float().mean()
    return loss, {"lm loss": loss.detach().clone()}
