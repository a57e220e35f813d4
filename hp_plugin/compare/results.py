"""What a comparison found: report.json with every raw sample, and what is made of it."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hp_plugin import __version__
from hp_plugin.compare.entries.entrant import Entrant
from hp_plugin.compare.entries.suites import context_of
from hp_plugin.compare.ranks.together import cpu_cores
from hp_plugin.compare.report.closed_form import closed_form_bytes
from hp_plugin.compare.report.markdown import markdown_report
from hp_plugin.compare.report.planner_columns import predicted_rates
from hp_plugin.planner.machine.hardware import Hardware
from hp_plugin.planner.machine.json_file import package_json

if TYPE_CHECKING:
    from hp_plugin.compare.job import Job
    from hp_plugin.compare.ranks.timing import Sample

SCHEMA = 2
"""Version of report.json, described in docs/compare.md."""

Report = dict[str, Any]


class Results:
    """Losses and samples of one comparison as they come in."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.losses: dict[str, list[float]] = {}
        self.twin_losses: dict[str, list[float]] = {}
        self.hardware: Hardware | None = None
        names = [entrant.name for entrant in job.entrants]
        self.samples: dict[str, dict[str, list[Sample]]] = {mode: {name: [] for name in names} for mode in job.modes}

    def report(self, complete: bool) -> Report:
        """The whole of it, as report.json has it."""
        job = self.job
        config = job.entrants[0].config
        return {
            "schema": SCHEMA,
            "complete": complete,
            "model": job.model,
            "scale": job.scale,
            "options": _given_options(config),
            "modes": {
                mode: {
                    entrant.name: self._summary(entrant, mode)
                    for entrant in job.entrants
                    if self.samples[mode][entrant.name]
                }
                for mode in job.modes
            },
            "not_possible": job.impossible,
            "reported": _reported(job.model),
            "machine": _machine(job.entrants[0].layout.world),
            "versions": _versions(),
        }

    def _summary(self, entrant: Entrant, mode: str) -> dict[str, Any]:
        config, samples = entrant.config, self.samples[mode][entrant.name]
        assert config.global_batch_size is not None
        context = context_of(mode)
        # A decode step is one position of every sequence.
        positions = config.seq_length if context is None else 1
        tokens, per_position = config.global_batch_size * positions, 1e3 / positions
        keys = sorted({key for sample in samples for key in sample["comm_s"]})
        return {
            "exact": entrant.exact,
            "losses": self.losses[entrant.name],
            "twin_losses": self.twin_losses.get(entrant.name),
            "step_s": spread(samples, lambda sample: sample["step_s"]),
            "tokens_per_s": spread(samples, lambda sample: tokens / sample["step_s"]),
            "tpot_ms": spread(samples, lambda sample: per_position * sum(sample["comm_s"].values())),
            "tpot_ms_by_group": {
                key: statistics.median(per_position * sample["comm_s"].get(key, 0.0) for sample in samples)
                for key in keys
            },
            "pipeline_wait_share": spread(samples, lambda sample: sample["pipeline_wait_s"] / sample["step_s"]),
            "sent_bytes_per_token": {key: size / tokens for key, size in samples[-1]["sent_bytes"].items()},
            "closed_form_bytes_per_token": {
                "/".join(key): size / tokens for key, size in sorted(closed_form_bytes(entrant, mode).items())
            },
            "context": context,
            "cache_bytes": samples[-1].get("cache_bytes"),
            "predicted": None if self.hardware is None else predicted_rates(entrant, mode, self.hardware),
            "peak_bytes": max((s["peak_bytes"] for s in samples if s["peak_bytes"] is not None), default=None),
            "samples": samples,
        }


def spread(samples: list[Sample], value: Callable[[Sample], float]) -> dict[str, float]:
    """Median, smallest and largest over all samples."""
    values = [value(sample) for sample in samples]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def write_report(results: Results, complete: bool) -> None:
    """Writes report.json and report.md into the job's directory, each of them whole or not at all."""
    report = results.report(complete)
    for name, text in (("report.json", json.dumps(report, indent=1)), ("report.md", markdown_report(report))):
        path = Path(results.job.out, name)
        path.with_suffix(".new").write_text(text + "\n", encoding="utf-8")
        path.with_suffix(".new").replace(path)


def _given_options(config: Any) -> dict[str, Any]:
    """What of the trainer's options makes the model, its batch and its precision."""
    names = (
        "num_layers", "hidden_size", "num_attention_heads", "query_groups", "kv_channels", "ffn_hidden_size",
        "seq_length", "global_batch_size", "padded_vocab_size", "position_embedding_type", "normalization", "swiglu",
        "num_experts", "moe_router_topk", "moe_expert_capacity_factor", "fp16", "bf16",
        "attention_backend",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names}


def _reported(model: str) -> dict[str, Any] | None:
    """What the source experiments report for a model of theirs."""
    rows = package_json("reports/data/published.json")["source_experiments"]["rows"]
    mine = [row for row in rows if model in (f"paper-{row[0]}", f"paper-{row[0]}-full")]
    if not mine:
        return None
    return {row[1]: {"tokens_per_s": row[2], "tpot_ms": row[3]} for row in mine}


def _machine(ranks: int) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "ranks": ranks,
        "cpus": cpu_cores(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpus": torch.cuda.device_count() if cuda else 0,
        "system": platform.platform(),
    }


def _versions() -> dict[str, str | None]:
    def of(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    others = {name: of(name) for name in ("megatron-core", "deepspeed", "transformer-engine")}
    return {"hp-plugin": __version__, "torch": torch.__version__, "python": platform.python_version(), **others}
