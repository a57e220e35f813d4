"""Lets mixtures of experts, Megatron's and DeepSpeed's, run without Transformer Engine and over gloo."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from hp_plugin.cpu_backend.hook import MEGATRON, TORCH, Hook

_MOE = "megatron.core.transformer.moe.moe_utils"


def without_te_gemm(original: Callable[..., Any]) -> Callable[..., Any]:
    """The router's linear as it is, with a None where it looks for Transformer Engine's matrix product by name.

    It has a branch for None, which calls torch, but the name does not exist without that package.
    """
    vars(sys.modules[original.__module__]).setdefault("te_general_gemm", None)
    return original


def gather_flat(original: Callable[..., Any]) -> Callable[..., Any]:
    """`all_gather_into_tensor`, with a flat input where the output is flat.

    NCCL compares numbers of elements; gloo wants shapes that match, which DeepSpeed's `gather_tokens` does not give.
    """

    @wraps(original)
    def all_gather_into_tensor(
        output_tensor: torch.Tensor, input_tensor: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if output_tensor.dim() == 1 and input_tensor.dim() != 1 and input_tensor.is_contiguous():
            input_tensor = input_tensor.view(-1)
        return original(output_tensor, input_tensor, *args, **kwargs)

    return all_gather_into_tensor


def splits_on_the_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """`maybe_move_tensor_to_cpu`, with the array it is asked for also where the tensor is on the CPU already.

    The alltoall dispatcher hands the result to torch as split sizes, which takes an array and no tensor.
    """

    @wraps(original)
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor) and not tensor.is_cuda:
            return tensor.numpy()
        return original(tensor, as_numpy, record_stream)

    return maybe_move_tensor_to_cpu


def uneven_gathers(expert_parallel: int, expert_tensor_parallel: int) -> str | None:
    """Why Megatron's experts cannot run over gloo on expert groups of these sizes; None where they can."""
    if expert_parallel == 1 or expert_tensor_parallel == 1:
        return None
    return (
        f"--expert-model-parallel-size {expert_parallel} with --expert-tensor-parallel-size {expert_tensor_parallel} "
        "gathers unequal numbers of tokens, which gloo cannot: on the CPU give one of them 1"
    )


HOOKS = [
    Hook(
        "megatron.core.transformer.moe.token_dispatcher",
        "maybe_move_tensor_to_cpu",
        splits_on_the_cpu,
        until="it looks at as_numpy for tensors on the CPU, too",
        made_for=MEGATRON,
        parameters=("tensor", "as_numpy", "record_stream"),
        fragment=(f"{_MOE}.maybe_move_tensor_to_cpu", "tensor.is_cuda"),
    ),
    Hook(
        _MOE,
        "router_gating_linear",
        without_te_gemm,
        until="the name te_general_gemm exists without Transformer Engine",
        made_for=MEGATRON,
        parameters=("inp", "weight", "bias", "router_dtype"),
        fragment=(f"{_MOE}.RouterGatingLinearFunction", "if te_general_gemm is not None"),
    ),
    Hook(
        "torch.distributed",
        "all_gather_into_tensor",
        gather_flat,
        until="gloo takes a flat output for an input of any shape",
        made_for=TORCH,
        parameters=("output_tensor", "input_tensor", "group", "async_op"),
    ),
]
