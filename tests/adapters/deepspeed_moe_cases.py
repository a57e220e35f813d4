"""A small GPT with a mixture of experts, trained by DeepSpeed's engine; bodies for the ranks of a test."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

from hp_plugin import head_dim_spec
from hp_plugin.attention.transformer_config import HeadDimTransformerConfig
from hp_plugin.config import HeadDimConfig
from hp_plugin.deepspeed_adapter.moe.specs import deepspeed_moe_spec
from hp_plugin.training.initialization import initialize_parameters, named_global_parameters, owned_indices
from tests.adapters.deepspeed_cases import DeepSpeedCase, deepspeed_rank, run_step, settings_of
from tests.adapters.moe_cases import deepspeed_forgotten
from tests.dist.gpt import SEQUENCE, VOCABULARY


@dataclass(frozen=True)
class MixtureCase(DeepSpeedCase):
    """A dense layer and a mixture, on a grid, under DeepSpeed's engine."""

    experts: int = 4
    ep: int = 4
    etp: int = 1
    k: int = 1
    bias: bool = True


@dataclass
class MixtureOutcome:
    """Values per step, and this rank's parts of the parameters: tensor, axis and global indices by global name."""

    losses: list[float]
    grad_norms: list[float]
    balance: list[float]
    parts: dict[str, tuple[torch.Tensor, int | None, list[int]]]


