from transformer_engine.pytorch import attention, distributed, float8_tensor, fp8, module, ops, tensor
from transformer_engine.pytorch.attention import DotProductAttention
from transformer_engine.pytorch.fp8 import fp8_autocast, fp8_model_init
from transformer_engine.pytorch.module import GroupedLinear, LayerNorm, LayerNormLinear, Linear, RMSNorm

__all__ = [
    "DotProductAttention", "GroupedLinear", "LayerNorm", "LayerNormLinear", "Linear", "RMSNorm", "attention",
    "distributed", "float8_tensor", "fp8", "fp8_autocast", "fp8_model_init", "module", "ops", "tensor",
]  # fmt: skip
