"""A machine file for `hp-plugin plan --hardware`: kernels measured on this device, links of a published machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from hp_plugin.bench.gpu.kernels import Bench

LINKS = "h100-ib"
"""The shipped machine whose collectives and network stand in: one GPU measures none."""


@dataclass(frozen=True)
class Sizes:
    """What the tables hold: sides of products (m; n and k), head dimensions and lengths of attention; bytes."""

    rows: tuple[int, ...]
    sides: tuple[int, ...]
    widths: tuple[int, ...]
    lengths: tuple[int, ...]
    stream: int


FULL = Sizes((1024, 4096, 16384), (512, 1024, 2048, 4096, 8192, 32768), (64, 128, 256, 512), (1024, 4096, 8192), 2**30)
TINY = Sizes((16, 64), (16, 64), (16, 32), (32, 64), 2**16)

_ATTENTION_TOKENS = 8192
"""Tokens times samples of one attention call, over 16 heads: enough to fill any GPU."""


def machine_description(bench: Bench, sizes: Sizes) -> dict[str, Any]:
    """A description as docs/planner.md has it; every figure measured here says so, all others are inherited."""
    device = bench.device
    where = f"{device_name(device)}, {str(bench.dtype).removeprefix('torch.')}, torch {torch.__version__}, alone"

    def here(value: float, what: str) -> dict[str, Any]:
        return {"value": value, "kind": "here", "source": f"{what}; {where}"}

    rows = [
        (1, m, n, k, 2e-12 * m * n * k / bench.product(1, m, n, k))
        for m, n, k in product(sizes.rows, *[sizes.sides] * 2)
    ]
    bandwidth = sizes.stream / bench.stream(sizes.stream)
    slow = sizes.stream / bench.softmax(sizes.stream)
    parameters = {
        "memory_bytes": here(_memory_bytes(device), "memory of the device"),
        "hbm_bytes_per_s": here(bandwidth, f"copy of {sizes.stream / 2:,.0f} bytes"),
        "peak_flops": here(max(row[-1] for row in rows) * 1e12, "fastest product of the table"),
        "unfused_efficiency": here(min(1.0, slow / bandwidth), "softmax over the above"),
        "kernel_gap_s": here(bench.gap(), "from one tiny kernel to the next"),
        "gemm_scale": here(1.0, "the GEMM table is of this device"),
        "attention_scale": here(1.0, "the attention table is of this device"),
    }
    if device.type == "cuda":
        count = torch.cuda.get_device_properties(device).multi_processor_count
        parameters["multiprocessors"] = here(count, "of the device")
    return {
        "description": f"{device_name(device)}: its kernels measured, links and collectives those of {LINKS}",
        "based_on": LINKS,
        "parameters": parameters,
        "gemm": {"kind": "here", "source": where, "columns": ["batch", "m", "n", "k", "tflops"], "rows": rows},
        "attention": {
            "kernels": {
                "sdpa": {
                    "kind": "here",
                    # The memory-efficient kernel takes any head dimension; rates beyond the widest are the widest's.
                    "max_head_dim": 2**16,
                    "source": f"torch.nn.functional.scaled_dot_product_attention; {where}",
                    **_attention_rates(bench, sizes),
                }
            },
            "occupancy": {
                "kind": "assumed",
                "source": "the table is of full devices",
                "tile_rows": 1,
                "half_waves": 0.0,
                "reference_waves": 1.0,
            },
        },
        "kernels": ["sdpa"],
    }


def device_name(device: torch.device) -> str:
    """The card's name, or how many cores a CPU process has."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _memory_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _attention_rates(bench: Bench, sizes: Sizes) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {"forward": {}, "forward_backward": {}}
    tokens = max(_ATTENTION_TOKENS if sizes is FULL else 0, max(sizes.lengths))
    for width, length, causal in product(sizes.widths, sizes.lengths, (True, False)):
        heads = (16 if sizes is FULL else 1) * tokens // length
        operations = 4e-12 * length**2 * heads * width / (2 if causal else 1)
        for passes, factor in (("forward", 1.0), ("forward_backward", 3.5)):
            seconds = bench.attention(heads, length, length, width, causal, passes == "forward_backward")
            by_mask = found[passes].setdefault(str(width), {"causal": {}, "full": {}})
            by_mask["causal" if causal else "full"][str(length)] = factor * operations / seconds
    return found
