"""Megatron's gradient finalization on a grid: sums what stock does not know that the dim axis has parts of."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import wraps
from typing import Any

from megatron.core.utils import get_attr_wrapped_model

from hp_plugin.exchange.replicas import sum_partial_gradients
from hp_plugin.grid.groups import HeadDimGroups


def finalize_on_grid(groups: HeadDimGroups) -> Callable[[], None]:
    """Adds the sums to `finalize_model_grads`, whoever calls it; returns what takes them away again.

    They stand beside the sums over the TP group that stock makes for sequence parallelism, since pipelines, data
    parallelism and scaling by tokens are all in order around that place.
    """
    # The package exports the function of this name, which hides the module.
    module: Any = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    original = module._allreduce_non_tensor_model_parallel_grads

    @wraps(original)
    def with_dim_axis(model: list[Any], *args: Any, **kwargs: Any) -> None:
        original(model, *args, **kwargs)
        parameters = [parameter for chunk in model for parameter in get_attr_wrapped_model(chunk, "parameters")()]
        sum_partial_gradients(parameters, groups.dim)

    module._allreduce_non_tensor_model_parallel_grads = with_dim_axis

    def take_away() -> None:
        module._allreduce_non_tensor_model_parallel_grads = original

    return take_away
