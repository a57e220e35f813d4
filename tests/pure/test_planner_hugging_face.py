"""Hugging Face configurations: counted to the last parameter, or refused by the part that is not planned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hp_plugin.planner.counts.layer import attention_forward
from hp_plugin.planner.counts.program import FusedAttention
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.inputs.hugging_face.defaults import TABLE, type_defaults
from hp_plugin.planner.inputs.hugging_face.model_types import MODEL_TYPES, NOT_PLANNED
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.models import load_model
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import load_hardware
from hp_plugin.planner.machine.json_file import package_json
from hp_plugin.planner.search.launch_flags import megatron_flags, not_in_flags
from hp_plugin.planner.seconds.step import predict

SHAPES = json.loads((Path(__file__).parents[1] / "hugging_face" / "configurations.json").read_text(encoding="utf-8"))
"""Public configurations with transformers' own parameter counts (tests/hugging_face holds them to it)."""


def loaded(folder: Path, config: dict[str, Any]) -> ModelShape:
    path = folder / "model.json"
    path.write_text(json.dumps(config))
    return load_model(str(path))


def flags(model: ModelShape, seq: int = 256) -> str:
    found = predict(model, Layout(micro_batch=1), Workload("train", seq, 1), load_hardware("h100-ib"))
    return " ".join(megatron_flags(found))


def kernels(share: Share) -> list[Any]:
    return [kernel for block in attention_forward(share) for kernel in block.kernels]


LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
    "intermediate_size": 512, "vocab_size": 1000,
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape["name"])
def test_parameters_are_transformers_own(tmp_path: Path, shape: dict[str, Any]) -> None:
    assert loaded(tmp_path, shape["config"]).parameters == shape["parameters"]


def test_every_planned_type_is_counted_and_has_its_defaults() -> None:
    counted = {shape["config"].get("text_config", shape["config"])["model_type"] for shape in SHAPES}
    same_decoder = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
    alike = {*same_decoder.values(), "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text"}
    assert set(MODEL_TYPES) <= counted | alike
    assert set(package_json(TABLE)["types"]) == set(MODEL_TYPES)
    for kind in MODEL_TYPES:
        known = set(type_defaults(kind))
        assert {"num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"} <= known, kind


@pytest.mark.parametrize(
    ("config", "said"),
    [
        *(({"model_type": kind, "hidden_size": 64, "num_hidden_layers": 2}, f"needs {what.split(' (')[0]}")
          for kind, what in NOT_PLANNED.items()),
        ({"model_type": "gemma2", "hidden_size": 64, "num_hidden_layers": 2}, "a cap on attention scores"),
        ({"model_type": "gemma2", "hidden_size": 64, "num_hidden_layers": 2, "attn_logit_softcapping": None},
         "a cap on logits"),
        (LLAMA | {"layer_types": ["linear_attention"] * 4}, "layers of linear attention"),
        (LLAMA | {"layer_types": ["full_attention"] * 3}, "layer_types names 3 layers of 4"),
        (LLAMA | {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2, "sliding_window": 8},
         "not all but every so-manieth"),
        (LLAMA | {"sliding_window": "8", "layer_types": ["sliding_attention"] * 4}, "sliding_window takes a positive"),
        (LLAMA | {"hidden_act": "xielu"}, "activation 'xielu'"),
        (LLAMA | {"rope_theta": -1}, "rope_theta takes a positive number, got -1"),
        (LLAMA | {"num_attention_heads": "8"}, "num_attention_heads takes an integer, got '8'"),
        (LLAMA | {"vocab_size": None}, "vocab_size is missing, and model_type 'llama' has no default"),
        (LLAMA | {"tie_word_embeddings": "no"}, "tie_word_embeddings takes true or false, got 'no'"),
        ({"model_type": "mixtral", "hidden_size": 64, "num_hidden_layers": 2, "num_local_experts": None},
         "num_local_experts is missing"),
        ({"model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 2, "mlp_only_layers": [0]},
         "dense layers chosen one by one"),
    ],
)  # fmt: skip
def test_what_is_not_planned_is_refused_by_name(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        loaded(tmp_path, config)


def test_missing_fields_have_their_types_default(tmp_path: Path) -> None:
    nested = loaded(tmp_path, {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}})
    assert (nested.layers, nested.D, nested.h, nested.d, nested.vocab) == (26, 2304, 8, 256, 262208)
    bare = {key: LLAMA[key] for key in ("model_type", "hidden_size", "num_hidden_layers")}
    assert loaded(tmp_path, bare | {"model_type": "qwen3"}).d == 128
    assert loaded(tmp_path, bare).d == 256 // 32  # follows from the sizes, as in transformers
    assert loaded(tmp_path, bare | {"model_type": "mistral"}).g == 8
    assert loaded(tmp_path, bare | {"model_type": "mistral", "num_key_value_heads": None}).g == 32


def test_windows_are_planned_and_said_to_megatron(tmp_path: Path) -> None:
    """4096 of 32768 positions: 0.234 of the pairs; every sixth layer attends to all."""
    mistral = LLAMA | {"model_type": "mistral", "sliding_window": 4096}
    model = loaded(tmp_path, mistral)
    assert model.attended(32768) == pytest.approx(1 - (1 - 1 / 8) ** 2)
    assert model.attended(4096) == 1.0
    assert "--window-size 4095,0" in flags(model) and "skip-freq" not in flags(model)
    assert loaded(tmp_path, mistral | {"sliding_window": None}).window == 0
    gemma = {"model_type": "gemma3_text", "hidden_size": 256, "num_hidden_layers": 12, "sliding_window": 64}
    mixed = loaded(tmp_path, gemma)
    assert mixed.attended(128) == pytest.approx((2 + 10 * 0.75) / 12)
    assert "--window-size 63,0 --window-attn-skip-freq 6" in flags(mixed)
    listed = ["sliding_attention", "full_attention"] * 2
    assert loaded(tmp_path, LLAMA | {"layer_types": listed, "sliding_window": 8}).window_every == 2
    qwen = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 8, "sliding_window": 8, "max_window_layers": 0}
    assert loaded(tmp_path, qwen).window == 0
    assert loaded(tmp_path, qwen | {"use_sliding_window": True}).window == 8


