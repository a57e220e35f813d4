"""One DeepSpeed-MoE layer on a grid under Megatron's DDP, beside one rank with the same weights and tokens."""

from __future__ import annotations

import multiprocessing
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import comm
from deepspeed.utils import groups
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from hp_plugin import cpu_backend
from hp_plugin.attention.registration import initialize_head_dim_parallel
from hp_plugin.attention.transformer_config import HeadDimTransformerConfig
from hp_plugin.config import HeadDimConfig
from hp_plugin.deepspeed_adapter.moe.layer import DeepSpeedMoELayer
from hp_plugin.deepspeed_adapter.moe.options import DeepSpeedMoEOptions
from hp_plugin.deepspeed_adapter.moe.specs import deepspeed_moe_spec
from hp_plugin.upstream import spec_tree


@dataclass(frozen=True)
class Case:
    """A grid, the experts on it and the tokens of every data-parallel rank."""

    m: int = 2
    n: int = 2
    experts: int = 4
    ep: int = 4
    etp: int = 1
    k: int = 1
    capacity: float | None = None
    sequence_parallel: bool = False
    gated: bool = False
    bias: bool = True
    aux: float = 0.3
    s: int = 8
    b: int = 3
    hidden: int = 12
    width: int = 20
    options: tuple[tuple[str, Any], ...] = ()
    model: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        parts = [f"{self.m}x{self.n}", f"e{self.experts}", f"ep{self.ep}", f"k{self.k}"]
        parts += [f"etp{self.etp}"] if self.etp > 1 else []
        parts += [f"c{self.capacity}"] if self.capacity is not None else []
        parts += ["sp"] if self.sequence_parallel else []
        parts += ["gated"] if self.gated else []
        parts += [] if self.bias else ["no-bias"]
        return "-".join([*parts, *(f"{k}={v}" for k, v in self.options + self.model)])


@contextmanager
def deepspeed_forgotten() -> Iterator[None]:
    """DeepSpeed's globals must not outlive the groups of a job."""
    cpu_backend.enable()
    # Megatron-Core writes checkpoints from processes of its own, which multiprocessing denies to the harness' daemons.
    multiprocessing.current_process()._config["daemon"] = False
    try:
        yield
    finally:
        groups._release_process_group_references()
        comm.comm.cdb = None
        MoEAuxLossAutoScaler.main_loss_backward_scale = None


def config(case: Case, grid: bool) -> TransformerConfig:
    common: dict[str, Any] = dict(
        num_layers=2,
        hidden_size=case.hidden,
        num_attention_heads=4,
        kv_channels=4,
        ffn_hidden_size=case.width + 4,
        moe_ffn_hidden_size=case.width,
        num_moe_experts=case.experts,
        moe_router_topk=case.k,
        moe_router_pre_softmax=case.k == 1,
        moe_aux_loss_coeff=case.aux,
        moe_expert_capacity_factor=case.capacity,
        add_bias_linear=case.bias,
        gated_linear_unit=case.gated,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        **dict(case.model),
    )
    if not grid:
        return TransformerConfig(**common, expert_tensor_parallel_size=1)
    return HeadDimTransformerConfig(
        **common,
        head_dim_parallel=HeadDimConfig(case.m, case.n),
        tensor_model_parallel_size=case.m * case.n,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=case.etp,
        sequence_parallel=case.sequence_parallel,
    )


