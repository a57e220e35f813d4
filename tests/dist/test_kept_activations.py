"""What Megatron-Core's own layer saves for its backward pass, tensor by tensor, beside the planner's count."""

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hp_plugin import cpu_backend
from hp_plugin.planner.counts.activations import layer_activations
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.attention_rate import FusedHeadDims
from tests.ranks import Ranks

# Megatron-Core repeats keys and values for every query head where no fused kernel does that inside, so g = h.
MODELS = {
    "square": ModelShape("square", 1, 16, 4, 4, 4, 32),
    "wide heads": ModelShape("wide heads", 1, 12, 2, 2, 24, 20),
    "gated": ModelShape("gated", 1, 8, 4, 4, 4, 24, gated=True),
}


def kept(model: ModelShape, tp: int, s: int, b: int) -> tuple[int, int]:
    """Bytes that one layer without dropout keeps on this rank: in 16 bit, and in fp32."""
    cpu_backend.enable()
    parallel_state.initialize_model_parallel(tp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=model.D,
        num_attention_heads=model.h,
        kv_channels=model.d,
        ffn_hidden_size=model.ffn,
        gated_linear_unit=model.gated,
        activation_func=torch.nn.functional.silu if model.gated else torch.nn.functional.gelu,
        bias_activation_fusion=model.gated,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        tensor_model_parallel_size=tp,
        gradient_accumulation_fusion=False,
    )
    layer = build_module(get_gpt_layer_local_spec(), config=config, layer_number=1).cuda().bfloat16()
    hidden = torch.randn(s, b, model.D, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    mask = torch.ones(1, 1, s, s, dtype=torch.bool, device="cuda").triu(1)
    known = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), mask)}
    saved: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        layer(hidden, attention_mask=mask)
    # A norm's mean and deviation, two numbers per token, are in no count.
    whole = [tensor for tensor in saved.values() if tensor.shape[-1] > 1]
    halves = sum(tensor.untyped_storage().nbytes() for tensor in whole if tensor.dtype == torch.bfloat16)
    return halves, sum(tensor.untyped_storage().nbytes() for tensor in whole) - halves


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_planner_counts_what_a_layer_saves(ranks: Ranks, model: ModelShape, tp: int) -> None:
    s, b = 10, 3
    share = Share(model, Layout(tp, micro_batch=b), Workload("train", s, b), FusedHeadDims(0, 0))
    counted = layer_activations(share, moe=False, recompute="none")
    for halves, fp32 in ranks.run(tp, kept, model, tp, s, b):
        assert halves == counted
        # Softmax in fp32 saves its result before it is rounded; the kernel that GPUs have for it saves the rounded one.
        assert fp32 == 4 * b * model.h // tp * s * s