def build_mixture(case: MixtureCase, megatron: bool = False) -> GPTModel:
    """The bare model, from weights that depend on no layout; `megatron` leaves Megatron's own mixture in it."""
    config = HeadDimTransformerConfig(
        head_dim_parallel=HeadDimConfig(case.m, case.n, case.exchange),
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.2,
        params_dtype=case.dtype,
        bf16=case.dtype is torch.bfloat16,
        attention_softmax_in_fp32=True,
        gradient_accumulation_fusion=False,
        add_bias_linear=case.bias,
        num_moe_experts=case.experts,
        moe_ffn_hidden_size=48,
        moe_layer_freq=[0, 1],
        moe_router_topk=case.k,
        moe_router_pre_softmax=case.k == 1,
        moe_aux_loss_coeff=0.3,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=case.etp,
        **case.model,
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    model = GPTModel(
        config,
        head_dim_spec(spec if megatron else deepspeed_moe_spec(spec), config),
        VOCABULARY,
        SEQUENCE,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    model.model_type = ModelType.encoder_or_decoder
    for parameter in model.parameters():
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    initialize_parameters([model], config, 5)
    return model


def start_mixture(case: MixtureCase) -> Any:
    """The engine, as a user starts it; expert sizes are Megatron's to know."""
    from hp_plugin.deepspeed_adapter.engine import initialize, initialize_grid

    settings = settings_of(case)
    initialize_grid(settings, expert_model_parallel_size=case.ep, expert_tensor_parallel_size=case.etp)
    tensor_parallel.model_parallel_cuda_manual_seed(123)
    return initialize(model=build_mixture(case), config=settings)[0]


def run_mixture(engine: Any, steps: range) -> MixtureOutcome:
    """Trains these steps."""
    outcome = MixtureOutcome([], [], [], {})
    for step in steps:
        get_moe_layer_wise_logging_tracker().clear()
        outcome.losses.append(run_step(engine, step))
        outcome.grad_norms.append(float(engine.get_global_grad_norm() or 0.0))
        logged = get_moe_layer_wise_logging_tracker()["load_balancing_loss"]
        # A sum over the step's micro-batches; the copies of the model are averaged when it is printed.
        total = logged["values"].sum() / engine.gradient_accumulation_steps()
        dist.all_reduce(total, group=logged["avg_group"])
        outcome.balance.append(float(total) / logged["avg_group"].size())
    outcome.parts = parts_of(engine.module)
    return outcome


def parts_of(model: GPTModel) -> dict[str, tuple[torch.Tensor, int | None, list[int]]]:
    """What this rank holds of every parameter."""
    parts = {}
    tensor = parallel_state.get_tensor_model_parallel_group()
    expert = parallel_state.get_expert_tensor_parallel_group()
    for name, module, parameter in named_global_parameters(model):
        group = expert if ".mlp.experts." in name else tensor
        axis, owned = owned_indices(name, module, parameter, model.config, group.rank(), group.size())
        parts[name] = (parameter.detach().float().clone(), axis, owned.tolist())
    return parts


def whole(found: list[MixtureOutcome]) -> dict[str, torch.Tensor]:
    """The global tensors from the parts of all ranks, which must agree bit for bit wherever several hold the same."""
    pieces: dict[str, dict[tuple[int, ...], torch.Tensor]] = {}
    axes: dict[str, int | None] = {}
    for one in found:
        for name, (tensor, axis, owned) in one.parts.items():
            axes[name] = axis
            first = pieces.setdefault(name, {}).setdefault(tuple(owned), tensor)
            assert torch.equal(first, tensor), f"{name} differs between ranks that hold the same part"
    joined = {}
    for name, held in pieces.items():
        axis = axes[name]
        if axis is None:
            (joined[name],) = held.values()
            continue
        order = torch.tensor([index for owned in held for index in owned])
        joined[name] = torch.cat(list(held.values()), axis).index_select(axis, order.argsort())
    return joined


def train_mixture(case: MixtureCase) -> MixtureOutcome:
    """Trains `case.steps` steps from the case's configuration."""
    with deepspeed_forgotten(), deepspeed_rank():
        return run_mixture(start_mixture(case), range(case.steps))


def save_and_resume(case: MixtureCase, folder: str) -> tuple[MixtureOutcome, MixtureOutcome]:
    """Two steps, a checkpoint and two more; then the same last two by another engine that loads it."""
    with deepspeed_forgotten(), deepspeed_rank():
        engine = start_mixture(case)
        run_mixture(engine, range(2))
        engine.save_checkpoint(folder)
        straight = run_mixture(engine, range(2, 4))
        other = start_mixture(case)
        for parameter in other.module.parameters():
            parameter.data.zero_()
        path, _ = other.load_checkpoint(folder)
        assert path is not None
        return straight, run_mixture(other, range(2, 4))


def refusal(case: MixtureCase, scenario: str) -> str:
    """What the ValueError that `initialize` answers a mixture with says."""
    from hp_plugin.deepspeed_adapter.engine import initialize, initialize_grid

    with deepspeed_forgotten(), deepspeed_rank():
        settings = settings_of(case)
        initialize_grid(settings, expert_model_parallel_size=case.ep, expert_tensor_parallel_size=case.etp)
        tensor_parallel.model_parallel_cuda_manual_seed(123)
        model = build_mixture(case, megatron=scenario == "Megatron's")
        try:
            initialize(model=model, config=settings)
        except ValueError as mistake:
            return str(mistake)
        return "nothing was refused"


def move_weights(saved: MixtureCase, loaded: MixtureCase, folder: str) -> tuple[MixtureOutcome, MixtureOutcome]:
    """What an engine trained and saved, and what a model on another grid holds after loading it."""
    from hp_plugin.deepspeed_adapter.engine import initialize_grid
    from hp_plugin.deepspeed_adapter.weights import load_weights, save_weights

    with deepspeed_forgotten(), deepspeed_rank():
        engine = start_mixture(saved)
        theirs = run_mixture(engine, range(1))
        save_weights(engine, folder)
        parallel_state.destroy_model_parallel()
        sizes = {"expert_model_parallel_size": loaded.ep, "expert_tensor_parallel_size": loaded.etp}
        initialize_grid(settings_of(loaded), **sizes)
        model = build_mixture(loaded)
        load_weights(model, folder)
        return theirs, MixtureOutcome([], [], [], parts_of(model))
