"""What DeepSpeed-MoE cannot do is said in words and numbers before any group is made."""

from dataclasses import replace
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from hp_plugin.deepspeed_adapter.moe.options import DeepSpeedMoEOptions, check_moe

pytestmark = [
    pytest.mark.filterwarnings("ignore:When using expert parallelism and tensor parallelism:UserWarning:megatron"),
]


def mixture(**fields: Any) -> TransformerConfig:
    settings: dict[str, Any] = dict(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_moe_experts=8,
        moe_ffn_hidden_size=64,
        moe_router_topk=2,
        tensor_model_parallel_size=4,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
    )
    return TransformerConfig(**{**settings, **fields})


def test_a_mixture_that_fits_is_let_through() -> None:
    check_moe(mixture(), DeepSpeedMoEOptions(), 8)
    check_moe(mixture(expert_model_parallel_size=8), DeepSpeedMoEOptions(), 16)


@pytest.mark.parametrize(
    ("fields", "options", "said"),
    [
        ({"expert_model_parallel_size": 16}, {}, "16 is larger than --num-experts 8"),
        ({"num_moe_experts": 6}, {}, "--num-experts 6 do not divide over --expert-model-parallel-size 4"),
        ({"expert_tensor_parallel_size": 2, "add_bias_linear": False}, {}, "--expert-tensor-parallel-size 2"),
        ({"num_moe_experts": 6, "expert_model_parallel_size": 6}, {}, "one must divide the other"),
        ({"expert_tensor_parallel_size": 4, "add_bias_linear": False}, {}, "does not divide the 8 ranks"),
        ({"moe_router_topk": 9}, {}, "--moe-router-topk 9 must be between 1 and --num-experts 8"),
        ({"moe_router_pre_softmax": True}, {}, "DeepSpeed normalizes the gates"),
        ({"moe_expert_capacity_factor": 0.0}, {}, "must be positive, got 0.0"),
        ({"moe_z_loss_coeff": 0.1}, {}, "--moe-z-loss-coeff 0.1"),
        ({"moe_router_load_balancing_type": "seq_aux_loss"}, {}, "aux_loss or none"),
        ({}, {"noisy_gate_policy": "Gumbel"}, "Jitter, RSample"),
        ({}, {"noisy_gate_policy": "RSample"}, "needs --moe-router-topk 1"),
        ({}, {"min_capacity": -1}, "must not be negative"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_each_contradiction_has_its_own_words(fields: dict[str, Any], options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_moe(mixture(**fields), replace(DeepSpeedMoEOptions(), **options), 8)
