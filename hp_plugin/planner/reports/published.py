"""Published end-to-end measurements as models, layouts and workloads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log2
from typing import Any

from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.models import load_model
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import Hardware, load_hardware
from hp_plugin.planner.machine.json_file import package_json


@dataclass(frozen=True)
class Row:
    """One published run.

    Args:
        layouts: the layout, or all that the publication leaves open.
        measured: tokens per second and GPU.
        kernels: attention kernel of the run, if it is not the machine's first.
        own: the machine of the run, if it is not the one that predictions are made for.
    """

    group: str
    name: str
    model: ModelShape
    layouts: tuple[Layout, ...]
    workload: Workload
    measured: float
    kernels: tuple[str, ...] | None = None
    own: Hardware | None = None

    @property
    def gpus(self) -> int:
        """GPUs of the run."""
        return self.layouts[0].world

    def machine(self, hardware: Hardware) -> Hardware:
        """The run's machine with its attention kernel."""
        hardware = self.own or hardware
        return replace(hardware, kernels=self.kernels) if self.kernels else hardware


MEGATRON = "Megatron-LM weak scaling"
FOUNDRY = "llm-foundry FSDP"
GPT_FAST = "gpt-fast decode"
BRIDGE = "Megatron-Bridge"

_GPT_OSS = ModelShape(
    "gpt-oss-120b", 36, 2880, 64, 8, 64, 2880, 201_088, gated=True, biases=True, norm_biases=False, experts=128,
    top_k=4, window=128, window_every=2,
)  # fmt: skip
"""openai/gpt-oss-120b `config.json`, its attention sinks left out."""

_LLAMA_SHAPES = {
    # name: (layers, D, heads, key/value heads, ffn, vocabulary), from the same repository's model.py
    "llama2-7b": (32, 4096, 32, 32, 11008, 32000),
    "llama2-70b": (80, 8192, 64, 8, 28672, 32000),
    "llama3.1-8b": (32, 4096, 32, 8, 14336, 128256),
    "llama3.1-70b": (80, 8192, 64, 8, 28672, 128256),
}

_FOUNDRY_SHAPES = {
    # name: (layers, D, heads), from scripts/train/yamls/pretrain/mpt-*.yaml of the same repository
    "760m": (24, 1536, 12),
    "1b": (24, 2048, 16),
    "3b": (32, 2560, 20),
    "7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
    "70b": (80, 8192, 64),
}


def megatron_rows() -> list[Row]:
    """Weak-scaling rows; micro-batch size and virtual stages are not stated, so every choice of them is listed."""
    rows = []
    for params, heads, hidden, layers, tp, pp, dp, gpus, batch, tflops, _ in _table("megatron_weak_scaling"):
        model = ModelShape(f"{params} B", layers, hidden, heads, heads, hidden // heads, 4 * hidden, 131072)
        layouts = tuple(
            Layout(tp, pp=pp, vpp=vpp, dp=dp, sp=tp > 1, tp_overlap=tp > 1, micro_batch=micro_batch)
            for vpp in range(1, layers // pp + 1)
            if layers % (pp * vpp) == 0 and (pp > 1 or vpp == 1)
            for micro_batch in (1, 2, 4)
        )
        workload = Workload("train", 4096, batch)
        # The publication counts operations: tokens/s follow from its formula.
        per_token = 3 * model.matmul_operations(1, workload.seq)
        rows.append(Row(MEGATRON, f"{params} B", model, layouts, workload, tflops * 1e12 / per_token))
        assert layouts[0].world == gpus, "the table's sizes multiply to its GPUs"
    return rows


def foundry_rows() -> list[Row]:
    """FSDP rows; attention was the Triton FlashAttention of the time (`--attn_impl triton`, the script's default)."""
    rows = []
    for name, seq, gpus, _, _, micro_batch, _, batch, measured, _, checkpointing in _table("llm_foundry"):
        layers, hidden, heads = _FOUNDRY_SHAPES[name]
        model = ModelShape(
            name,
            layers,
            hidden,
            heads,
            heads,
            hidden // heads,
            4 * hidden,
            50368,
            tied=True,
            biases=True,
            learned_positions=seq,
            rotary=False,
        )
        recompute = "full" if checkpointing == "True" else "none"
        layout = Layout(dp=gpus, zero="full", recompute=recompute, micro_batch=micro_batch, fused=False)
        label = f"{name}, {gpus} GPUs, sequence {seq}"
        rows.append(
            Row(FOUNDRY, label, model, (layout,), Workload("train", seq, batch), measured, ("cudnn", "triton-fa1"))
        )
    return rows


def decode_rows() -> list[Row]:
    """Generation for a single sequence under tensor parallelism, on the A100s that the publication describes."""
    source = "pytorch-labs/gpt-fast@32971d3 README.md: power limited to 330 W, peak about 1700 GB/s"
    machine = load_hardware("a100-ib").with_parameter("hbm_bytes_per_s", 1.7e12, "measured", source)
    rows = []
    for name, gpus, measured in _table("gpt_fast"):
        layers, hidden, heads, groups, ffn, vocab = _LLAMA_SHAPES[name]
        model = ModelShape(
            name, layers, hidden, heads, groups, hidden // heads, ffn, vocab, gated=True, norm_biases=False
        )  # fmt: skip
        workload = Workload("decode", 105, 1)
        rows.append(
            Row(GPT_FAST, f"{name}, {gpus} A100", model, (Layout(gpus),), workload, measured / gpus, own=machine)
        )
    return rows


def bridge_rows() -> list[Row]:
    """Mixtures on H100 and GB200, layouts as published; stages of unequal length are planned without virtual ones."""
    rows = []
    for name, container, machine, gpus, batch, micro, seq, tp, pp, vpp, ep, measured in _table("megatron_bridge"):
        model = _GPT_OSS if name == _GPT_OSS.name else load_model(name)
        even = vpp if model.layers % (pp * vpp) == 0 else 1
        layout = Layout(tp, pp=pp, vpp=even, dp=gpus // (tp * pp), ep=ep, micro_batch=micro)
        label = f"{name}, {container}, {machine}"
        workload = Workload("train", seq, batch)
        own = load_hardware(machine)
        if gpus > own.domain and gpus % own.domain:
            # Groups that do not straddle racks: powers of two of each.
            of_each = float(2 ** int(log2(own.domain)))
            own = own.with_parameter("domain", of_each, "assumed", f"{gpus} GPUs, as many of each domain")
        rows.append(Row(BRIDGE, label, model, (layout,), workload, measured, own=own))
    return rows


def _table(name: str) -> list[list[Any]]:
    rows: list[list[Any]] = package_json("reports/data/published.json")[name]["rows"]
    return rows
