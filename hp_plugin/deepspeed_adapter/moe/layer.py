"""DeepSpeed-MoE as the MLP of a Megatron-Core transformer layer, on any tensor-parallel layout or grid.

Letters: s sequence, b micro-batch, D hidden size, P tensor-parallel ranks, k experts per token. The ranks of a TP group
hold the same tokens at the input; DeepSpeed routes them identically on each, lets every rank send a P-th of each
expert's slots, and gathers the results, so that every token meets its experts exactly once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hp_plugin.deepspeed_adapter.moe.checkpoint import sharded_moe_state
from hp_plugin.deepspeed_adapter.moe.expert import ExpertMaker, ExpertMLP, NumberedExperts
from hp_plugin.deepspeed_adapter.moe.gate import GridGate
from hp_plugin.deepspeed_adapter.moe.groups import check_mpu, register_expert_groups
from hp_plugin.deepspeed_adapter.moe.options import DeepSpeedMoEOptions, check_moe
from hp_plugin.upstream.moe_log import record_figure
from hp_plugin.upstream.spec_tree import parts


class DeepSpeedMoELayer(MoE):
    """`deepspeed.moe.layer.MoE` with Megatron's configuration, experts, groups, losses and checkpoints.

    Gating, capacity, dispatch and all-to-all are DeepSpeed's. Per layer and direction a rank trades k · s · b · D / P
    elements in the expert group (times the capacity factor) and gathers P times as many over its TP group.

    Args:
        config: the model's configuration; `num_moe_experts`, `moe_router_topk`, `moe_expert_capacity_factor`,
            `moe_aux_loss_coeff`, `moe_ffn_hidden_size` and the expert-parallel sizes are read from it.
        submodules: stock's own MoE submodules; the experts' linears are taken from them.
        options: what only DeepSpeed has.
        layer_number: number of the layer in the whole model, from 1, for the log.
        of_stock: what a release gives stock's layer beside (process groups, names), which this one has or needs not.

    Raises:
        ValueError: DeepSpeed-MoE cannot do what is asked for.
        RuntimeError: `parallel_state` was initialized with other expert sizes.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        options: DeepSpeedMoEOptions | None = None,
        layer_number: int | None = None,
        **of_stock: Any,
    ) -> None:
        options = options or DeepSpeedMoEOptions()
        check_moe(config, options, torch.distributed.get_world_size())
        _, linears = parts(submodules.experts)
        if not isinstance(linears, MLPSubmodules):
            raise ValueError("DeepSpeed-MoE runs one MLP per expert: build the layer spec without grouped GEMM")
        experts, ranks = config.num_moe_experts, config.expert_model_parallel_size
        expert_tensor = parallel_state.get_expert_tensor_parallel_group()
        wanted = config.expert_tensor_parallel_size or config.tensor_model_parallel_size
        if expert_tensor.size() != wanted:
            raise RuntimeError(
                f"the model has expert_tensor_parallel_size {wanted}, parallel_state {expert_tensor.size()}: give "
                "initialize_head_dim_parallel (initialize_model_parallel) the same expert_tensor_parallel_size"
            )
        register_expert_groups(f"ep_size_{ranks}", ranks)
        first = parallel_state.get_expert_model_parallel_rank() * (experts // ranks)
        build = NumberedExperts(
            partial(ExpertMLP, config, linears, expert_tensor), first, config.use_cpu_initialization
        )
        capacity = config.moe_expert_capacity_factor
        gate = dict(
            k=config.moe_router_topk,
            capacity_factor=capacity or 1.0,
            eval_capacity_factor=options.eval_capacity_factor or capacity or 1.0,
            min_capacity=options.min_capacity,
            noisy_gate_policy=options.noisy_gate_policy,
            drop_tokens=capacity is not None,
            # Where nobody is dropped there is nothing to select at random.
            use_rts=options.use_rts and capacity is not None,
            top2_2nd_expert_sampling=options.top2_2nd_expert_sampling,
        )
        super().__init__(
            config.hidden_size,
            ExpertMaker(build),
            num_experts=experts,
            ep_size=ranks,
            enable_expert_tensor_parallelism=expert_tensor.size() > 1,
            **gate,
        )
        self.config = config
        self.layer_number = layer_number
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.deepspeed_moe.gate = GridGate(config.hidden_size, experts, **gate)
        self._initialize_gate()
        self.set_deepspeed_parallelism()
        self._recompute = config.recompute_granularity == "selective" and "moe" in config.recompute_modules

    def _initialize_gate(self) -> None:
        """As stock's router: whole on every rank, in the model's dtype, from the generator that TP ranks share."""
        gate = self.deepspeed_moe.gate
        gate.to(dtype=self.config.params_dtype)
        if not self.config.use_cpu_initialization:
            gate.cuda()
        if self.config.perform_initialization:
            with torch.no_grad():
                self.config.init_method(gate.wg.weight)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Takes Megatron's expert groups; DeepSpeed's engine calls this again for every MoE layer it finds.

        Raises:
            ValueError: data before expert parallelism is asked for; Megatron orders its ranks otherwise.
        """
        if use_data_before_expert_parallel_:
            raise ValueError("use_data_before_expert_parallelism is not Megatron's order of ranks: leave it out")
        group = register_expert_groups(self.expert_group_name, self.ep_size)
        self.deepspeed_moe.ep_group = self.deepspeed_moe.gate.ep_group = group

    def set_layer_number(self, layer_number: int) -> None:
        """Called by the transformer layer."""
        self.layer_number = layer_number

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """`[s, b, D]` (`[s/P, b, D]` with sequence parallelism) to the same; there is no bias left to add.

        Raises:
            ValueError: a padding mask is given, which DeepSpeed would take for tokens to leave out.
            RuntimeError: DeepSpeed's mpu is not the model's.
        """
        if padding_mask is not None:
            raise ValueError("DeepSpeed-MoE routes padding like any token: it takes no padding mask")
        check_mpu(self.tensor_group)
        if self._recompute and self.training:
            return tensor_parallel.checkpoint(self._route, False, hidden_states), None
        return self._route(hidden_states), None

    def _route(self, hidden_states: Tensor) -> Tensor:
        # Every rank of the TP group computes with the whole gradient: gathering needs no reduction on the way back.
        split = self.config.sequence_parallel and self.tensor_group.size() > 1
        if split:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.tensor_group
            )
        output, loss, _ = super().forward(hidden_states)
        # DeepSpeed keeps it: with its graph attached the layer would hold itself, and never be freed.
        self.deepspeed_moe.l_aux = loss.detach()
        if self.training and torch.is_grad_enabled():
            output = self._with_aux_loss(output, loss)
        return scatter_to_sequence_parallel_region(output, group=self.tensor_group) if split else output

    def _with_aux_loss(self, output: Tensor, loss: Tensor) -> Tensor:
        """Puts the load-balancing loss into the backward pass, and it and the dropped share into Megatron's log."""
        self._log("dropped_token_share", self.deepspeed_moe.gate.dropped)
        coefficient = self.config.moe_aux_loss_coeff
        if self.config.moe_router_load_balancing_type == "none" or coefficient == 0:
            return output
        self._log("load_balancing_loss", loss)
        # Megatron then divides all gradients by the number of tokens; a mean over tokens has been divided already.
        tokens = output.shape[0] * output.shape[1] if self.config.calculate_per_token_loss else 1
        return MoEAuxLossAutoScaler.apply(output, loss * coefficient * tokens)

    def _log(self, name: str, value: Tensor) -> None:
        layers = self.config.num_layers + (self.config.mtp_num_layers or 0)
        # Equal on all ranks of the TP group already: only the copies of the model are left to average.
        copies = parallel_state.get_data_parallel_group()
        record_figure(name, value.detach(), self.layer_number, layers, copies)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Stock Megatron MoE's keys and global tensors, whatever the grid and the expert group."""
        return sharded_moe_state(self, prefix, sharded_offsets, metadata)
