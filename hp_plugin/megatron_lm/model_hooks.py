"""The replacements inside Megatron-Core that put a grid into whatever GPT model a training script builds.

They can go where the script itself calls `initialize_head_dim_parallel`, makes a `HeadDimTransformerConfig` and passes
its layer spec through `head_dim_spec`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from hp_plugin.attention.model_check import check_attention
from hp_plugin.attention.on_grid import GridAttention
from hp_plugin.attention.registration import initialize_on_grid
from hp_plugin.attention.specs import finish_model, head_dim_spec, sequence_parallel_norms
from hp_plugin.attention.transformer_config import HeadDimTransformerConfig, post_init_on_grid
from hp_plugin.config import HeadDimConfig
from hp_plugin.megatron_lm.releases import check_parameters

_GROUPS = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "order")
_MODEL = ("self", "config", "transformer_layer_spec", "mtp_block_spec", "vp_stage")


class ModelHooks:
    """Groups, configuration and layer specs on the grid that `head_dim()` returns; stock behaviour for None."""

    def __init__(self, head_dim: Callable[[], HeadDimConfig | None]) -> None:
        self._head_dim = head_dim
        # owner, name, parameters that the replacement relies on, replacement of the original
        self._hooks: list[tuple[Any, str, tuple[str, ...], Callable[..., Callable[..., Any]]]] = [
            (parallel_state, "initialize_model_parallel", _GROUPS, self._initialize),
            (TransformerConfig, "__post_init__", ("self",), self._post_init),
            (GPTModel, "__init__", _MODEL, self._build_model),
            (Attention, "__init__", ("self", "config"), self._build_attention),
        ]

    def check(self) -> None:
        """Raises RuntimeError if a function to replace is not as known."""
        for owner, name, parameters, _ in self._hooks:
            module = getattr(owner, "__module__", "")
            check_parameters(f"{module}.{owner.__name__}.{name}".lstrip("."), getattr(owner, name), parameters)

    def install(self) -> None:
        """Replaces the functions for the rest of the process."""
        for owner, name, _, replace in self._hooks:
            original = getattr(owner, name)
            setattr(owner, name, replace(original))

    def _initialize(self, original: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(original)

        @wraps(original)
        def initialize_model_parallel(*args: Any, **kwargs: Any) -> None:
            head_dim = self._head_dim()
            if head_dim is None:
                return original(*args, **kwargs)
            return initialize_on_grid(original, head_dim, **signature.bind(*args, **kwargs).arguments)

        return initialize_model_parallel

    def _post_init(self, original: Callable[..., None]) -> Callable[..., None]:
        @wraps(original)
        def __post_init__(config: TransformerConfig) -> None:
            head_dim = self._head_dim()
            # A configuration of another TP size (a second model's, a default one) is not this grid's.
            ours = head_dim is not None and config.tensor_model_parallel_size == head_dim.size
            if not ours or isinstance(config, HeadDimTransformerConfig):
                return original(config)
            # Set by every construction, so `dataclasses.replace` keeps it although it is no field.
            config.head_dim_parallel = head_dim
            return post_init_on_grid(config, head_dim, lambda: original(config))

        return __post_init__

    def _build_model(self, original: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(original)

        @wraps(original)
        def __init__(*args: Any, **kwargs: Any) -> None:
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            config, vp_stage = call.arguments["config"], call.arguments["vp_stage"]
            if on_grid(config):
                for name in ("transformer_layer_spec", "mtp_block_spec"):
                    call.arguments[name] = _grid_spec(call.arguments[name], config, vp_stage)
            original(*call.args, **call.kwargs)
            if on_grid(config):
                check_attention(call.arguments["self"])
                finish_model(call.arguments["self"])

        return __init__

    def _build_attention(self, original: Callable[..., None]) -> Callable[..., None]:
        @wraps(original)
        def __init__(attention: Attention, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
            if on_grid(config) and not isinstance(attention, GridAttention):
                raise ValueError(
                    f"--head-dim-parallel: this script builds {type(attention).__name__} outside the layer specs of a "
                    "GPT model, where the grid cannot be put into it: train this model with "
                    "--tensor-model-parallel-size alone"
                )
            original(attention, config, *args, **kwargs)

        return __init__


def on_grid(config: Any) -> bool:
    """Whether a model's configuration carries a grid."""
    return getattr(config, "head_dim_parallel", None) is not None


def _grid_spec(spec: Any, config: TransformerConfig, vp_stage: int | None) -> Any:
    """`head_dim_spec` of a layer, block or multi-token-prediction spec; None, or a stage without layers, as it is."""
    if spec is None:
        return None
    if isinstance(spec, TransformerBlockSubmodules) and not spec.layer_specs:
        return sequence_parallel_norms(spec, config, vp_stage)
    return head_dim_spec(spec, config, vp_stage)
