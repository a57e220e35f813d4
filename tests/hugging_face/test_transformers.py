"""The planner's defaults and parameter counts against transformers itself, which only these tests need."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from hp_plugin.planner.inputs.hugging_face.defaults import TABLE, read_classes
from hp_plugin.planner.inputs.hugging_face.model_types import MODEL_TYPES
from hp_plugin.planner.machine.json_file import package_json

HERE = Path(__file__).parent
SHAPES = json.loads((HERE / "configurations.json").read_text(encoding="utf-8"))

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None,
    reason="NOT CHECKED against transformers: pip install -r tests/hugging_face/requirements.txt",
)


def test_the_table_is_what_the_classes_say() -> None:
    table = package_json(TABLE)["types"]
    assert set(table) == set(MODEL_TYPES)
    assert read_classes(MODEL_TYPES) == table


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape["name"])
def test_the_counts_are_transformers_own(shape: dict[str, Any]) -> None:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = shape["config"]
    if config["model_type"] != "gemma3":
        # Of other multimodal models the decoder alone.
        config = config.get("text_config", config)
    kind = {"qwen2_vl": "qwen2"}.get(config["model_type"], config["model_type"])
    made = CONFIG_MAPPING[kind].from_dict({**config, "model_type": kind, "rope_scaling": None})
    made = getattr(made, "text_config", made)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    model.tie_weights()
    assert sum(parameter.numel() for parameter in set(model.parameters())) == shape["parameters"]
