"""One attention layer, grid against stock on the same ranks.

    torchrun --nproc-per-node 8 -m hp_plugin.bench.attention_layer

Both layers have the same weights and TP size, must give the same output, and take turns forward and backward; printed
is the ratio of the medians. Stock tensor parallelism beyond the query groups gathers the whole QKV activation on every
rank (Megatron-Core `SelfAttention`), which is what the grid avoids.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from hp_plugin import cpu_backend
from hp_plugin.attention.fused_core import with_fused_core
from hp_plugin.attention.registration import initialize_head_dim_parallel
from hp_plugin.attention.specs import head_dim_spec
from hp_plugin.attention.transformer_config import HeadDimTransformerConfig
from hp_plugin.bench.grid_argument import parsed_grid
from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.rules import AUTO, RULES, traded
from hp_plugin.exchange.shapes import attention_shape
from hp_plugin.grid.ranks import DIM_INNERMOST
from hp_plugin.processes.rank import begin_rank
from hp_plugin.training.option_groups import BACKENDS


def main() -> None:
    """Parses the shape, builds both layers, compares their outputs, then times them in turns."""
    args, head_dim = _arguments()
    cuda = torch.cuda.is_available()
    if not cuda:
        cpu_backend.enable()
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda" if cuda else "cpu")
    initialize_head_dim_parallel(head_dim)
    layers = {"stock": _layer(args, None).to(device), "grid": _layer(args, head_dim).to(device)}
    shape = (args.seq_length, args.micro_batch_size, args.hidden_size)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    _require_same(layers, inputs)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for round_ in range(args.warmup + args.rounds):
        for name, layer in layers.items():
            seconds = _step(layer, inputs)
            if round_ >= args.warmup:
                times[name].append(seconds)
    if dist.get_rank() == 0:
        _report(args, head_dim, times)
    if args.profile:
        for name, layer in layers.items():
            _profile(name, layer, inputs, args.rounds)
    dist.destroy_process_group()


def _arguments() -> tuple[argparse.Namespace, HeadDimConfig]:
    parser = argparse.ArgumentParser(description="One attention layer, grid against stock on the same ranks.")
    parser.add_argument("--head-dim-parallel", default="2,4", help="m,n with m · n = the number of ranks")
    parser.add_argument("--head-dim-exchange", default=AUTO)
    parser.add_argument("--head-dim-order", default=DIM_INNERMOST)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--num-attention-heads", type=int, default=16)
    parser.add_argument("--num-query-groups", type=int, default=2)
    parser.add_argument("--kv-channels", type=int, default=64)
    parser.add_argument("--attention-backend", choices=BACKENDS, default="auto", help="of both layers")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="then print where rank 0 spends its time in each layer")
    args = parser.parse_args()
    return args, parsed_grid(parser, args)


def _layer(args: argparse.Namespace, head_dim: HeadDimConfig | None) -> nn.Module:
    settings: dict[str, Any] = dict(
        num_layers=1,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        tensor_model_parallel_size=dist.get_world_size(),
        use_cpu_initialization=True,
        attention_dropout=0.0,
        attention_backend=AttnBackend[args.attention_backend],
    )
    config = (
        TransformerConfig(**settings)
        if head_dim is None
        else HeadDimTransformerConfig(**settings, head_dim_parallel=head_dim)
    )
    spec = with_fused_core(get_gpt_layer_local_spec(), config)
    spec = spec if head_dim is None else head_dim_spec(spec, config)
    layer = next(iter(getattr(spec, "layer_specs", [spec])))  # exchanges may make a block of it
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    return build_module(layer.submodules.self_attention, config=config, layer_number=1)


def _require_same(layers: dict[str, nn.Module], inputs: Tensor) -> None:
    outputs = {name: layer(inputs, None)[0] for name, layer in layers.items()}
    difference = (outputs["stock"] - outputs["grid"]).abs().max() / outputs["stock"].abs().max()
    if not difference < 1e-5:
        raise SystemExit(f"the layers differ by {difference:.1e} of the largest output: nothing to compare")


def _step(layer: nn.Module, inputs: Tensor) -> float:
    """Seconds of one forward and backward pass, the slowest rank's."""
    inputs = inputs.detach().requires_grad_()
    dist.barrier()
    start = time.perf_counter()
    output, _ = layer(inputs, None)
    output.backward(torch.ones_like(output))
    if inputs.is_cuda:
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - start, device=inputs.device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def _profile(name: str, layer: nn.Module, inputs: Tensor, rounds: int) -> None:
    """Prints the operators with the most time of their own; waiting for other ranks is in the collectives' time."""
    with torch.profiler.profile() as profile:
        for _ in range(rounds):
            _step(layer, inputs)
    if dist.get_rank() == 0:
        order = "self_cuda_time_total" if inputs.is_cuda else "self_cpu_time_total"
        print(f"{name}, {rounds} passes")
        print(profile.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=40))


def _report(args: argparse.Namespace, head_dim: HeadDimConfig, times: dict[str, list[float]]) -> None:
    median = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"attention layer, {dist.get_world_size()} ranks, s={args.seq_length} b={args.micro_batch_size} "
        f"D={args.hidden_size} h={args.num_attention_heads} g={args.num_query_groups} d={args.kv_channels}, "
        f"{args.rounds} interleaved rounds"
    )
    for name, values in times.items():
        low, high = min(values) * 1e3, max(values) * 1e3
        print(f"  {name:5s} median {median[name] * 1e3:8.1f} ms   (min {low:.1f}, max {high:.1f})")
    print(f"  grid {head_dim.m}x{head_dim.n} is {median['stock'] / median['grid']:.2f} times as fast as stock")
    shape = attention_shape(
        HeadDimTransformerConfig(
            num_layers=1,
            hidden_size=args.hidden_size,
            num_attention_heads=args.num_attention_heads,
            num_query_groups=args.num_query_groups,
            kv_channels=args.kv_channels,
            head_dim_parallel=head_dim,
        ),
        head_dim,
        args.micro_batch_size,
        args.seq_length,
    )
    tp, qkv = dist.get_world_size(), (args.num_attention_heads + 2 * args.num_query_groups) * args.kv_channels
    gathered = args.seq_length * args.micro_batch_size * qkv * (tp - 1) // tp if args.num_query_groups < tp else 0
    moved = RULES[traded(head_dim.exchange, shape, True, 4)].elements(shape)
    print(f"  elements received around attention, per rank, forward: stock {gathered:,}, grid {moved:,}")


if __name__ == "__main__":
    begin_rank()
    warnings.filterwarnings("ignore", message=".*is recommended to set the environment variable")
    main()
