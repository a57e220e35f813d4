"""The model-parallel unit that DeepSpeed asks for its groups, from those Megatron-Core has built."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class GridMpu:
    """Answers DeepSpeed with this rank's groups; `parallel_state` itself has not all the names DeepSpeed asks for.

    Args:
        tensor: the P ranks that share every layer, and therefore the tokens at an MoE layer's input.
        pipeline: one rank of every pipeline stage.
        model: the ranks that hold one copy of the model, tensor × pipeline; DeepSpeed sums gradient norms over it.
        data: the ranks that hold the same weights and see other samples.

    Source: `deepspeed.utils.groups.mpu` and `deepspeed.utils.bwc`, which read these names.
    """

    tensor: ProcessGroup
    pipeline: ProcessGroup
    model: ProcessGroup
    data: ProcessGroup

    @classmethod
    def from_parallel_state(cls) -> GridMpu:
        """The groups that `megatron.core.parallel_state` holds now.

        Raises:
            RuntimeError: model parallelism is not initialized.
            ValueError: context parallelism is on; DeepSpeed's engine and MoE have no place for it.
        """
        if not parallel_state.model_parallel_is_initialized():
            raise RuntimeError(
                "model parallelism is not initialized: call hp_plugin.initialize_head_dim_parallel(...) first, "
                "or let hp_plugin.deepspeed_adapter.engine.initialize do it"
            )
        context = parallel_state.get_context_parallel_world_size()
        if context > 1:
            raise ValueError(
                f"--context-parallel-size {context}: DeepSpeed would not reduce over the context-parallel ranks; "
                "train with context parallelism on Megatron's own optimizer and MoE"
            )
        return cls(
            tensor=parallel_state.get_tensor_model_parallel_group(),
            pipeline=parallel_state.get_pipeline_model_parallel_group(),
            model=parallel_state.get_model_parallel_group(),
            data=parallel_state.get_data_parallel_group(),
        )

    def get_tensor_model_parallel_group(self) -> ProcessGroup:
        """The P ranks of the grid."""
        return self.tensor

    def get_tensor_model_parallel_rank(self) -> int:
        """r of this rank in the grid."""
        return self.tensor.rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        """P."""
        return self.tensor.size()

    def get_tensor_model_parallel_src_rank(self) -> int:
        """The world's number of the grid's first rank."""
        return dist.get_global_rank(self.tensor, 0)

    def get_pipeline_model_parallel_group(self) -> ProcessGroup:
        """One rank of every stage."""
        return self.pipeline

    def get_pipeline_model_parallel_rank(self) -> int:
        """This rank's pipeline stage."""
        return self.pipeline.rank()

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Pipeline stages."""
        return self.pipeline.size()

    def get_model_parallel_group(self) -> ProcessGroup:
        """The ranks of one copy of the model."""
        return self.model

    def get_model_parallel_rank(self) -> int:
        """This rank's number in its copy of the model; names DeepSpeed's checkpoint files."""
        return self.model.rank()

    def get_model_parallel_world_size(self) -> int:
        """Ranks of one copy of the model."""
        return self.model.size()

    def get_data_parallel_group(self) -> ProcessGroup:
        """The ranks that hold the same weights."""
        return self.data

    def get_data_parallel_rank(self) -> int:
        """This rank's number among those that hold the same weights."""
        return self.data.rank()

    def get_data_parallel_world_size(self) -> int:
        """Copies of the model."""
        return self.data.size()

    def get_data_parallel_group_ranks(self) -> list[int]:
        """The world's numbers of the ranks that hold the same weights."""
        return dist.get_process_group_ranks(self.data)
