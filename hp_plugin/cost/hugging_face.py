"""A Hugging Face `config.json` as a model's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MARK = "num_hidden_layers"
"""The key by which such a file is known."""

_NOT_PLANNED = {
    "kv_lora_rank": "multi-latent attention and its heads",
    "shared_expert_intermediate_size": "shared experts",
    "n_shared_experts": "shared experts",
    "mlp_only_layers": "dense layers chosen one by one",
}


def shape_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelShape` that a decoder's `config.json` says, under the names that Transformers gives them.

    Raises:
        ValueError: a part that is not planned (multi-latent attention, shared experts), or a size that is missing.
    """
    for key, what in _NOT_PLANNED.items():
        if config.get(key):
            raise ValueError(f"{what} ({key}) are not planned")
    for key in ("hidden_size", "num_attention_heads", "intermediate_size"):
        if key not in config:
            raise ValueError(f"a config.json with {MARK} but without {key} is no decoder that is planned")
    heads, experts = config["num_attention_heads"], config.get("num_local_experts") or config.get("num_experts") or 0
    activation = config.get("hidden_act") or config.get("hidden_activation") or "silu"
    gated = activation in ("silu", "swiglu", "gelu_pytorch_tanh")
    found: dict[str, Any] = {
        "layers": config[MARK],
        "D": config["hidden_size"],
        "h": heads,
        "g": config.get("num_key_value_heads") or heads,
        "ffn": (config.get("moe_intermediate_size") if experts else None) or config["intermediate_size"],
        "vocab": config.get("vocab_size", 0),
        "gated": gated,
        "tied": bool(config.get("tie_word_embeddings", False)),
        "norm_biases": "rms_norm_eps" not in config,
        "rotary": "rope_theta" in config or "rope_parameters" in config,
    }
    if config.get("head_dim"):
        found["d"] = config["head_dim"]
    if experts:
        found |= {"experts": experts, "top_k": config.get("num_experts_per_tok") or 1}
        found["moe_every"] = config.get("decoder_sparse_step") or 1
    return found
