"""Makes Megatron-Core's expert groups the ones DeepSpeed-MoE communicates over."""

from __future__ import annotations

import torch.distributed as torch_dist
from deepspeed import comm
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_group
from megatron.core import parallel_state

from hp_plugin.deepspeed_adapter.cpu_start import skip_inference_extension
from hp_plugin.deepspeed_adapter.mpu import GridMpu


def register_expert_groups(name: str, experts_per_group: int) -> torch_dist.ProcessGroup:
    """Hands Megatron-Core's expert groups to DeepSpeed, under DeepSpeed's name for them, and an mpu if it has none.

    Both frameworks then agree, by construction, on which ranks hold which expert and which hold copies of it. Makes no
    group; what an earlier `initialize_model_parallel` left behind is replaced.

    Args:
        name: DeepSpeed's name of the group, `ep_size_<ranks>`.
        experts_per_group: ranks that share the experts.

    Returns:
        The expert-parallel group.

    Raises:
        RuntimeError: Megatron-Core was initialized with other expert sizes.
        ValueError: context parallelism is on.
    """
    expert = parallel_state.get_expert_model_parallel_group()
    if expert.size() != experts_per_group:
        raise RuntimeError(
            f"the model has expert_model_parallel_size {experts_per_group}, parallel_state {expert.size()}: give "
            "initialize_head_dim_parallel (initialize_model_parallel) the same expert_model_parallel_size"
        )
    # DeepSpeed's collectives go through a backend object, which wraps the group that torch has already.
    if not comm.is_initialized():
        skip_inference_extension()
        comm.init_distributed(auto_mpi_discovery=False, verbose=False)
    copies = parallel_state.get_expert_data_parallel_group()
    groups._EXPERT_PARALLEL_GROUP[name] = expert
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = torch_dist.get_process_group_ranks(expert)
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = copies
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = torch_dist.get_process_group_ranks(copies)
    groups.expert_tensor_parallel_world_size = parallel_state.get_expert_tensor_parallel_world_size()
    if groups.mpu is None or isinstance(groups.mpu, GridMpu):
        groups.mpu = GridMpu.from_parallel_state()
    return expert


def check_mpu(tensor: torch_dist.ProcessGroup) -> None:
    """DeepSpeed must take exactly the TP group for the ranks that hold the same tokens.

    Raises:
        RuntimeError: its mpu says something else, and every token would be counted wrongly.
    """
    if groups.mpu is None or bwc_tensor_model_parallel_group(groups.mpu) is not tensor:
        raise RuntimeError(
            f"DeepSpeed's mpu ({type(groups.mpu).__name__}) does not name the {tensor.size()} tensor-parallel ranks of "
            "the model: pass deepspeed.initialize no mpu of your own, or GridMpu.from_parallel_state()"
        )


def forget_expert_groups() -> None:
    """Takes back from DeepSpeed all that `register_expert_groups` handed it, so that the groups can end."""
    for known in (
        groups._EXPERT_PARALLEL_GROUP,
        groups._EXPERT_PARALLEL_GROUP_RANKS,
        groups._EXPERT_DATA_PARALLEL_GROUP,
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
    ):
        known.clear()
    if isinstance(groups.mpu, GridMpu):
        groups.mpu = None
