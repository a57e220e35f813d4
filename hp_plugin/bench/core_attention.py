"""Core attention alone: torch's fused kernels against Megatron-Core's unfused local attention.

    python -m hp_plugin.bench.core_attention --kv-channels 512

One process, and the GPU where there is one. Both have the same inputs, must give the same output, and take turns;
printed are the medians, the ratio of the medians, and the peak of memory above what the inputs take.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hp_plugin.attention.fused_core import FusedDotProductAttention
from hp_plugin.training.distributed import prepare_device
from hp_plugin.training.peak_memory import peak_bytes, reset_peak, return_free_memory

MODES = ("forward", "training")
CORES = ("unfused", "fused")
SHAPE = ("seq_length", "micro_batch_size", "num_attention_heads", "num_query_groups", "kv_channels", "window", "dtype")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    """Parses the shape, measures and prints."""
    warnings.filterwarnings("ignore")
    print("\n".join(described(measure(arguments().parse_args()))))


def arguments() -> argparse.ArgumentParser:
    """The options, with their defaults."""
    parser = argparse.ArgumentParser(description="Core attention: torch's fused kernels against Megatron-Core's own.")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--num-attention-heads", type=int, default=8)
    parser.add_argument("--num-query-groups", type=int, default=8)
    parser.add_argument("--kv-channels", type=int, default=512)
    parser.add_argument("--window", type=int, help="keys that a query sees to its left (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1)
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """{`shape`, `device`, `times_s` and `peak_bytes` by "mode/core"}; makes a world of one, and ends it.

    Raises:
        RuntimeError: the two give different outputs.
    """
    prepare_device()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    joined = not dist.is_initialized()
    if joined:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    try:
        cores = {"unfused": _core(args, DotProductAttention), "fused": _core(args, FusedDotProductAttention)}
        inputs = _inputs(args, device)
        _require_same(cores, inputs)
        times: dict[str, list[float]] = {f"{mode}/{core}": [] for mode in MODES for core in CORES}
        peaks: dict[str, int | None] = dict.fromkeys(times)
        for round_ in range(args.warmup + args.rounds):
            for name in times:
                mode, core = name.split("/")
                seconds, peak = _run(cores[core], inputs, training=mode == "training")
                if round_ >= args.warmup:
                    times[name].append(seconds)
                    peaks[name] = peak if peaks[name] is None or peak is None else max(peaks[name] or 0, peak)
    finally:
        parallel_state.destroy_model_parallel()
        if joined:
            dist.destroy_process_group()
    shape = {name: getattr(args, name) for name in SHAPE}
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"shape": shape, "device": device_name, "times_s": times, "peak_bytes": peaks}


def described(found: dict[str, Any]) -> list[str]:
    """The lines to print."""
    shape = found["shape"]
    window = "" if shape["window"] is None else f" window={shape['window']}"
    lines = [
        f"core attention, s={shape['seq_length']} b={shape['micro_batch_size']} h={shape['num_attention_heads']} "
        f"g={shape['num_query_groups']} d={shape['kv_channels']}{window} {shape['dtype']}, {found['device']}, "
        f"{len(next(iter(found['times_s'].values())))} interleaved rounds"
    ]
    for mode in MODES:
        medians, peaks = {}, {}
        for core in CORES:
            times, peak = found["times_s"][f"{mode}/{core}"], found["peak_bytes"][f"{mode}/{core}"]
            medians[core], peaks[core] = statistics.median(times), peak
            memory = "" if peak is None else f"   peak {peak / 2**20:8.1f} MiB"
            span = f"(min {min(times) * 1e3:.1f}, max {max(times) * 1e3:.1f})"
            lines.append(f"  {mode:8s} {core:7s} median {medians[core] * 1e3:8.1f} ms   {span}{memory}")
        memory = (
            ""
            if not peaks["fused"] or not peaks["unfused"]
            else (f" and {peaks['fused'] / peaks['unfused']:.2f} times the memory")
        )
        lines.append(f"  {mode}: fused takes {medians['fused'] / medians['unfused']:.2f} times as long{memory}")
    return lines


def _core(args: argparse.Namespace, kind: type[DotProductAttention]) -> DotProductAttention:
    dtype = DTYPES[args.dtype]
    config = TransformerConfig(
        num_layers=1,
        hidden_size=args.num_attention_heads * args.kv_channels,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        window_size=None if args.window is None else (args.window, 0),
        attention_dropout=0.0,
        attention_backend=AttnBackend.unfused if kind is DotProductAttention else AttnBackend.fused,
        masked_softmax_fusion=False,
        attention_softmax_in_fp32=True,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
    )
    return kind(config=config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")


def _inputs(args: argparse.Namespace, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    heads = (args.num_attention_heads, args.num_query_groups, args.num_query_groups)
    shapes = [(args.seq_length, args.micro_batch_size, count, args.kv_channels) for count in heads]
    made = [torch.randn(shape, generator=generator).to(device, DTYPES[args.dtype]) for shape in shapes]
    return [tensor.requires_grad_() for tensor in made]


def _require_same(cores: dict[str, DotProductAttention], inputs: list[Tensor]) -> None:
    with torch.no_grad():
        stock, fused = (cores[name](*inputs, None).float() for name in CORES)
    difference = ((stock - fused).abs().max() / stock.abs().max()).item()
    limit = max(1e-5, 8 * torch.finfo(inputs[0].dtype).eps)
    if not difference < limit:
        raise RuntimeError(f"the outputs differ by {difference:.1e} of the largest: nothing to compare")


def _run(core: DotProductAttention, inputs: list[Tensor], training: bool) -> tuple[float, int | None]:
    """Seconds of one pass, and the largest memory above what was there before it."""
    for tensor in inputs:
        tensor.grad = None
    parallel_state.get_global_memory_buffer().buffer.clear()  # stock's for its scores, which outlives the call
    return_free_memory()
    reset_peak()
    before = _present_bytes(inputs[0].device)
    _wait(inputs[0].device)
    start = time.perf_counter()
    with contextlib.nullcontext() if training else torch.no_grad():
        output = core(*inputs, None)
        if training:
            output.backward(torch.ones_like(output))
    _wait(inputs[0].device)
    seconds, peak = time.perf_counter() - start, peak_bytes()
    return seconds, None if peak is None or before is None else peak - before


def _present_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * 4096


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
