"""A Hugging Face `config.json` as the fields of `ModelShape`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hp_plugin.planner.inputs.hugging_face.defaults import OTHER_NAMES, type_defaults
from hp_plugin.planner.inputs.hugging_face.model_types import FLAT, MODEL_TYPES, NOT_PLANNED, ModelType
from hp_plugin.planner.inputs.hugging_face.rotary import rotary_fields
from hp_plugin.planner.inputs.hugging_face.windows import window_fields
from hp_plugin.refusal import shown

MAX_LAYERS = 10_000
"""Layers beyond which a model is taken for a typing error."""
MARK = "model_type"
"""The key by which such a file is known."""

_NESTED = ("text_config", "llm_config", "language_config")
"""Where multimodal configurations keep their decoder's."""

_REFUSED = {
    "kv_lora_rank": "multi-latent attention",
    "shared_expert_intermediate_size": "an expert shared by all tokens",
    "n_shared_experts": "an expert shared by all tokens",
    "mlp_only_layers": "dense layers chosen one by one",
    "first_k_dense_replace": "dense layers before the experts",
    "attn_logit_softcapping": "a cap on attention scores",
    "final_logit_softcapping": "a cap on logits",
    "attention_chunk_size": "attention in chunks",
    "cross_attention_layers": "cross-attention",
    "num_kv_shared_layers": "key/value heads shared between layers",
    "no_rope_layers": "layers without rotary embedding",
    "per_layer_config": "layers that differ",
}
"""Parts that are not planned, by the field that asks for them; null or absent asks for nothing."""

_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu", "quick_gelu": "quick_gelu", "relu2": "squared_relu",
}  # fmt: skip
"""Megatron-Core's fused bias and GELU is the tanh approximation, so both are one here."""

_SIZES = ("num_hidden_layers", "hidden_size")
"""What a file of its own always says; a nested one may leave everything to its type."""


