"""One rank's kernels of the source's models on this device, and a machine file from them.

python -m hp_plugin.bench.gpu.shard RESULT.json MACHINE.json [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from hp_plugin.bench.gpu.kernels import Bench
from hp_plugin.bench.gpu.machine_file import FULL, LINKS, TINY, device_name, machine_description
from hp_plugin.bench.gpu.replay import layouts, replayed
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.models import load_model
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import load_hardware

RANKS = 16
MODELS = ("paper-dense", "paper-moe")
SEQUENCE, MICRO_BATCH, BATCH = 2048, 16, 1024
OPTIMIZER_PARAMETERS = 2**26
_SMALL: dict[str, Any] = dict(layers=2, D=64, h=16, g=16, d=16, ffn=128)


def main() -> None:
    """Measures the tables, writes the machine file, replays every layout with it and writes the rows."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description="One rank's kernels at full size, and a machine file from them.")
    parser.add_argument("result", type=Path)
    parser.add_argument("machine", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = torch.float16 if device.type == "cuda" else torch.float32
    bench = Bench(device, half)
    args.machine.write_text(
        json.dumps(machine_description(bench, TINY if args.dry_run else FULL), indent=1) + "\n", "utf-8"
    )
    machines = {"this device": load_hardware(str(args.machine)), LINKS: load_hardware(LINKS)}
    length, micro_batch, batch = (32, 16, 64) if args.dry_run else (SEQUENCE, MICRO_BATCH, BATCH)
    workload = Workload("train", length, batch, bench.dtype.itemsize, bench.dtype.itemsize)
    rows = {}
    for name in MODELS:
        model = _small(name) if args.dry_run else load_model(name)
        rows[name] = replayed(bench, model, workload, layouts(RANKS, micro_batch, model.experts > 0), machines)
    count = 2**10 if args.dry_run else OPTIMIZER_PARAMETERS
    slices = (length * micro_batch, 3, 4, 16 if args.dry_run else 128)
    copied = 2 * bench.dtype.itemsize * slices[0] * slices[1] * slices[2] * slices[3]
    found = {
        "device": device_name(device),
        "dtype": str(bench.dtype).removeprefix("torch."),
        "tokens": [length, micro_batch],
        "rows": rows,
        "optimizer": {"parameters": count, "seconds": bench.adam(count)},
        "exchange copy": {"shape": slices, "bytes_per_s": copied / bench.permuted_copy(*slices)},
    }
    args.result.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def _small(name: str) -> ModelShape:
    experts = {"experts": 8, "top_k": 1} if load_model(name).experts else {}
    return ModelShape(f"small {name}", **_SMALL, **experts)


if __name__ == "__main__":
    main()
