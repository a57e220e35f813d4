"""Cross entropy of a vocabulary spread over any group; Megatron-Core's own function knows the TP group alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from torch import Tensor


def vocabulary_cross_entropy(logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Losses `[s, b]` of logits `[s, b, V/m]` whose vocabulary the ranks of `group` hold in parts, in their order.

    Three all-reduces of `[s, b]` in forward, none in backward. Overwrites fp32 logits, as stock does.
    """
    return _VocabularyCrossEntropy.apply(logits, targets, group)


class _VocabularyCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
        stock = VocabParallelCrossEntropy
        logits, largest = stock.calculate_logits_max(logits)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        start = group.rank() * logits.shape[-1]
        outside, places, predicted, total, exponentials = stock.calculate_predicted_logits(
            logits, targets, largest, start, start + logits.shape[-1]
        )
        dist.all_reduce(predicted, group=group)
        dist.all_reduce(total, group=group)
        softmax, loss = stock.calculate_cross_entropy_loss(exponentials, predicted, total)
        ctx.save_for_backward(softmax, outside, places)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        softmax, outside, places = ctx.saved_tensors
        stock = VocabParallelCrossEntropy
        rows, numbers, update, whole = stock.prepare_gradient_calculation_operands(softmax, outside)
        return stock.calculate_gradients(rows, numbers, places, update, whole, gradient), None, None