def shape_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelShape` that a decoder's `config.json` says; of a multimodal model, its text decoder's.

    Raises:
        ValueError: a model type or part that this planner does not support, a size that is missing, or a value of a
            wrong type.
    """
    decoder, kind = _decoder(config)
    if kind in NOT_PLANNED:
        raise ValueError(f"model_type {shown(kind)} needs {NOT_PLANNED[kind]}: not planned")
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type {shown(kind)} is not supported; supported are {', '.join(MODEL_TYPES)}")
    said = {OTHER_NAMES.get(key, key): value for key, value in decoder.items()}
    if decoder is config:
        for key in _SIZES:
            if key not in said:
                raise ValueError(f"{key} is missing")
    known = type_defaults(kind)
    for key, what in _REFUSED.items():
        if said[key] if key in said else known.get(key):
            raise ValueError(f"{what} ({key}) is not supported")
    every = said.get("decoder_sparse_step", 1)
    if every != 1:
        raise ValueError(f"experts in every so-manieth layer (decoder_sparse_step {shown(every)}) are not supported")
    if "tie_word_embeddings" in config:
        said["tie_word_embeddings"] = config["tie_word_embeddings"]
    return _fields(MODEL_TYPES[kind], _Values(kind, said, known))


def _decoder(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The decoder's own configuration and its model type."""
    for key in _NESTED:
        if isinstance(config.get(key), Mapping) and config[key]:
            kind = config[key].get(MARK) or FLAT.get(str(config.get(MARK)))
            return config[key], str(kind)
    kind = str(config.get(MARK))
    return config, FLAT.get(kind, kind)


class _Values:
    """What a file says, else its type's default, with the type of value that a field takes."""

    def __init__(self, kind: str, said: Mapping[str, Any], known: Mapping[str, Any]) -> None:
        self.kind, self.said, self.known = kind, said, known

    def get(self, name: str) -> Any:
        """The file's value (null says that there is none), else the default; None where it follows from others."""
        return self.said[name] if name in self.said else self.known.get(name)

    def size(self, name: str) -> int:
        """An integer that must be there.

        Raises:
            ValueError: neither the file nor the model type says it, or it is no integer.
        """
        value = self.get(name)
        if value is None:
            raise ValueError(f"{name} is missing, and model_type {shown(self.kind)} has no default for it")
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} takes an integer, got {shown(value)}")
        return value

    def switch(self, name: str) -> bool:
        """True or false; false where nothing says it.

        Raises:
            ValueError: it is neither.
        """
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{name} takes true or false, got {shown(value)}")
        return bool(value)

    def number(self, name: str) -> float | None:
        """A finite number, or None where nothing says it.

        Raises:
            ValueError: it is none.
        """
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e30:
            raise ValueError(f"{name} takes a number, got {shown(value)}")
        return float(value)

    def words(self, name: str) -> str | None:
        """A word, or None where nothing says it.

        Raises:
            ValueError: it is none.
        """
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} takes a word, got {shown(value)}")
        return value


def _fields(kind: ModelType, values: _Values) -> dict[str, Any]:
    heads, hidden = values.size("num_attention_heads"), values.size("hidden_size")
    experts = values.size("num_local_experts") if kind.experts else 0
    qkv_bias = kind.qkv_bias or values.switch("attention_bias")
    output_bias = values.switch("attention_bias" if kind.output_bias else "attention_out_bias")
    mlp_bias = values.switch("mlp_bias")
    biases = values.switch("use_bias") or (qkv_bias and output_bias and mlp_bias)
    activation = _activation(kind, values)
    layers = values.size("num_hidden_layers")
    if not 0 < layers <= MAX_LAYERS:
        raise ValueError(f"num_hidden_layers takes 1 to {MAX_LAYERS:,}, got {shown(layers)}")
    found: dict[str, Any] = {
        "layers": layers,
        "D": hidden,
        "h": heads,
        "g": heads if values.get("num_key_value_heads") is None else values.size("num_key_value_heads"),
        "ffn": values.size("moe_intermediate_size" if experts and _sized(values) else "intermediate_size"),
        "vocab": values.size("vocab_size"),
        "gated": kind.gated,
        "activation": activation,
        "tied": values.switch("tie_word_embeddings"),
        "biases": biases,
        "norm_biases": not kind.rms_norm,
        "norms": kind.norms,
        "norm_one_plus": kind.one_plus,
        "norm_epsilon": values.number("rms_norm_eps") or values.number("norm_epsilon") or 1e-5,
        "qkv_bias": qkv_bias and not biases,
        "proj_bias": output_bias and not biases,
        "mlp_bias": mlp_bias and not biases,
        "qk_norm": kind.qk_norm,
        "rotary_interleaved": kind.rotary_interleaved,
        **window_fields(kind, values.get, layers),
    }
    rotary, unbuilt = rotary_fields(values.get)
    found |= rotary
    if values.get("head_dim") is not None:
        found["d"] = values.size("head_dim")
    if experts:
        found |= {"experts": experts, "top_k": values.size("num_experts_per_tok")}
    found["unbuilt"] = (*kind.unbuilt, *unbuilt, *_scales(values, found))
    return found


def _activation(kind: ModelType, values: _Values) -> str:
    """The activation, or nothing where it is what `gated` stands for."""
    said = values.words("hidden_activation") or values.words("hidden_act") or "silu"
    if said not in _ACTIVATIONS:
        raise ValueError(f"activation {shown(said)} (hidden_act) is not supported")
    found = _ACTIVATIONS[said]
    return "" if found == ("silu" if kind.gated else "gelu") else found


def _sized(values: _Values) -> bool:
    """Whether experts have a width of their own."""
    return values.get("moe_intermediate_size") is not None


def _scales(values: _Values, found: Mapping[str, Any]) -> list[str]:
    """Factors other than a GPT's."""
    said = []
    width = found.get("d", found["D"] // max(1, found["h"]))
    scalar = values.number("query_pre_attn_scalar")
    if scalar is not None and scalar != width:
        said.append(f"attention scores scaled by 1/√{scalar:g} instead of 1/√{width} (query_pre_attn_scalar)")
    attention = values.number("attention_multiplier")
    if attention is not None and abs(attention * width**0.5 - 1) > 1e-6:
        said.append(f"attention scores multiplied by {attention:g} (attention_multiplier)")
    for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
        factor = values.number(name)
        if factor not in (None, 1.0):
            said.append(f"{name} {factor:g}")
    return said
