"""Describes the machine that the ranks run on as hardware of the planner."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hp_plugin.compare.ranks.together import cpu_cores
from hp_plugin.compare.rates.collective_curves import measure_curves
from hp_plugin.compare.rates.kernel_rates import (
    attention_rates,
    gemm_rows,
    launch_seconds,
    memory_bandwidth,
    softmax_bandwidth,
)
from hp_plugin.training.peak_memory import peak_bytes

_ALONE = "none: one domain holds all ranks, and layouts of more come out as never ending"


def describe_machine(dtype: torch.dtype) -> dict[str, Any]:
    """A hardware description (docs/planner.md) of CPU ranks that share this machine; to be called on all of them.

    Everything is measured while all ranks do the same, so that a rate is what one rank gets of the shared cores. No
    figure comes from a model that is compared. The same on every rank.
    """
    world = dist.get_world_size()
    cores = cpu_cores()
    where = f"{world} ranks at once on {cores} CPU cores ({platform.machine()}), {str(dtype).removeprefix('torch.')}"
    gemm = gemm_rows(dtype)
    bandwidth, softmax = memory_bandwidth(dtype), softmax_bandwidth(dtype)
    rates = attention_rates(dtype)
    curves = measure_curves(dtype, where)

    def here(value: float, what: str) -> dict[str, Any]:
        return {"value": value, "kind": "here", "source": f"{what}; {where}"}

    def assumed(value: float, why: str) -> dict[str, Any]:
        return {"value": value, "kind": "assumed", "source": why}

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "description": f"{world} processes on {cores} CPU cores, gloo",
        "parameters": {
            "memory_bytes": here(memory / world, "physical memory over ranks"),
            "reserved_bytes": here(peak_bytes() or 1, "resident memory of a rank without a model"),
            "hbm_bytes_per_s": here(bandwidth, "sum, layer norm and GELU of 512 × 512 elements"),
            "peak_flops": here(max(row[-1] for row in gemm) * 1e12, "fastest product of the table"),
            "multiprocessors": assumed(100, "a rank's share of the cores in percent"),
            "collective_multiprocessors": assumed(99, "gloo's threads run on the cores that compute"),
            "unfused_efficiency": here(min(1.0, softmax / bandwidth), "softmax of 512 × 512 elements over the above"),
            "kernel_gap_s": here(launch_seconds(), "forward time that 6 more layers of D=16 take, by counted kernel"),
            "gemm_efficiency": assumed(1.0, "the table was measured with all ranks at work; not fitted to any run"),
            "gemm_scale": here(1.0, "the GEMM table is of this machine"),
            "attention_scale": here(1.0, "the attention table is of this machine"),
            "collective_scale": here(1.0, "the curves are of this machine"),
            "domain": here(world, "ranks of this machine"),
            "step_s": here(_step_seconds(curves), "smallest all-reduce, largest group less the smallest, by rank"),
            **{
                name: assumed(1.0, _ALONE)
                for name in ("nic_bytes_per_s", "network_step_s", "tree_step_s", "many_domains_bytes_per_s")
            },
        },
        "gemm": {"kind": "here", "source": where, "columns": ["batch", "m", "n", "k", "tflops"], "rows": gemm},
        "attention": {
            "kernels": {
                "local": {"kind": "here", "max_head_dim": 128, "source": f"DotProductAttention; {where}", **rates}
            },
            "occupancy": {
                "kind": "assumed",
                "source": "a core has no waves of tiles",
                "tile_rows": 1,
                "half_waves": 0.0,
                "reference_waves": 1.0,
            },
        },
        "kernels": ["local"],
        "collectives": curves,
    }
    # Ranks measured the same times, but rounding and clocks differ: all go by rank 0.
    shared = [found]
    dist.broadcast_object_list(shared)
    return shared[0]


def write_machine(machine: dict[str, Any], path: Path) -> None:
    """Writes a description that `hp-plugin plan --hardware` reads, whole or not at all."""
    path.with_suffix(".new").write_text(json.dumps(machine, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".new").replace(path)


def _step_seconds(curves: dict[str, Any]) -> float:
    """What one more rank adds to the smallest all-reduce; with a single group size, a share of that size's."""
    smallest = {one["ranks"]: one["points"][0][1] for one in curves["curves"] if one["collective"] == "all_reduce"}
    low, high = min(smallest), max(smallest)
    added = (smallest[high] - smallest[low]) / (high - low) if high > low else smallest[high] / high
    return max(added, 1e-3) * 1e-6
