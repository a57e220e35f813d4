"""What `hp-plugin compare` writes: report.json with every raw sample, and report.md with medians and ratios."""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hp_plugin import __version__
from hp_plugin.exchange_rules import RULES, resolve
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.transformer import build_transformer_config
from hp_plugin.transformer_config import attention_shape

if TYPE_CHECKING:
    from hp_plugin.bench.ranks import Job

SCHEMA = 1


def write_report(
    job: Job, losses: dict[str, list[float]], samples: dict[str, list[dict[str, Any]]], complete: bool
) -> None:
    """Writes report.json and report.md into `job.out`, whole or not at all."""
    report = {
        "schema": SCHEMA,
        "complete": complete,
        "model": job.model,
        "mode": job.mode,
        "versions": {"hp_plugin": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "gpu": torch.cuda.is_available()},
        "layouts": {
            name: _summary(config, job.mode, losses[name], samples[name]) for name, config in job.layouts.items()
        },
    }
    for name, text in (("report.json", json.dumps(report, indent=1)), ("report.md", markdown(report))):
        path = Path(job.out, name)
        path.with_suffix(".new").write_text(text + "\n", encoding="utf-8")
        path.with_suffix(".new").replace(path)


def _summary(config: TrainingConfig, mode: str, losses: list[float], samples: list[dict[str, Any]]) -> dict[str, Any]:
    assert config.global_batch_size is not None
    tokens = config.global_batch_size * config.seq_length
    rates = [tokens / sample["step_s"] for sample in samples]
    tpot = [1e3 * sum(sample["comm_s"].values()) / config.seq_length for sample in samples]
    keys = sorted({key for sample in samples for key in sample["comm_s"]})
    return {
        "losses": losses,
        "tokens_per_s": spread(rates),
        "tpot_ms": spread(tpot),
        "tpot_ms_by_group": {
            key: statistics.median(1e3 * sample["comm_s"].get(key, 0.0) / config.seq_length for sample in samples)
            for key in keys
        },
        "sent_bytes_per_token": {key: size / tokens for key, size in samples[-1]["sent_bytes"].items()},
        "dim_bytes_per_token_closed_form": exchange_bytes(config, mode) / tokens,
        "peak_bytes": max(sample["peak_bytes"] for sample in samples),
        "samples": samples,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def exchange_bytes(config: TrainingConfig, mode: str) -> float:
    """Bytes that one rank sends over its dim group in one step, by the exchange's rule, averaged over ranks."""
    grid = config.head_dim
    if grid is None or grid.n == 1:
        return 0.0
    transformer = build_transformer_config(config)
    rotary = int(transformer.kv_channels * config.rotary_percent) if config.position_embedding_type == "rope" else 0
    shape = attention_shape(transformer, grid, config.micro_batch_size, config.seq_length, rotary=rotary)
    rule = RULES[resolve(grid.exchange, shape)]
    itemsize = transformer.params_dtype.itemsize
    moved = rule.bytes(shape, itemsize)
    if mode == "train":
        moved += rule.elements_backward(shape) * itemsize
    assert config.global_batch_size is not None
    # Every rank of every stage runs num_layers/pp layers; data parallelism divides the micro-batches.
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else config.model_parallel
    return float(moved) * config.num_layers // config.pipeline_model_parallel_size * config.micro_batches(world)


def markdown(report: dict[str, Any]) -> str:
    """The report as a table; ratios are to the first layout."""
    layouts = report["layouts"]
    base = next(iter(layouts.values()))
    lines = [
        f"# {report['model']}, {report['mode']}" + ("" if report["complete"] else " (partial: the run did not end)"),
        "",
        "| layout | tokens/s (min–max) | ratio | TPOT ms | ratio | sent bytes/token |",  # noqa: RUF001
        "|---|---|---|---|---|---|",
    ]
    for name, one in layouts.items():
        rate, tpot = one["tokens_per_s"], one["tpot_ms"]["median"]
        waited = base["tpot_ms"]["median"]
        lines.append(
            f"| {name} | {rate['median']:.0f} ({rate['min']:.0f}–{rate['max']:.0f}) "  # noqa: RUF001
            f"| {rate['median'] / base['tokens_per_s']['median']:.3f} | {tpot:.4f} "
            f"| {f'{tpot / waited:.3f}' if waited else '-'} | {sum(one['sent_bytes_per_token'].values()):.1f} |"
        )
    cpus = report["machine"]["cpus"]
    lines += ["", f"Measured on {'GPUs' if report['machine']['gpu'] else f'{cpus} CPU cores with gloo'}."]
    return "\n".join(lines)
