"""A launch line of Megatron-LM as model, layout and workload."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hp_plugin.config import WIDEST, HeadDimConfig
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.refusal import first_reasons, shown


@dataclass(frozen=True)
class Launch:
    """What a launch line says; `notes` are what is read past, or taken where the line says nothing."""

    model: ModelShape
    layout: Layout
    workload: Workload
    dtype: str
    gpus: int
    notes: tuple[str, ...]


_RANKS = {"nproc": r"--(?:nproc[-_]per[-_]node|num_gpus)", "nodes": r"--(?:nnodes|num_nodes)"}
_ALL_RANKS = r"(?:-np|-n|--ntasks)"

_INTEGERS = {
    "num-layers": None, "hidden-size": None, "num-attention-heads": None, "ffn-hidden-size": None, "kv-channels": None,
    "num-query-groups": 1, "seq-length": None, "max-position-embeddings": None, "vocab-size": None,
    "make-vocab-size-divisible-by": 128, "micro-batch-size": None, "global-batch-size": None,
    "tensor-model-parallel-size": None, "pipeline-model-parallel-size": 1, "context-parallel-size": 1,
    "expert-model-parallel-size": 1, "expert-tensor-parallel-size": None, "num-experts": 0, "moe-router-topk": 2,
    "moe-ffn-hidden-size": None, "num-layers-per-virtual-pipeline-stage": None,
    "num-virtual-stages-per-pipeline-rank": None, "rotary-base": 10_000, "window-attn-skip-freq": 0,
    "rotary-seq-len-interpolation-factor": 0,
}  # fmt: skip
"""Flags of integers and their defaults in Megatron-LM's `arguments.py`."""

_NUMBERS = {
    "attention-dropout": 0.1, "hidden-dropout": 0.1, "rotary-percent": 1.0, "norm-epsilon": 1e-5,
    "rope-scaling-factor": 8.0,
}  # fmt: skip

_WORDS = {
    "position-embedding-type": "learned_absolute", "normalization": "LayerNorm", "recompute-granularity": "",
    "transformer-impl": "transformer_engine", "head-dim-parallel": "", "head-dim-exchange": "auto",
    "moe-backend": "megatron", "moe-layer-freq": "1", "window-size": "", "tokenizer-type": "",
}  # fmt: skip

_SWITCHES = (
    "swiglu", "quick-geglu", "squared-relu", "group-query-attention", "untie-embeddings-and-output-weights",
    "disable-bias-linear", "add-qkv-bias", "qk-layernorm", "apply-layernorm-1p", "rotary-interleaved",
    "use-rope-scaling", "sequence-parallel", "tp-comm-overlap", "use-distributed-optimizer", "use-torch-fsdp2",
    "use-megatron-fsdp", "use-custom-fsdp", "recompute-activations", "fp16", "bf16", "grad-reduce-in-bf16",
)  # fmt: skip

_NOT_PLANNED = {
    "multi-latent-attention": "multi-latent attention",
    "moe-shared-expert-intermediate-size": "an expert shared by all tokens",
    "experimental-attention-variant": "another attention than softmax",
    "softmax-type": "attention sinks",
    "hybrid-override-pattern": "state-space layers",
    "mtp-num-layers": "multi-token prediction",
}
"""Flags of parts that are not planned; `--softmax-type vanilla` is none."""

_IGNORED = {
    "fp8-format": "FP8: priced in 16 bit",
    "fp4-format": "FP4: priced in 16 bit",
    "step-batch-size-schedule": "the batch grows: priced at --global-batch-size",
    "rampup-batch-size": "the batch grows: priced at --global-batch-size",
    "spec": "--spec names layers of its own: priced as a GPT's",
    "cpu-offloading": "activations are offloaded: priced as kept",
    "optimizer-cpu-offload": "the optimizer is offloaded: priced as kept",
    "account-for-embedding-in-pipeline-split": "stages of unequal length: priced as equal",
}
"""Flags that change speed or memory in a way that is not planned, and what is done instead."""

_VOCABULARIES = {"GPT2BPETokenizer": 50_257, "Llama2Tokenizer": 32_000, "": 50_257}


