"""Model shapes against published parameter counts, operations by hand, and what users can get wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hp_plugin.planner.counts.stages import build_stages, split_layers, stage_parameters
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.models import load_model, presets
from hp_plugin.planner.inputs.workload import Workload


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-32b", 32_763_876_352),
        ("qwen3-32b", 32_762_123_264),
        ("qwen3-30b-a3b", 30_532_122_624),
    ],
)
def test_parameter_counts_of_released_models(name: str, published: int) -> None:
    assert load_model(name).parameters == published


@pytest.mark.parametrize(
    ("layers", "D", "h", "published"),
    # NumParams column of llm-foundry's benchmark tables, sequence 2048.
    [
        (24, 1536, 12, 760470528), (24, 2048, 16, 1315950592), (32, 2560, 20, 2651837440),
        (32, 4096, 32, 6658859008), (40, 5120, 40, 12853954560), (48, 7168, 56, 29975214080),
    ],
)  # fmt: skip
def test_parameter_counts_of_benchmark_models(layers: int, D: int, h: int, published: int) -> None:
    model = ModelShape("mpt", layers, D, h, h, D // h, 4 * D, 50368, tied=True, biases=True, learned_positions=2048)
    assert model.parameters == published


def test_active_parameters_count_the_top_k_experts() -> None:
    mixtral = load_model("mixtral-8x7b")
    assert mixtral.parameters - mixtral.active_parameters == 32 * 6 * 3 * 4096 * 14336


def test_operations_by_hand() -> None:
    """Odd sizes: 3 layers, D 10, 6 heads of 4, 2 groups, MLP 14 gated, vocabulary 11, 5 tokens in sequences of 5."""
    model = ModelShape("odd", 3, 10, 6, 2, 4, 14, 11, gated=True)
    qkv = 5 * 10 * (6 + 2 * 2) * 4
    scores_and_context = 2 * 5 * 5 * 6 * 4
    proj = 5 * 6 * 4 * 10
    mlp = 3 * 5 * 10 * 14
    logits = 5 * 10 * 11
    by_hand = 2 * (3 * (qkv + scores_and_context + proj + mlp) + logits)
    assert model.matmul_operations(5, 5) == by_hand
    assert model.matmul_operations(5, 5, causal=True) == by_hand - 2 * 3 * scores_and_context / 2
    # The source experiments' model: 12 D² weights per layer, 4 layers.
    paper = load_model("paper-dense")
    assert paper.matmul_operations(1, 0) == 2 * 4 * 12 * 8192**2


def test_operations_agree_with_megatrons_formula() -> None:
    """12 B s L D² (1 + g/h + s/D + ffn/D + V/(2 L D)) for plain MLPs, forward and backward (Megatron-LM core 0.8)."""
    model = ModelShape("w", 84, 8192, 64, 64, 128, 32768, 131072)
    batch, seq = 384, 4096
    formula = 12 * batch * seq * 84 * 8192**2 * (1 + 1 + seq / 8192 + 4 + 131072 / (2 * 84 * 8192))
    assert 3 * model.matmul_operations(batch * seq, seq) == pytest.approx(formula, rel=1e-12)


def test_models_from_text_and_file(tmp_path: Path) -> None:
    model = load_model("layers=2,D=48,h=6")
    assert (model.d, model.g, model.ffn) == (8, 6, 192)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"layers": 2, "D": 48, "h": 6, "g": 2, "gated": True}))
    assert load_model(f"{path},vocab=100") == ModelShape("mine", 2, 48, 6, 2, 8, 192, 100, gated=True)
    assert load_model("paper-dense,vocab=50304").vocab == 50304
    for name in presets():
        assert load_model(name).parameters > 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("paper-dence", "did you mean paper-dense"),
        ("layers=2,D=48", "missing h"),
        ("layers=2,D=48,h=6,heads=6", "unknown field 'heads'"),
        ("layers=2,D=48,h=5", "D=48 is no multiple of h=5: give d"),
        ("layers=2,D=48,h=6,g=4", "h=6 query heads are no multiple of g=4"),
        ("layers=0,D=48,h=6", "layers must be a positive integer"),
        ("layers=two,D=48,h=6", "layers takes an integer"),
        ("layers=2,D=48,h=6,gated=1", "gated takes true or false"),
        ("layers=2,D=48,h=true", "h takes an integer"),
        ("layers=2,D=48,h=6,experts=2,top_k=3", "top_k=3 of only 2 experts"),
        ("layers=2,D", "expected key=value, got 'D'"),
        ("nowhere.json", "model file nowhere.json: No such file"),
    ],
)
def test_what_a_model_cannot_be(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_model(text)


def test_a_malformed_model_file_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{"layers": 2,\n "D": }')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        load_model(str(path))


def test_layers_over_stages() -> None:
    assert split_layers(8, 4) == [2, 2, 2, 2]
    assert split_layers(7, 4) == [2, 2, 2, 1]
    assert split_layers(92, 8) == [12] * 7 + [8]
    assert split_layers(5, 4) is None  # 2, 2, 1 and nothing


def test_stage_parameters_add_up_to_the_model() -> None:
    model = ModelShape("odd", 7, 24, 6, 2, 4, 36, 50, gated=True, experts=4, top_k=2, moe_every=3)
    layout = Layout(tp=2, pp=4, ep=2)
    counts = [stage_parameters(model, layout, stage) for stage in build_stages(model, layout)]
    norms = 7 * 2 * model.norm_parameters + model.norm_parameters
    routers = 3 * 24 * 4
    # Two TP ranks hold everything but norms and routers once, and each half of the experts.
    assert 2 * sum(count.dense for count in counts) - norms - routers + 2 * sum(count.experts for count in counts) == (
        model.parameters
    )
    assert [stage.moe for stage in build_stages(model, layout)] == [1, 1, 0, 1]  # layers 0, 3 and 6


def test_tied_embeddings_live_on_both_ends_of_a_pipeline() -> None:
    model = ModelShape("tied", 4, 8, 2, 2, 4, 16, 10, tied=True)
    one = Layout()
    assert stage_parameters(model, one, build_stages(model, one)[0]).dense == model.parameters
    two = Layout(pp=2)
    total = sum(stage_parameters(model, two, stage).dense for stage in build_stages(model, two))
    assert total == model.parameters + 10 * 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"mode": "infer"}, "unknown mode 'infer'"),
        ({"seq": 0}, "seq must be at least 1"),
        ({"global_batch": -4}, "global batch must be at least 1"),
        ({"continuous": True}, "continuous concerns decode"),
    ],
)
def test_what_a_workload_cannot_be(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Workload(**arguments)  # type: ignore[arg-type]


def test_tokens_of_a_step() -> None:
    assert Workload("train", 2048, 8).tokens_per_step == 16384
    assert Workload("decode", 2048, 8).tokens_per_step == 8


QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_attention_heads": 32, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "tie_word_embeddings": False, "vocab_size": 151936,
}  # fmt: skip


def test_a_hugging_face_config_is_a_model(tmp_path: Path) -> None:
    path = tmp_path / "Qwen3-30B-A3B" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(QWEN3_MOE))
    assert replace(load_model(str(path)), name="qwen3-30b-a3b") == load_model("qwen3-30b-a3b")
    assert load_model(f"{path},layers=2").layers == 2
    assert load_model(str(path)).parameters == pytest.approx(30.5e9, rel=0.01)
    for key, said in (
        ("kv_lora_rank", "multi-latent attention"),
        ("n_shared_experts", "an expert shared"),
    ):
        path.write_text(json.dumps(QWEN3_MOE | {key: 512}))
        with pytest.raises(ValueError, match=rf"config\.json: {said}"):
            load_model(str(path))
    path.write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    with pytest.raises(ValueError, match="num_hidden_layers is missing"):
        load_model(str(path))
    path.write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 64}))
    with pytest.raises(ValueError, match="model_type 'gpt2' is not supported; supported are llama"):
        load_model(str(path))
    decoder = {**QWEN3_MOE, "model_type": "gemma3_text", "num_experts": 0}
    del decoder["tie_word_embeddings"]
    path.write_text(json.dumps({"model_type": "gemma3", "text_config": decoder}))
    assert load_model(str(path)).tied and load_model(str(path)).ffn == 6144


@pytest.mark.parametrize("heads", ["32", None, 0, [32], 2.5])
def test_sizes_that_are_no_sizes_are_named(tmp_path: Path, heads: object) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"layers": 2, "D": 64, "h": heads}))
    with pytest.raises(ValueError, match=r"model m: (h takes an integer|D=64 is no multiple of h=0)"):
        load_model(str(path))
