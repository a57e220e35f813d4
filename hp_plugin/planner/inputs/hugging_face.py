"""A Hugging Face `config.json` as a model's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MARK = "model_type"
"""The key by which such a file is known."""

TIED = {
    "llama": False, "mistral": False, "mixtral": False, "qwen2": False, "qwen3": False, "qwen3_moe": False,
    "gemma": True, "gemma2": True, "gemma3_text": True,
}  # fmt: skip
"""Decoders with gated MLPs, RMSNorm and rotary embedding that are read, by `model_type`, and whether their embeddings
are tied where the file does not say (the defaults of Transformers' configuration classes)."""

_REFUSED = {
    "kv_lora_rank": "multi-latent attention",
    "shared_expert_intermediate_size": "an expert shared by all tokens",
    "n_shared_experts": "an expert shared by all tokens",
    "mlp_only_layers": "dense layers chosen one by one",
}


def shape_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelShape` that a decoder's `config.json` says; of a multimodal model, its text decoder's.

    Raises:
        ValueError: a model type or part that this planner does not support, or a size that is missing.
    """
    config = config.get("text_config") or config
    kind = config.get(MARK)
    if kind not in TIED:
        raise ValueError(f"model_type {kind!r} is not supported; supported are {', '.join(TIED)}")
    for key, what in _REFUSED.items():
        if config.get(key):
            raise ValueError(f"{what} ({key}) is not supported")
    for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"):
        if key not in config:
            raise ValueError(f"{key} is missing")
    heads, experts = config["num_attention_heads"], config.get("num_local_experts") or config.get("num_experts") or 0
    if config.get("decoder_sparse_step", 1) != 1:
        raise ValueError(
            f"experts in every {config['decoder_sparse_step']}th layer (decoder_sparse_step) are not supported"
        )
    found: dict[str, Any] = {
        "layers": config["num_hidden_layers"],
        "D": config["hidden_size"],
        "h": heads,
        "g": config.get("num_key_value_heads") or heads,
        "ffn": (config.get("moe_intermediate_size") if experts else None) or config["intermediate_size"],
        "vocab": config.get("vocab_size", 0),
        "gated": True,
        "tied": bool(config.get("tie_word_embeddings", TIED[kind])),
        "norm_biases": False,
        "qkv_bias": kind == "qwen2" or bool(config.get("attention_bias", False)),
        "qk_norm": kind in ("qwen3", "qwen3_moe", "gemma3_text"),
    }
    if config.get("head_dim"):
        found["d"] = config["head_dim"]
    if experts:
        found |= {"experts": experts, "top_k": config.get("num_experts_per_tok") or 1}
    return found
