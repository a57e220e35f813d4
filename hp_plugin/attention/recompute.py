"""Lets Megatron-Core recompute MLPs with biases, which hangs as upstream does it (0.16.1)."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

_MODULE = "mlp"


class OwnBiasRowParallelLinear(RowParallelLinear):
    """Stock's linear, which returns an alias of its bias instead of the parameter itself.

    `tensor_parallel.checkpoint` makes whatever an MLP returns the output of its autograd function. A parameter among
    it is a leaf no longer, and backward waits for itself.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As stock."""
        output, bias = super().forward(*args, **kwargs)
        return output, None if bias is None else bias.view_as(bias)


OWN_BIAS: dict[type, type] = {RowParallelLinear: OwnBiasRowParallelLinear}
"""Stock's linears that end an MLP and what stands in for each."""


def recomputes_mlp(config: TransformerConfig) -> bool:
    """Whether MLPs, with biases that they return, are recomputed as a whole."""
    return bool(
        config.recompute_granularity == "selective"
        and _MODULE in (config.recompute_modules or ())
        and config.add_bias_linear
    )
