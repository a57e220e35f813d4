"""Models that `hp-plugin compare` knows by name: shapes of the source experiments and of public models, scaled."""

from __future__ import annotations

from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hp_plugin.planner.machine.json_file import read_object
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.options import check_names, settled_value, shown

Options = dict[str, Any]
"""Options of the reference trainer (`TrainingConfig`), under its names."""


@dataclass(frozen=True)
class CatalogueModel:
    """A model to compare layouts of.

    Args:
        options: the trainer's options that make it.
        batch: sequences per global step. micro_batch: of every layout that does not say `mbs` itself.
        scale: what was divided by what, against the model it stands for.
    """

    description: str
    options: Options
    batch: int
    micro_batch: int
    scale: str = "full size"


# The source experiments: 4 layers, 16 heads of 512, MLP 32768; fp16, batch 1024; the sequence length is not stated.
_SOURCE: Options = {
    "num_layers": 4,
    "num_attention_heads": 16,
    "hidden_size": 8192,
    "kv_channels": 512,
    "ffn_hidden_size": 32768,
    "seq_length": 2048,
    "fp16": True,
    "initial_loss_scale": 1024.0,
    "disable_bias_linear": True,
}
_SMALL: Options = _SOURCE | {
    "hidden_size": 256,
    "kv_channels": 16,
    "ffn_hidden_size": 1024,
    "seq_length": 512,
    "fp16": False,
}
_EXPERTS: Options = {
    "num_experts": 8,
    "moe_router_topk": 1,
    "moe_router_pre_softmax": True,
    "moe_expert_capacity_factor": 1.0,
}
# Width is scaled, tokens of a micro-batch are not: what a product computes over what its all-reduce sends goes as D, so
# that waiting would drown everything if a micro-batch were small, too. 16 · 512 = 8,192 tokens.
_SCALE = "width, head and MLP ÷ 32; batch 1024 ÷ 32; sequence of 512; fp32"
_ROTARY: Options = {"position_embedding_type": "rope", "normalization": "RMSNorm", "disable_bias_linear": True}
_GATED: Options = _ROTARY | {
    "swiglu": True,
    "num_layers": 2,
    "seq_length": 256,
    "untie_embeddings_and_output_weights": True,
}

MODELS: dict[str, CatalogueModel] = {
    "paper-dense": CatalogueModel("the source's dense model, scaled down", _SMALL, 32, 16, _SCALE),
    "paper-moe": CatalogueModel("the source's MoE model, scaled down", _SMALL | _EXPERTS, 32, 16, _SCALE),
    "paper-dense-full": CatalogueModel("the source's dense model, for 16 large GPUs", _SOURCE, 1024, 16),
    "paper-moe-full": CatalogueModel("the source's MoE model, for 16 large GPUs", _SOURCE | _EXPERTS, 1024, 16),
    "llama3-like": CatalogueModel(
        "Llama 3 8B's shape: 32 heads, 8 key/value heads",
        _GATED | {"hidden_size": 512, "num_attention_heads": 32, "num_query_groups": 8, "ffn_hidden_size": 1792},
        16,
        8,
        "width and MLP ÷ 8, head 128 ÷ 8, 2 of 32 layers",
    ),
    "qwen2.5-like": CatalogueModel(
        "Qwen2.5 3B's shape: 16 heads, 2 key/value heads",
        _GATED
        | {"hidden_size": 512, "num_attention_heads": 16, "num_query_groups": 2, "ffn_hidden_size": 2752}
        | {"add_qkv_bias": True},
        16,
        8,
        "width, head 128 and MLP ÷ 4, 2 of 36 layers",
    ),
    "qwen3-like": CatalogueModel(
        "Qwen3 30B-A3B's attention: 32 heads together twice as wide as the model, 4 key/value heads",
        _GATED
        | {"hidden_size": 512, "num_attention_heads": 32, "num_query_groups": 4, "kv_channels": 32}
        | {"ffn_hidden_size": 1536, "qk_layernorm": True},
        16,
        8,
        "width and head 128 ÷ 4, one MLP as wide as the 8 active experts ÷ 4, 2 of 48 layers",
    ),
    "mqa": CatalogueModel(
        "multi-query attention, as in Falcon 7B and StarCoder: one key/value head",
        _ROTARY | {"num_layers": 2, "hidden_size": 512, "num_attention_heads": 16, "num_query_groups": 1}
        | {"seq_length": 256},
        16,
        8,
        "16 heads of 32, 2 layers",
    ),
    "few-heads": CatalogueModel(
        "4 wide heads: fewer than ranks, where stock cannot split further",
        _ROTARY | {"num_layers": 2, "hidden_size": 512, "num_attention_heads": 4, "seq_length": 256},
        16,
        8,
        "4 heads of 128, 2 layers",
    ),
    "tiny": CatalogueModel(
        "for trying things out", {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "seq_length": 32}, 8, 4
    ),
    "tiny-gqa": CatalogueModel(
        "the same with 2 key/value heads",
        {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 2, "seq_length": 32},
        8,
        4,
    ),
}  # fmt: skip

_OF_EVERY_RUN: Options = {"lr": 1e-3, "train_iters": 1, "micro_batch_size": 1}
"""Options that the trainer requires and a comparison sets itself."""

_OF_THE_LAYOUT = {
    "micro_batch_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "use_distributed_optimizer",
    "head_dim_parallel",
    "head_dim_exchange",
    "head_dim_order",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "moe_backend",
}


def catalogue_model(name: str) -> CatalogueModel:
    """A model of the catalogue, or one from a JSON file of the trainer's options (`global_batch_size` among them).

    Raises:
        ValueError: no such name, no JSON, an option that the trainer lacks, that belongs to the layout, or with a value
            that the trainer does not take.
    """
    if name in MODELS:
        return MODELS[name]
    if not name.endswith(".json"):
        near = get_close_matches(name, MODELS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"--model {name}: {hint}choose from {', '.join(MODELS)}, or name a .json file")
    found = read_object(Path(name), "--model")
    family = found.get("model_type") or found.get("architectures")
    if family:
        raise ValueError(
            f"--model {name} is a Hugging Face configuration ({shown(family)}): `hp-plugin plan --model` reads those; "
            "compare takes options of the trainer: num_layers, hidden_size, num_attention_heads, seq_length, …"
        )
    known = {field.name: field for field in fields(TrainingConfig)}
    for key in found:
        if key in _OF_THE_LAYOUT:
            raise ValueError(f"--model {name}: {key} is the layout's to say: give it with --layouts")
    try:
        check_names(TrainingConfig, _OF_EVERY_RUN | found)
        found = {key: settled_value(known[key], value) for key, value in found.items()}
    except ValueError as wrong:
        raise ValueError(f"--model {name}: {wrong}") from None
    batch = found.pop("global_batch_size", None) or 8
    return CatalogueModel(name, found, batch, 1, "as given")