class Model(MegatronModule):
    """A model of one MoE layer, as far as Megatron's DDP and gradient finalization look at it."""

    def __init__(self, case: Case, own: TransformerConfig) -> None:
        super().__init__(own)
        spec = get_gpt_layer_local_spec(num_experts=case.experts, moe_grouped_gemm=False)
        spec = deepspeed_moe_spec(spec, DeepSpeedMoEOptions(**dict(case.options)))
        self.layer: DeepSpeedMoELayer = spec_tree.build(spec.submodules.mlp, config=own)
        self.layer.set_layer_number(1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.layer(hidden_states)[0]


def build(case: Case, grid: bool) -> Model:
    """The layer on a grid, or on every rank by itself, from the same weights."""
    if grid:
        sizes = {"expert_model_parallel_size": case.ep, "expert_tensor_parallel_size": case.etp}
        initialize_head_dim_parallel(HeadDimConfig(case.m, case.n), **sizes)
    else:
        parallel_state.initialize_model_parallel(expert_tensor_parallel_size=1)
    model_parallel_cuda_manual_seed(7)
    model = Model(case, config(case, grid))
    with torch.no_grad():
        for name, parameter in whole_names(model.layer).items():
            parameter.copy_(part(case, name, parameter, grid))
    return model


def whole_names(layer: DeepSpeedMoELayer) -> dict[str, nn.Parameter]:
    """Parameters under names that number the experts of the whole layer."""
    first = parallel_state.get_expert_model_parallel_rank() * layer.num_local_experts
    named = {"gate": layer.deepspeed_moe.gate.wg.weight}
    for number, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
        named |= {f"{first + number}.{name}": parameter for name, parameter in expert.named_parameters()}
    return named


def part(case: Case, name: str, parameter: Tensor, grid: bool) -> Tensor:
    """What this rank holds of a parameter that is drawn whole, by its name."""
    axis = split_axis(name) if grid and case.etp > 1 else None
    shape = list(parameter.shape)
    if axis is not None:
        shape[axis] *= case.etp
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return cut(case, name, 0.5 * whole, axis)


def cut(case: Case, name: str, whole: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return whole
    rank = parallel_state.get_expert_tensor_parallel_rank()
    halves = whole.chunk(2) if case.gated and "linear_fc1" in name else (whole,)
    return torch.cat([half.chunk(case.etp, axis)[rank] for half in halves], axis)


def split_axis(name: str) -> int | None:
    if "linear_fc1" in name:
        return 0
    return 1 if name.endswith("linear_fc2.weight") else None


def tokens(case: Case, replica: int) -> tuple[Tensor, Tensor]:
    """Input and output weights `[s, b, D]` of one data-parallel rank."""
    generator = torch.Generator().manual_seed(100 + replica)
    shape = (2, case.s, case.b, case.hidden)
    return tuple(torch.randn(shape, generator=generator))  # type: ignore[return-value]


@dataclass
class Result:
    output: Tensor
    grad_input: Tensor
    grads: dict[str, Tensor]
    dropped: float


def reference(case: Case, replicas: int) -> tuple[list[Result], dict[str, Tensor]]:
    """One rank, once for every data-parallel rank's tokens; and the mean of the gradients."""
    model = build(case, grid=False)
    results = []
    for replica in range(replicas):
        model.zero_grad()
        model_parallel_cuda_manual_seed(7)  # data-parallel ranks share their random numbers
        inputs, weights = tokens(case, replica)
        inputs.requires_grad_()
        output = model(inputs)
        (output * weights).sum().backward()
        grads = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in whole_names(model.layer).items()
        }
        dropped = float(model.layer.deepspeed_moe.gate.dropped)
        results.append(Result(output.detach(), inputs.grad, grads, dropped))
    mean = {name: sum(r.grads[name] for r in results) / replicas for name in results[0].grads}
    parallel_state.destroy_model_parallel()
    return results, mean


def on_grid(case: Case) -> tuple[Model, Result]:
    """The grid's layer under Megatron's DDP, with gradients as its optimizer would see them."""
    model = build(case, grid=True)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    inputs, weights = (tensor[own_rows(case)] for tensor in tokens(case, parallel_state.get_data_parallel_rank()))
    inputs = inputs.clone().requires_grad_()
    output = wrapped(inputs)
    (output * weights).sum().backward()
    finalize_model_grads([wrapped])
    grads = {name: p.main_grad.clone() for name, p in whole_names(model.layer).items()}
    return model, Result(output.detach(), inputs.grad, grads, float(model.layer.deepspeed_moe.gate.dropped))


def journeys(case: Case) -> tuple[list[tuple[int, int]], list[tuple[int, int]], float]:
    """Sends numbered tokens through experts that multiply by their own number plus one.

    Returns:
        What this rank's experts met, as (expert, token) pairs of the whole world; what the gate chose on this rank,
        computed by hand; and the largest difference of the layer's output from that choice carried out by hand.
    """
    with deepspeed_forgotten(), torch.no_grad():
        model = build(case, grid=True).eval()
        layer = model.layer
        first = parallel_state.get_expert_model_parallel_rank() * layer.num_local_experts
        met: list[tuple[int, int]] = []

        def multiply(number: int, slots: Tensor) -> Tensor:
            # Channel 0 carries the number of the token, from 1: empty slots are 0.
            met.extend((number, int(token)) for token in slots[..., 0].flatten() if token)
            return slots * (number + 1)

        for local, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            expert.forward = partial(multiply, first + local)
        replica, count = parallel_state.get_data_parallel_rank(), case.s * case.b
        whole, _ = tokens(case, replica)
        numbers = torch.arange(1, count + 1) + replica * count
        whole[..., 0] = numbers.view(case.s, case.b)
        layer.deepspeed_moe.gate.wg.weight[:, 0] = 0
        output = model(whole[own_rows(case)])

        flat = whole.flatten(0, 1)
        weights, chosen = (flat @ layer.deepspeed_moe.gate.wg.weight.t()).softmax(-1).topk(case.k)
        if case.k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        expected = flat * (weights * (chosen + 1)).sum(-1, keepdim=True)
        error = (output - expected.view(whole.shape)[own_rows(case)]).abs().max().item()
        wanted = [(int(e), int(t)) for t, row in zip(numbers, chosen, strict=True) for e in row]
        if parallel_state.get_expert_tensor_parallel_rank() > 0:
            met = []  # the ranks of an expert tensor group hold slices of the same experts
        if parallel_state.get_tensor_model_parallel_rank() > 0:
            wanted = []  # and those of a TP group the same tokens
        parallel_state.destroy_model_parallel()
        return met, wanted, error


def own_rows(case: Case) -> slice:
    """The tokens this rank holds at the layer's input."""
    if not case.sequence_parallel:
        return slice(None)
    size, rank = case.s // (case.m * case.n), parallel_state.get_tensor_model_parallel_rank()
    return slice(rank * size, (rank + 1) * size)


def differences(case: Case) -> dict[str, float]:
    """Largest difference over largest reference value, for the output and every gradient of this rank."""
    with deepspeed_forgotten():
        results, mean = reference(case, dist.get_world_size() // (case.m * case.n))
        _, found = on_grid(case)
        expected = results[parallel_state.get_data_parallel_rank()]
        rows = own_rows(case)
        said = {
            "output": relative(found.output, expected.output[rows]),
            "input": relative(found.grad_input, expected.grad_input[rows]),
            "dropped": abs(found.dropped - expected.dropped),
        }
        for name, grad in found.grads.items():
            axis = split_axis(name) if case.etp > 1 else None
            said[name] = relative(grad, cut(case, name, mean[name], axis), mean[name].abs().max().item())
        said["share"] = expected.dropped
        parallel_state.destroy_model_parallel()
        return said


def relative(found: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """Largest difference over largest reference value."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} instead of {tuple(expected.shape)}"
    scale = expected.abs().max().item() if scale is None else scale
    difference = (found - expected).abs().max().item()
    return difference / scale if scale > 0 else difference