def test_rotary_norms_and_biases_are_said_to_megatron(tmp_path: Path) -> None:
    scaled = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    said = flags(loaded(tmp_path, LLAMA | {"rope_theta": 500000.0, "rope_scaling": scaled, "rms_norm_eps": 1e-5}))
    assert "--rotary-base 500000 --use-rope-scaling --rope-scaling-factor 8" in said and "epsilon" not in said
    new = {"rope_type": "linear", "factor": 4.0, "rope_theta": 7.0, "partial_rotary_factor": 0.5}
    said = flags(loaded(tmp_path, LLAMA | {"rope_parameters": new, "rms_norm_eps": 2e-6}))
    for flag in ("--rotary-base 7", "--rotary-percent 0.5", "--rotary-seq-len-interpolation-factor 4"):
        assert flag in said
    assert "--norm-epsilon 2e-06" in said
    whole = flags(loaded(tmp_path, LLAMA | {"attention_bias": True, "mlp_bias": True}))
    assert "--disable-bias-linear" not in whole and "--add-qkv-bias" not in whole
    assert "--rotary-interleaved" in flags(loaded(tmp_path, LLAMA | {"model_type": "glm"}))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LLAMA | {"attention_bias": True}, "a bias of the attention output projection alone"),
        (LLAMA | {"mlp_bias": True}, "biases of the MLP alone"),
        (LLAMA | {"hidden_act": "gelu"}, "the activation gelu of a gated MLP"),
        (LLAMA | {"query_pre_attn_scalar": 168}, r"1/√168 instead of 1/√32"),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling 'yarn' by 4"),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 2.0}}, "'llama3' by 4"),
        (LLAMA | {"model_type": "granite", "embedding_multiplier": 12.0}, "embedding_multiplier 12"),
        (LLAMA | {"model_type": "gemma", "num_key_value_heads": 4}, "embeddings multiplied by the root"),
        (LLAMA | {"model_type": "glm4"}, "norms after attention and MLP"),
    ],
)
def test_what_no_flag_builds_is_said(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    model = loaded(tmp_path, config)
    assert any(said in part for part in not_in_flags(model)), not_in_flags(model)
    assert not any("swiglu" in flag for flag in [flags(model)] if "gelu" in model.activation)
    plain = loaded(tmp_path, LLAMA)
    assert not_in_flags(plain) == [] and "--swiglu" in flags(plain)


def test_windows_shorten_attention_and_nothing_else(tmp_path: Path) -> None:
    """Attention at 32k with a window of 4096 takes 0.234 of its time; a decode step reads an eighth of the cache."""
    windowed = loaded(tmp_path, LLAMA | {"model_type": "mistral", "num_attention_heads": 8, "head_dim": 32})
    whole = replace(windowed, window=0)
    assert windowed.window == 4096
    training, decode = Workload("train", 32768, 1), Workload("decode", 32768, 1)
    for layout in (Layout(), Layout.parse("grid=1x2,exchange=sequence")):
        both = [kernels(Share(model, layout, training)) for model in (windowed, whole)]
        for mine, full in zip(*both, strict=True):
            share = 0.234375 if isinstance(full, FusedAttention) else 1.0
            assert mine.operations == pytest.approx(share * full.operations)
    caches = [
        [kernel.bytes for kernel in kernels(Share(model, Layout(), decode)) if kernel.name == "kv cache"]
        for model in (windowed, whole)
    ]
    assert caches[0][0] == pytest.approx(caches[1][0] / 8)


def test_norms_after_attention_and_mlp_are_priced(tmp_path: Path) -> None:
    four = loaded(tmp_path, LLAMA | {"model_type": "glm4", "num_key_value_heads": 4})
    found = [
        predict(model, Layout(micro_batch=1), Workload("train", 256, 1), load_hardware("h100-ib")).tokens_per_s
        for model in (four, replace(four, norms=2))
    ]
    assert found[0] < found[1]
