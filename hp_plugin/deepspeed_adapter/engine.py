"""`deepspeed.initialize` for models on a head × dimension grid; the grid is an option of DeepSpeed's configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from megatron.core import parallel_state
from torch import nn

from hp_plugin.attention.registration import initialize_head_dim_parallel, registered_groups, when_registered
from hp_plugin.attention.specs import keep_weights
from hp_plugin.config import HeadDimConfig
from hp_plugin.deepspeed_adapter.checkpoint_layout import keep_to_layout
from hp_plugin.deepspeed_adapter.config import head_dim_option, load_settings
from hp_plugin.deepspeed_adapter.cpu_start import skip_inference_extension
from hp_plugin.deepspeed_adapter.gradients import sum_replica_gradients
from hp_plugin.deepspeed_adapter.guard import KEY, adapter_calls, guard_plain_deepspeed
from hp_plugin.deepspeed_adapter.model_check import check_model, frees_weights, grid_layers
from hp_plugin.deepspeed_adapter.moe.engine import attach_mixture, check_mixture
from hp_plugin.deepspeed_adapter.mpu import GridMpu

# A model on a grid needs this adapter's mpu and gradient sums: plain `deepspeed.initialize` must not take it.
when_registered(guard_plain_deepspeed)


def initialize_grid(config: Any, **stock: Any) -> HeadDimConfig | None:
    """Reads the grid from a DeepSpeed configuration and registers it, so that a model can be built on it.

    Joins the default process group through DeepSpeed if none is there. Does nothing but read where the configuration
    names no grid, or names the one that is registered already.

    Args:
        config: a dictionary, a path or base64, as `deepspeed.initialize` takes it.
        stock: further arguments of `parallel_state.initialize_model_parallel`.

    Returns:
        The grid that the configuration names, or None.

    Raises:
        ValueError: the option is malformed, or contradicts another option, the world or the registered grid.
    """
    guard_plain_deepspeed()
    skip_inference_extension()
    head_dim = head_dim_option(load_settings(config))
    if head_dim is None:
        return None
    groups = registered_groups()
    if groups is not None:
        if groups.grid != head_dim.grid:
            raise ValueError(
                f"the DeepSpeed configuration names the grid {head_dim.grid}, but {groups.grid} "
                f"is registered already: give both the same, or leave the registration to this call"
            )
        return head_dim
    if parallel_state.model_parallel_is_initialized():
        raise ValueError(
            f"the DeepSpeed configuration names the grid {head_dim.flag}, but model parallelism was already "
            f"initialized without one (TP = {parallel_state.get_tensor_model_parallel_world_size()}): leave "
            "initialize_model_parallel out, or call hp_plugin.initialize_head_dim_parallel in its place"
        )
    if not dist.is_initialized():
        deepspeed.init_distributed()
    initialize_head_dim_parallel(head_dim, **stock)
    return head_dim


def initialize(
    args: Any = None,
    model: nn.Module | Callable[[HeadDimConfig], nn.Module] | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` on the grid that the configuration's `head_dim_parallel` names; without it, just that.

    Registers the grid unless it is, hands DeepSpeed the mpu that goes with it, and sums the gradients that Megatron's
    own finalization would sum over the TP group.

    Args:
        model: a module that was built on the grid, or a function that builds it once the grid is registered.
        mpu: None, or one whose tensor- and data-parallel sizes are the grid's; DeepSpeed gets the grid's own.
        config: a dictionary, a path or base64, as ever; so are all other arguments.

    Returns:
        `(engine, optimizer, training_dataloader, lr_scheduler)`.

    Raises:
        ValueError: the option is malformed, or contradicts the rest of the configuration, the mpu, the world, the
            registered grid or the model.
    """
    guard_plain_deepspeed()
    skip_inference_extension()
    given = {
        "args": args,
        "optimizer": optimizer,
        "model_parameters": model_parameters,
        "training_data": training_data,
        "lr_scheduler": lr_scheduler,
        "distributed_port": distributed_port,
        "dist_init_required": dist_init_required,
        "collate_fn": collate_fn,
        "config": config,
        "mesh_param": mesh_param,
        "config_params": config_params,
    }
    source = next(
        (one for one in (config, config_params, getattr(args, "deepspeed_config", None)) if one is not None), None
    )
    head_dim = None if source is None else head_dim_option(load_settings(source))
    if head_dim is None:
        if isinstance(model, nn.Module) and grid_layers(model):
            raise ValueError(
                f"the model is on a grid, but the DeepSpeed configuration has no {KEY!r}: name the grid there"
            )
        result = deepspeed.initialize(model=model, mpu=mpu, **given)
        attach_mixture(result[0])
        keep_to_layout(result[0], None)
        return result
    if isinstance(model, deepspeed.PipelineModule):
        raise ValueError(f"{KEY} does not work with DeepSpeed's PipelineModule: train with a plain module")
    if mesh_param:
        raise ValueError(f"{KEY} names the ranks' groups, and so does mesh_param {mesh_param}: give one of them")
    if model is None:
        raise ValueError("deepspeed.initialize needs a model, or a function that builds it on the grid")
    _check_mpu(mpu, head_dim, source)
    initialize_grid(source)
    groups = registered_groups()
    assert groups is not None
    unit = GridMpu.from_parallel_state()
    if unit.get_pipeline_model_parallel_world_size() > 1:
        raise ValueError(
            f"{KEY} with {unit.get_pipeline_model_parallel_world_size()} pipeline stages: DeepSpeed's engine runs no "
            "Megatron pipeline schedule; initialize the grid without pipeline parallelism"
        )
    with adapter_calls():
        built = model if isinstance(model, nn.Module) else model(head_dim)
        check_model(built, head_dim, groups, load_settings(source))
        check_mixture(built, load_settings(source))
        if frees_weights(load_settings(source)):
            keep_weights(built)
        result = deepspeed.initialize(model=built, mpu=unit, **given)
    # After the engine: it changes parameters' dtypes, which hooks on them would not survive.
    sum_replica_gradients(built, groups)
    attach_mixture(result[0])
    keep_to_layout(result[0], head_dim)
    return result


def _check_mpu(mpu: Any, head_dim: HeadDimConfig, source: Any) -> None:
    """Refuses an mpu of other sizes than the grid's; `parallel_state` itself is a common one, and no contradiction."""
    if mpu is None:
        return
    for name in ("get_tensor_model_parallel_world_size", "get_model_parallel_world_size"):
        if hasattr(mpu, name):
            size = getattr(mpu, name)()
            if size != head_dim.size:
                raise ValueError(
                    f"the mpu says {name}() = {size}, {KEY} says m·n = {head_dim.m}·{head_dim.n} = {head_dim.size}: "
                    "leave the mpu out"
                )
            return
    raise ValueError(f"the mpu {mpu!r} does not tell its tensor-parallel size: leave it out, {KEY} brings its own")
