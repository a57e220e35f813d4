"""Sums what Megatron's gradient finalization would sum over the TP group; DeepSpeed's engine never calls it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hp_plugin.exchange.replicas import is_partial
from hp_plugin.grid.groups import HeadDimGroups


def sum_replica_gradients(model: nn.Module, groups: HeadDimGroups) -> list[RemovableHandle]:
    """Hooks every parameter of which each TP rank sees a share of the work, so that its gradient is the whole one.

    These are the norms and biases that sequence parallelism gives a share of the tokens, QK-norms, which see a share of
    the heads, and what exchange `weights` gives the tokens of one place on the dim axis. A gradient is summed in
    backward, before it is accumulated: what ZeRO buckets, partitions, clips or offloads is then already the same on all
    ranks, at every stage and under gradient accumulation.

    Volume: one all-reduce over the TP group (or the dim axis) per such parameter and micro-batch, in fp32.

    Source: `megatron.core.distributed.finalize_model_grads`, the marks and names it goes by.
    """
    tp_group = groups.tp
    if tp_group.size() == 1:
        return []
    handles = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if getattr(parameter, "average_gradients_across_tp_domain", False):
            handles.append(parameter.register_hook(_summing(tp_group, 1 / tp_group.size())))
        elif getattr(parameter, "sequence_parallel", False) or "q_layernorm" in name or "k_layernorm" in name:
            handles.append(parameter.register_hook(_summing(tp_group, 1.0)))
        elif is_partial(parameter):
            handles.append(parameter.register_hook(_summing(groups.dim, 1.0)))
    return handles


def _summing(group: dist.ProcessGroup, factor: float) -> Callable[[Tensor], Tensor]:
    def whole(gradient: Tensor) -> Tensor:
        # Never in place: autograd may hand the same tensor to others. Half precision is summed in fp32.
        total = gradient.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return (total * factor if factor != 1.0 else total).to(gradient.dtype)

    return whole
