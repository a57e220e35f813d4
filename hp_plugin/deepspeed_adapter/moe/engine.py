"""What DeepSpeed's engine must be told about mixtures of experts on a grid, and what it must not be asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import nn

from hp_plugin.deepspeed_adapter.moe.layer import DeepSpeedMoELayer
from hp_plugin.deepspeed_adapter.settings import gradient_clipping, zero_config


def check_mixture(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Refuses mixtures that DeepSpeed's engine would train wrongly or not at all.

    Raises:
        ValueError: the first contradiction between the model and DeepSpeed's configuration, with the way out.
    """
    for complaint in _complaints(model, settings):
        raise ValueError(complaint)


def _complaints(model: nn.Module, settings: Mapping[str, Any]) -> Iterator[str]:
    if any(isinstance(module, MoELayer) for module in model.modules()):
        yield (
            "the model has Megatron's MoELayer, whose experts DeepSpeed's engine cannot tell from weights that every "
            "rank holds: build it with deepspeed_moe_spec, or train it with Megatron's optimizer"
        )
    if not _mixtures(model):
        return
    zero = zero_config(settings)
    stage = int(zero.stage)
    if stage == 3:
        yield "ZeRO stage 3 cannot split DeepSpeed-MoE's experts: set zero_optimization.stage to 1 or 2"
    if stage and not zero.reduce_scatter:
        yield (
            "zero_optimization.reduce_scatter false averages the gradients of different experts: leave it out "
            f"(stage {stage}, mixture of experts)"
        )
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    holders = (
        parallel_state.get_expert_model_parallel_world_size() * parallel_state.get_expert_tensor_parallel_world_size()
    )
    clip = gradient_clipping(settings)
    if clip and not stage and holders != ranks:
        yield (
            f"gradient_clipping {clip} at ZeRO stage 0 clips by a wrong norm: DeepSpeed sums the experts' norms over "
            f"the {ranks} tensor-parallel ranks there, but {holders} ranks share the experts: set "
            "zero_optimization.stage to 1 (or gradient_clipping to 0)"
        )


def attach_mixture(engine: Any) -> None:
    """Scales the load-balancing loss as the engine scales the loss, and makes its checkpoints complete.

    Does nothing to an engine without DeepSpeed-MoE layers.
    """
    if not _mixtures(engine.module):
        return
    engine.module.register_forward_pre_hook(_scaling(engine))
    engine.save_checkpoint = _complete(engine.save_checkpoint)
    for layer in _mixtures(engine.module):
        for expert in layer.deepspeed_moe.experts.deepspeed_experts:
            expert.register_state_dict_post_hook(_without_empty_states)
            expert.register_load_state_dict_pre_hook(_with_empty_states)


def _without_empty_states(expert: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leaves out the extra states that Megatron's linears have none of: DeepSpeed takes all it finds for tensors."""
    for name in [name for name, value in state.items() if name.startswith(prefix) and value is None]:
        del state[name]


def _with_empty_states(expert: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Puts them back, as strict loading misses them otherwise."""
    for path, module in expert.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state and module.get_extra_state() is None:
            state.setdefault(f"{prefix}{path}._extra_state", None)


def _mixtures(model: nn.Module) -> list[DeepSpeedMoELayer]:
    return [module for module in model.modules() if isinstance(module, DeepSpeedMoELayer)]


def _scaling(engine: Any) -> Callable[..., None]:
    """Does for `MoEAuxLossAutoScaler` what Megatron's pipeline schedule does.

    `engine.backward` divides the loss by the number of micro-batches and multiplies it by the fp16 loss scale; the
    load-balancing loss enters in the middle of the graph and sees neither.
    """

    def scale(module: nn.Module, inputs: Any) -> None:
        loss_scale = float(getattr(engine.optimizer, "loss_scale", 1.0) or 1.0)
        MoEAuxLossAutoScaler.set_loss_scale(
            torch.tensor(loss_scale / engine.gradient_accumulation_steps(), device=engine.device)
        )

    return scale


def _complete(save: Callable[..., Any]) -> Callable[..., Any]:
    """Lets one rank of every file name write it.

    DeepSpeed names files by tensor-parallel rank, but lets only the first holder of an expert write; where holders have
    different tensor-parallel ranks, the others' files (their slices of the dense weights, too) would be missing.
    """

    @wraps(save)
    def complete(*args: Any, **kwargs: Any) -> Any:
        stock = groups._get_expert_data_parallel_rank
        groups._get_expert_data_parallel_rank = _number_among_namesakes
        try:
            return save(*args, **kwargs)
        finally:
            groups._get_expert_data_parallel_rank = stock

    return complete


def _number_among_namesakes(group_name: str) -> int:
    """This rank's number among those with its experts and its tensor-parallel rank."""
    holders = set(groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[group_name])
    copies = dist.get_process_group_ranks(parallel_state.get_data_parallel_group())
    return [rank for rank in copies if rank in holders].index(dist.get_rank())
