"""What a model type takes where its `config.json` says nothing: the defaults of transformers' configuration classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from hp_plugin.planner.machine.json_file import package_json

TABLE = "inputs/data/hugging_face_defaults.json"

FIELDS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size", "tie_word_embeddings", "hidden_act", "hidden_activation", "attention_bias", "attention_out_bias",
    "mlp_bias", "use_bias", "rms_norm_eps", "norm_epsilon", "max_position_embeddings", "rope_theta",
    "partial_rotary_factor", "sliding_window", "use_sliding_window", "max_window_layers", "_sliding_window_pattern",
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "num_local_experts",
    "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step", "embedding_multiplier", "logits_scaling",
    "residual_multiplier", "attention_multiplier",
)  # fmt: skip
"""Fields of configurations that are read, where a class has them."""

OTHER_NAMES = {"num_experts": "num_local_experts"}
"""Names that some types, or releases of transformers, have for one of `FIELDS`."""


_ABSENT = object()


def type_defaults(kind: str) -> Mapping[str, Any]:
    """The defaults of a model type: of the installed transformers, else of the table (`tools/` writes it).

    None stands for a size that follows from others, as in the classes.
    """
    return _installed(kind) or package_json(TABLE)["types"].get(kind, {})


@cache
def _installed(kind: str) -> Mapping[str, Any] | None:
    try:
        return read_classes([kind]).get(kind)
    except (ImportError, AttributeError, RuntimeError):
        # A transformers that does not import, or has moved its classes, is as good as none.
        return None


def read_classes(kinds: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The defaults of `FIELDS` by model type, from transformers' configuration classes; types it lacks are left out.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import CONFIG_MAPPING

    return {kind: _read_class(CONFIG_MAPPING[kind]) for kind in kinds if kind in CONFIG_MAPPING}


def _read_class(found: Callable[[], Any]) -> dict[str, Any]:
    made = found()
    # A made configuration has filled in what follows from other sizes; the signature has the default itself.
    given = {name: each.default for name, each in inspect.signature(found).parameters.items()}
    others = {field: name for name, field in OTHER_NAMES.items()}
    read: dict[str, Any] = {}
    for field in FIELDS:
        for name in (field, others.get(field, field)):
            value = given.get(name, getattr(made, name, _ABSENT))
            if value is None or isinstance(value, (bool, int, float, str)):
                read[field] = value
                break
    rotary = getattr(made, "rope_parameters", None) or {}
    # Transformers 5 keeps the rotary embedding's parameters together, by kind of layer where they differ.
    rotary = rotary.get("full_attention", rotary)
    read |= {name: rotary[name] for name in ("rope_theta", "partial_rotary_factor") if rotary.get(name) is not None}
    return read
