"""Rates of kernels while every rank runs them: matrix products, stock attention, memory passes, and launching."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch.nn import functional

from hp_plugin.compare.entries.planned import model_shape
from hp_plugin.compare.ranks.running import built
from hp_plugin.compare.ranks.timing import run_step
from hp_plugin.compare.ranks.together import seconds_together
from hp_plugin.planner.counts.layer import layer_passes
from hp_plugin.planner.counts.program import kernels
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.training.config import TrainingConfig

_SIDES = (16, 64, 256, 1024)
_WIDTHS, _LENGTHS, _HEADS, _SAMPLES = (16, 64, 128), (32, 128, 512), 2, 4
_NORMALIZED = (512, 512)
"""An activation, [tokens, D], of the size that the models of the catalogue have."""
_TINY = TrainingConfig(
    num_layers=2, hidden_size=16, num_attention_heads=2, seq_length=16, micro_batch_size=1, disable_bias_linear=True,
    position_embedding_type="rope", train_iters=1_000_000, lr=1e-3,
)  # fmt: skip
_DEEPER = 8
_STEPS = 9


def gemm_rows(dtype: torch.dtype) -> list[tuple[float, ...]]:
    """(batch, m, n, k, 10¹² operations per second) over a full grid of sizes, as a linear layer multiplies."""
    rows: list[tuple[float, ...]] = []
    for m, n, k in product(_SIDES, repeat=3):
        inputs, weight = torch.ones(m, k, dtype=dtype), torch.ones(n, k, dtype=dtype)
        seconds = seconds_together(lambda left=inputs, right=weight: functional.linear(left, right))
        rows.append((1, m, n, k, 2e-12 * m * n * k / seconds))
    return rows


def attention_rates(dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Megatron-Core's `DotProductAttention` by head dimension and length, 10¹² operations per second.

    It computes all scores and masks half of them: under `full` the same time counts for twice the operations.
    """
    found: dict[str, dict[str, Any]] = {"forward": {}, "forward_backward": {}}
    for width in _WIDTHS:
        config = replace(
            _TINY, hidden_size=width * _HEADS, num_attention_heads=_HEADS, attention_dropout=0.0, hidden_dropout=0.0
        )
        with built(config) as trainer:
            attention = DotProductAttention(trainer.transformer_config, 1, AttnMaskType.causal, "self")
            for length in _LENGTHS:
                operations = 2e-12 * length**2 * _HEADS * _SAMPLES * width
                for passes, factor in (("forward", 1.0), ("forward_backward", 3.5)):
                    seconds = _attention_seconds(attention, length, width, dtype, passes == "forward_backward")
                    by_mask = found[passes].setdefault(str(width), {"causal": {}, "full": {}})
                    by_mask["causal"][str(length)] = factor * operations / seconds
                    by_mask["full"][str(length)] = 2 * factor * operations / seconds
    return found


def _attention_seconds(
    attention: DotProductAttention, length: int, width: int, dtype: torch.dtype, backward: bool
) -> float:
    shape = (length, _SAMPLES, _HEADS, width)
    query, key, value = (torch.randn(shape).to(dtype).requires_grad_(backward) for _ in range(3))
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)

    def run() -> None:
        with torch.set_grad_enabled(backward):
            output = attention(query, key, value, mask)
        if backward:
            output.backward(torch.ones_like(output))

    return seconds_together(run)


def memory_bandwidth(dtype: torch.dtype) -> float:
    """Bytes per second over the memory-bound kernels of a layer: residual sum, norm and activation, together."""
    left, right = torch.randn(_NORMALIZED).to(dtype), torch.randn(_NORMALIZED).to(dtype)
    size = left.numel() * left.element_size()
    seconds = sum(
        seconds_together(work)
        for work in (
            lambda: left + right,
            lambda: functional.layer_norm(left, left.shape[1:]),
            lambda: functional.gelu(left, approximate="tanh"),
        )
    )
    return (3 + 2 + 2) * size / seconds


def softmax_bandwidth(dtype: torch.dtype) -> float:
    """Bytes per second of a softmax over scores, read and written once."""
    scores = torch.randn(_NORMALIZED).to(dtype)
    return 2 * scores.numel() * scores.element_size() / seconds_together(lambda: scores.softmax(-1))


def launch_seconds() -> float:
    """Seconds per kernel of the planner's where nothing else counts: what each further layer of a tiny model takes.

    A model has more operators than the planner counts kernels, and Python between them; all of that is in here.
    """
    config = replace(_TINY, global_batch_size=dist.get_world_size())
    deeper = replace(config, num_layers=_DEEPER)
    seconds = _forward_seconds(deeper) - _forward_seconds(config)
    workload = Workload("forward", config.seq_length, config.global_batch_size or 1, 4)
    counted = layer_passes(Share(model_shape(config), Layout(dp=dist.get_world_size(), fused=False), workload), False)
    return max(seconds, 1e-9) / (_DEEPER - config.num_layers) / len(list(kernels(counted.forward)))


def _forward_seconds(config: TrainingConfig) -> float:
    with built(config) as trainer:
        run_step(trainer, "forward")
        return statistics.median(_one_forward(trainer) for _ in range(_STEPS))


def _one_forward(trainer: Any) -> float:
    dist.barrier()
    began = time.perf_counter()
    run_step(trainer, "forward")
    value = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)
