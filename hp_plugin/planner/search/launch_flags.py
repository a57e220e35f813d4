"""A predicted layout as a launch: Megatron flags and a DeepSpeed configuration."""

from __future__ import annotations

from typing import Any

from hp_plugin.grid.ranks import DIM_INNERMOST
from hp_plugin.planner.counts.stages import split_layers
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.seconds.prediction import Prediction


def megatron_flags(prediction: Prediction, dtype: str = "bf16") -> list[str]:
    """Arguments of Megatron-LM's `pretrain_gpt.py` that say model and layout; the rest of a launch is the user's."""
    model, layout, workload = prediction.model, prediction.layout, prediction.workload
    flags = [f"--num-layers {model.layers}", f"--hidden-size {model.D}", f"--num-attention-heads {model.h}"]
    flags += [f"--kv-channels {model.d}", f"--ffn-hidden-size {model.ffn}"]
    if model.g != model.h:
        flags += ["--group-query-attention", f"--num-query-groups {model.g}"]
    flags += _ACTIVATIONS.get((model.gated, model.activation), [])
    flags += [] if model.norm_biases else ["--normalization RMSNorm"]
    flags += ["--apply-layernorm-1p"] if model.norm_one_plus else []
    flags += [f"--norm-epsilon {model.norm_epsilon:g}"] if model.norm_epsilon != 1e-5 else []
    flags += [] if model.biases else ["--disable-bias-linear"]
    flags += ["--add-qkv-bias"] if model.qkv_bias else []
    flags += ["--qk-layernorm"] if model.qk_norm else []
    flags += [] if model.tied else ["--untie-embeddings-and-output-weights"]
    flags += _position_flags(model)
    if model.window:
        # Megatron counts the positions to the left of the query's own.
        flags.append(f"--window-size {model.window - 1},0")
        flags += [f"--window-attn-skip-freq {model.window_every}"] if model.window_every else []
    if not model.dropout:
        flags += ["--attention-dropout 0", "--hidden-dropout 0"]
    flags += [f"--vocab-size {model.vocab}"] if model.vocab else []
    flags += [f"--seq-length {workload.seq}"]
    flags += [f"--max-position-embeddings {max(workload.seq, model.learned_positions)}", f"--{dtype}"]
    if workload.training:
        flags += [f"--micro-batch-size {layout.micro_batch}", f"--global-batch-size {workload.global_batch}"]
        flags += ["--grad-reduce-in-bf16"] if dtype == "bf16" and workload.grad_itemsize == 2 else []
    return flags + _parallel_flags(prediction) + _expert_flags(prediction)


_ACTIVATIONS = {
    (True, ""): ["--swiglu"],
    (True, "silu"): ["--swiglu"],
    (True, "quick_gelu"): ["--quick-geglu"],
    (False, "squared_relu"): ["--squared-relu"],
    (False, ""): [],
    (False, "gelu"): [],
}
"""Flags by whether the MLP is gated and its activation; no flag builds the others."""


def _position_flags(model: ModelShape) -> list[str]:
    positions = "rope" if model.rotary else "learned_absolute" if model.learned_positions else "none"
    flags = [f"--position-embedding-type {positions}"]
    if not model.rotary:
        return flags
    flags += [f"--rotary-base {model.rotary_base}"] if model.rotary_base != 10_000 else []
    flags += [f"--rotary-percent {model.rotary_percent:g}"] if model.rotary_percent != 1 else []
    flags += ["--rotary-interleaved"] if model.rotary_interleaved else []
    if model.rotary_scaling:
        flags += ["--use-rope-scaling", f"--rope-scaling-factor {model.rotary_scaling:g}"]
    if model.rotary_interpolation:
        flags.append(f"--rotary-seq-len-interpolation-factor {model.rotary_interpolation}")
    return flags


def not_in_flags(model: ModelShape) -> list[str]:
    """Parts of a model that no flag of Megatron-LM's pretrain_gpt.py builds; they are counted and priced."""
    said = list(model.unbuilt)
    if (model.gated, model.activation) not in _ACTIVATIONS:
        said.append(f"the activation {model.activation}{' of a gated MLP (--swiglu is SiLU)' if model.gated else ''}")
    said += ["a bias of the attention output projection alone"] if model.proj_bias and not model.biases else []
    said += ["biases of the MLP alone"] if model.mlp_bias and not model.biases else []
    return said


