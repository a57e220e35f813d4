"""The model types that are read, and what distinguishes their decoders from one another."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelType:
    """What a decoder of this type has that its configuration does not say.

    Args:
        gated: whether the MLP is gated. rms_norm: RMSNorm, else LayerNorm with biases.
        experts: whether layers have experts. norms: norms of the hidden size per layer.
        qk_norm: whether query and key heads are normalized. one_plus: whether a norm multiplies by one plus its weight.
        qkv_bias: a bias of QKV whatever the file says. output_bias: whether `attention_bias` is the output
            projection's, too.
        window: which layers attend to a sliding window: none, all of them, those from `max_window_layers` on, or all
            but every so-manieth.
        unbuilt: what no flag of Megatron-LM's pretrain_gpt.py builds.
    """

    gated: bool = True
    rms_norm: bool = True
    experts: bool = False
    norms: int = 2
    qk_norm: bool = False
    one_plus: bool = False
    qkv_bias: bool = False
    output_bias: bool = True
    window: str = "none"
    window_every: int = 0
    rotary_interleaved: bool = False
    unbuilt: tuple[str, ...] = ()


_SCALED = "embeddings multiplied by the root of the hidden size"
_FOUR = "norms after attention and MLP beside those before (priced as passes over the hidden states)"
_TWO_BASES = "another rotary base in layers with a window"

_QWEN2 = ModelType(qkv_bias=True, output_bias=False, window="from max_window_layers")
_QWEN3 = ModelType(qk_norm=True, window="from max_window_layers")
_QWEN3_MOE = ModelType(experts=True, qk_norm=True)

MODEL_TYPES: dict[str, ModelType] = {
    "llama": ModelType(),
    "mistral": ModelType(window="all"),
    "mixtral": ModelType(experts=True, window="all"),
    "qwen2": _QWEN2,
    "qwen2_vl_text": _QWEN2,
    "qwen2_5_vl_text": _QWEN2,
    "qwen3": _QWEN3,
    "qwen3_vl_text": ModelType(qk_norm=True),
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_vl_moe_text": _QWEN3_MOE,
    "gemma": ModelType(one_plus=True, unbuilt=(_SCALED,)),
    "gemma2": ModelType(norms=4, one_plus=True, window="all but every", window_every=2, unbuilt=(_SCALED, _FOUR)),
    "gemma3_text": ModelType(
        norms=4,
        qk_norm=True,
        one_plus=True,
        window="all but every",
        window_every=6,
        unbuilt=(_SCALED, _FOUR, _TWO_BASES),
    ),
    "phi3": ModelType(window="all"),
    "glm": ModelType(output_bias=False, rotary_interleaved=True),
    "glm4": ModelType(norms=4, output_bias=False, rotary_interleaved=True, unbuilt=(_FOUR,)),
    "starcoder2": ModelType(gated=False, rms_norm=False, window="all"),
    "granite": ModelType(),
    "granitemoe": ModelType(experts=True),
    "seed_oss": ModelType(output_bias=False),
}
"""By `model_type`, of decoders: what multimodal models nest as `text_config`."""

FLAT = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "gemma3": "gemma3_text", "mistral3": "mistral", "llava": "llama"}
"""Multimodal types whose older files keep the decoder's fields at the top, and the type of that decoder."""

NOT_PLANNED = {
    "llama4": "attention in chunks, layers without rotary embedding and an expert shared by all tokens",
    "llama4_text": "attention in chunks, layers without rotary embedding and an expert shared by all tokens",
    "qwen2_moe": "an expert shared by all tokens (shared_expert_intermediate_size)",
    "qwen3_next": "linear attention (layer_types)",
    "qwen3_5_text": "linear attention (layer_types)",
    "gpt_oss": "attention sinks and biases of experts",
    "deepseek_v2": "multi-latent attention (kv_lora_rank)",
    "deepseek_v3": "multi-latent attention (kv_lora_rank)",
    "kimi_k2": "multi-latent attention (kv_lora_rank)",
    "glm4_moe": "an expert shared by all tokens (n_shared_experts) and dense layers before the experts",
    "falcon": "attention and MLP beside each other instead of one after the other (parallel_attn)",
    "cohere": "attention and MLP beside each other instead of one after the other",
    "cohere2": "attention and MLP beside each other instead of one after the other",
    "gpt_neox": "attention and MLP beside each other instead of one after the other (use_parallel_residual)",
    "phi": "attention and MLP beside each other instead of one after the other",
    "olmo2": "norms only after attention and MLP, and one over all heads of queries or keys together",
    "olmo3": "norms only after attention and MLP, and one over all heads of queries or keys together",
    "olmoe": "one norm over all heads of queries or keys together",
    "gemma3n_text": "embeddings per layer",
    "gemma4_text": "embeddings per layer and head dimensions that differ between layers",
    "mllama_text_model": "cross-attention (cross_attention_layers)",
    "mamba": "state-space layers",
    "mamba2": "state-space layers",
    "jamba": "state-space layers",
    "bamba": "state-space layers",
    "nemotron_h": "state-space layers",
}
"""Types that are refused by the part that is not planned."""