def read_launch(words: Sequence[str], gpus: int | None = None) -> Launch:
    """The launch that these words make; `gpus` overrides how many ranks they start.

    Raises:
        ValueError: a part that is not planned, a flag without its value, or sizes that contradict each other.
    """
    start = next(at for at, word in enumerate(words) if re.search(r"pretrain_\w*\.py$", word))
    # Arrays of flags in quotes leave more than one word in one.
    flags = [part for word in words[start + 1 :] for part in (word.split() if word.startswith("--") else [word])]
    given, notes = _parsed(flags)
    model = _model(given, notes)
    world = gpus if gpus is not None else _world(words[:start], notes)
    layout = _layout(given, model, world)
    return Launch(model, layout, _workload(given, layout), "bf16" if given.bf16 else "fp16", world, tuple(notes))


def _parsed(flags: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, integer in _INTEGERS.items():
        parser.add_argument(f"--{name}", type=int, default=integer)
    for name, number in _NUMBERS.items():
        parser.add_argument(f"--{name}", type=float, default=number)
    for name, word in _WORDS.items():
        parser.add_argument(f"--{name}", default=word)
    for name in _SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    try:
        given, others = parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise ValueError(first_reasons(f"--from-launch: {error}")) from None
    for name, default in _INTEGERS.items():
        value, least = getattr(given, name.replace("-", "_")), 0 if default == 0 else 1
        if value is not None and value < least:
            raise ValueError(f"--from-launch: --{name} must be at least {least}, got {shown(value)}")
    said = [other.lstrip("-").partition("=")[0] for other in others if other.startswith("--")]
    for name, what in _NOT_PLANNED.items():
        if name in said and "vanilla" not in others:
            raise ValueError(f"--from-launch: {what} (--{name}) is not planned")
    return given, list(dict.fromkeys(_IGNORED[name] for name in said if name in _IGNORED))


def _world(launcher: Sequence[str], notes: list[str]) -> int:
    text = " ".join(launcher)
    counts = {}
    for name, pattern in _RANKS.items():
        found = re.search(rf"(?:^|\s){pattern}[ =](\S+)", text)
        if found and not found[1].isdigit():
            raise ValueError(f"--from-launch: {found[0].strip()} is no number of its own; say how many with --gpus")
        counts[name] = int(found[1]) if found else 0
    if counts["nproc"]:
        return counts["nproc"] * max(1, counts["nodes"])
    ranks = re.search(rf"(?:^|\s){_ALL_RANKS}[ =](\d+)", text)
    if ranks:
        return int(ranks[1])
    raise ValueError("--from-launch: the line does not say on how many GPUs it starts; say it with --gpus")


def _model(given: argparse.Namespace, notes: list[str]) -> ModelShape:
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if getattr(given, name) is None:
            raise ValueError(f"--from-launch: --{name.replace('_', '-')} is missing")
    hidden, heads = given.hidden_size, given.num_attention_heads
    ffn = given.ffn_hidden_size
    if ffn is None:
        # As Megatron-LM's validate_args does.
        ffn = int(4 * hidden * 2 / 3 / 64) * 64 if given.swiglu else 4 * hidden
    if given.num_experts and given.moe_ffn_hidden_size is not None:
        ffn = given.moe_ffn_hidden_size
    if not given.moe_layer_freq.isdecimal() or len(given.moe_layer_freq) > 9:
        raise ValueError(
            f"--from-launch: --moe-layer-freq {shown(given.moe_layer_freq)}: only every so-manieth is planned"
        )
    rotary = given.position_embedding_type == "rope"
    learned = given.position_embedding_type == "learned_absolute"
    gated = given.swiglu or given.quick_geglu
    activation = "quick_gelu" if given.quick_geglu else "squared_relu" if given.squared_relu else ""
    window = given.window_size.strip("()").split(",")[0]
    return ModelShape(
        name="the launch's model",
        layers=given.num_layers,
        D=hidden,
        h=heads,
        g=given.num_query_groups if given.group_query_attention else heads,
        d=given.kv_channels or hidden // heads,
        ffn=ffn,
        vocab=_vocabulary(given, notes),
        gated=gated,
        activation=activation,
        tied=not given.untie_embeddings_and_output_weights,
        biases=not given.disable_bias_linear,
        qkv_bias=given.add_qkv_bias and given.disable_bias_linear,
        norm_biases=given.normalization == "LayerNorm",
        norm_one_plus=given.apply_layernorm_1p,
        norm_epsilon=given.norm_epsilon,
        qk_norm=given.qk_layernorm,
        learned_positions=(given.max_position_embeddings or given.seq_length or 0) if learned else 0,
        rotary=rotary,
        rotary_base=given.rotary_base,
        rotary_percent=given.rotary_percent,
        rotary_interleaved=given.rotary_interleaved,
        rotary_scaling=given.rope_scaling_factor if given.use_rope_scaling else 0.0,
        rotary_interpolation=given.rotary_seq_len_interpolation_factor,
        window=int(window) + 1 if window.lstrip("-").isdigit() and int(window) >= 0 else 0,
        window_every=given.window_attn_skip_freq,
        dropout=given.attention_dropout > 0 or given.hidden_dropout > 0,
        experts=given.num_experts,
        top_k=given.moe_router_topk if given.num_experts else 1,
        moe_every=int(given.moe_layer_freq),
    )


def _vocabulary(given: argparse.Namespace, notes: list[str]) -> int:
    """Padded as Megatron-LM pads it."""
    size: int | None = given.vocab_size
    if size is None:
        size = _VOCABULARIES.get(given.tokenizer_type, _VOCABULARIES[""])
        notes.append(f"the line does not say the vocabulary: taken as {size:,} (--vocab-size in the line says another)")
    tensor = given.tensor_model_parallel_size or _grid_size(given) or 1
    multiple = int(given.make_vocab_size_divisible_by) * tensor
    return -(-size // multiple) * multiple


def _grid_size(given: argparse.Namespace) -> int:
    asked = given.head_dim_parallel
    return HeadDimConfig.parse(asked).size if asked and asked != WIDEST else 0


def _grid(given: argparse.Namespace, model: ModelShape) -> HeadDimConfig | None:
    asked = given.head_dim_parallel
    if not asked:
        return None
    if asked == WIDEST:
        return HeadDimConfig.widest(given.tensor_model_parallel_size or 1, model.g, given.head_dim_exchange)
    return HeadDimConfig.parse(asked, given.head_dim_exchange)


def _layout(given: argparse.Namespace, model: ModelShape, world: int) -> Layout:
    grid = _grid(given, model)
    tensor = grid.size if grid is not None else given.tensor_model_parallel_size or 1
    pp, cp = given.pipeline_model_parallel_size, given.context_parallel_size
    if world % (tensor * pp * cp):
        raise ValueError(
            f"--from-launch: TP·PP·CP = {tensor * pp * cp} GPUs, and the line starts {world}, which is no multiple; "
            "say how many there are with --gpus"
        )
    if model.experts and tensor > 1 and given.moe_backend == "megatron" and given.expert_tensor_parallel_size != 1:
        raise ValueError(
            "--from-launch: experts that are split over TP ranks (--expert-tensor-parallel-size, TP by default) are "
            "not planned; 1 is"
        )
    granularity = given.recompute_granularity or ("selective" if given.recompute_activations else "none")
    sharded = given.use_torch_fsdp2 or given.use_megatron_fsdp or given.use_custom_fsdp
    return Layout(
        tp=tensor,
        grid=grid,
        pp=pp,
        vpp=_virtual(given, model, pp),
        cp=cp,
        dp=world // (tensor * pp * cp),
        ep=given.expert_model_parallel_size,
        # Megatron-LM turns it off by itself without tensor parallelism.
        sp=given.sequence_parallel and tensor > 1,
        tp_overlap=given.tp_comm_overlap,
        micro_batch=given.micro_batch_size or 1,
        recompute=granularity,
        zero="full" if sharded else "optimizer" if given.use_distributed_optimizer else "replicated",
        moe=given.moe_backend,
        fused=given.transformer_impl != "local",
    )


def _virtual(given: argparse.Namespace, model: ModelShape, pp: int) -> int:
    stages, each = given.num_virtual_stages_per_pipeline_rank, given.num_layers_per_virtual_pipeline_stage
    if stages is not None:
        return int(stages)
    return 1 if each is None or pp == 1 else max(1, int(model.layers // (pp * each)))


def _workload(given: argparse.Namespace, layout: Layout) -> Workload:
    if given.seq_length is None:
        raise ValueError("--from-launch: --seq-length is missing")
    batch = given.global_batch_size or layout.micro_batch * layout.dp
    narrow = given.grad_reduce_in_bf16 or given.fp16
    return Workload("train", given.seq_length, batch, grad_itemsize=2 if narrow else 4)