def _parallel_flags(prediction: Prediction) -> list[str]:
    model, layout, workload = prediction.model, prediction.layout, prediction.workload
    flags = []
    if layout.grid is None:
        flags.append(f"--tensor-model-parallel-size {layout.tp}")
    else:
        flags += layout.grid.flags
    flags.append(f"--pipeline-model-parallel-size {layout.pp}")
    if layout.vpp > 1:
        flags.append(f"--num-layers-per-virtual-pipeline-stage {model.layers // layout.stages}")
    elif model.layers % layout.pp:
        split = split_layers(model.layers, layout.pp)
        assert split is not None, "a predicted layout has no empty stage"
        flags.append(f"--decoder-last-pipeline-num-layers {split[-1]}")
    flags += [f"--context-parallel-size {layout.cp}"] if layout.cp > 1 else []
    if layout.gtp > 1:
        flags.append(f"--tensor-parallel-num-weight-shards {layout.tp * layout.gtp}")
    if layout.cp_heads == layout.cp > 1:
        flags.append("--cp-comm-type a2a")
    elif layout.cp_heads > 1:
        around = layout.cp // layout.cp_heads
        flags.append(f"--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes {layout.cp_heads} {around}")
    flags += ["--sequence-parallel"] if layout.sp else []
    flags += ["--tp-comm-overlap"] if layout.tp_overlap else []
    if layout.recompute == "full":
        flags += ["--recompute-granularity full", "--recompute-method uniform", "--recompute-num-layers 1"]
    elif layout.recompute == "selective":
        flags += ["--recompute-granularity selective", "--recompute-modules core_attn"]
    return flags + DATA_PARALLEL_FLAGS[layout.zero] if workload.training else flags


DATA_PARALLEL_FLAGS = {
    "replicated": ["--overlap-grad-reduce"],
    "optimizer": ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"],
    # What Megatron-LM asks for beside it.
    "full": ["--use-torch-fsdp2", "--no-gradient-accumulation-fusion", "--ckpt-format torch_dist"],
}


def _expert_flags(prediction: Prediction) -> list[str]:
    model, layout = prediction.model, prediction.layout
    if not model.experts:
        return []
    flags = [f"--num-experts {model.experts}", f"--moe-router-topk {model.top_k}"]
    flags += [f"--expert-model-parallel-size {layout.ep}", "--expert-tensor-parallel-size 1"]
    if layout.moe == "deepspeed":
        flags += ["--moe-backend deepspeed", "--moe-expert-capacity-factor 1"]
    else:
        flags += ["--moe-grouped-gemm", "--moe-token-dispatcher-type alltoall"]
    flags += ["--moe-router-pre-softmax"] if model.top_k == 1 else []
    flags += [f"--moe-layer-freq {model.moe_every}"] if model.moe_every > 1 else []
    return flags


def deepspeed_config(prediction: Prediction, dtype: str = "bf16") -> dict[str, Any]:
    """The DeepSpeed configuration of a layout; the grid is its `head_dim_parallel` option.

    Raises:
        ValueError: a pipeline or context-parallel layout, which is not a matter of DeepSpeed's configuration, or
            Megatron's experts, which DeepSpeed's engine does not train.
    """
    layout, workload = prediction.layout, prediction.workload
    if prediction.model.experts and layout.moe != "deepspeed":
        raise ValueError(f"{layout}: DeepSpeed's engine trains DeepSpeed's experts alone (moe=deepspeed)")
    if layout.pp > 1 or layout.cp > 1:
        raise ValueError(f"{layout}: pipeline and context parallelism are not part of a DeepSpeed configuration")
    stage = {"replicated": 0, "optimizer": 1, "full": 3}[layout.zero]
    config: dict[str, Any] = {
        "train_batch_size": workload.global_batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": workload.global_batch // (layout.micro_batch * layout.dp),
        dtype: {"enabled": True},
        "zero_optimization": {"stage": stage},
    }
    if layout.grid is not None:
        config["head_dim_parallel"] = {
            "m": layout.grid.m,
            "n": layout.grid.n,
            "exchange": layout.grid.exchange,
        }
        if layout.order != DIM_INNERMOST:
            config["head_dim_parallel"]["order"] = layout.order
    return config
