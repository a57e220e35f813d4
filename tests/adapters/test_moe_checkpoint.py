"""MoE weights are stock's global tensors: what one expert group saved, another one, and Megatron's MoE, load."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from hp_plugin.upstream import spec_tree
from tests.adapters.moe_cases import Case, build, config, deepspeed_forgotten, whole_names
from tests.ranks import Ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:When using expert parallelism and tensor parallelism:UserWarning:megatron"),
    # What saving and loading says by itself in torch 2.13.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def save_and_load(saved: Case, loaded: Case, folder: str) -> float:
    """Saves with one expert group, loads with another into other weights; the largest difference from what is due."""
    with deepspeed_forgotten():
        model = build(saved, grid=True)
        dist_checkpointing.save(model.layer.sharded_state_dict("mlp."), folder)
        parallel_state.destroy_model_parallel()

        model = build(loaded, grid=True)
        wanted = {name: parameter.detach().clone() for name, parameter in whole_names(model.layer).items()}
        with torch.no_grad():
            for parameter in model.layer.parameters():
                parameter.zero_()
        state = dist_checkpointing.load(model.layer.sharded_state_dict("mlp."), folder)
        model.layer.load_state_dict({name.removeprefix("mlp."): value for name, value in state.items()})
        found = whole_names(model.layer)
        return max((found[name] - wanted[name]).abs().max().item() for name in wanted)


def load_by_megatron(saved: Case, folder: str) -> float:
    """Saves DeepSpeed-MoE from a grid and loads it into stock's MoELayer on one rank."""
    with deepspeed_forgotten():
        model = build(saved, grid=True)
        dist_checkpointing.save(model.layer.sharded_state_dict("mlp."), folder)
        parallel_state.destroy_model_parallel()

        wanted: dict[str, Any] = whole_names(build(saved, grid=False).layer)
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(expert_tensor_parallel_size=1)
        model_parallel_cuda_manual_seed(11)
        spec = get_gpt_layer_local_spec(num_experts=saved.experts, moe_grouped_gemm=False).submodules.mlp
        layer = spec_tree.build(spec, config=config(saved, grid=False))
        state = dist_checkpointing.load(layer.sharded_state_dict("mlp."), folder)
        layer.load_state_dict({name.removeprefix("mlp."): value for name, value in state.items()})
        found = {"gate": layer.router.weight}
        for number, expert in enumerate(layer.experts.local_experts):
            found |= {f"{number}.{name}": parameter for name, parameter in expert.named_parameters()}
        assert found.keys() == wanted.keys()
        return max((found[name] - wanted[name]).abs().max().item() for name in wanted)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (Case(ep=4), Case(ep=2)),
        (Case(ep=2, gated=True), Case(m=4, n=1, ep=4, gated=True)),
        (Case(ep=1, etp=4, bias=False, gated=True), Case(ep=4, bias=False, gated=True)),
        (Case(ep=4, bias=False), Case(ep=1, etp=4, bias=False)),
    ],
    ids=lambda case: case.label,
)
def test_any_expert_group_loads_what_any_other_saved(ranks: Ranks, tmp_path: Path, saved: Case, loaded: Case) -> None:
    assert ranks.run(4, save_and_load, saved, loaded, str(tmp_path)) == [0.0] * 4


@pytest.mark.parametrize("saved", [Case(ep=2, gated=True, bias=False)], ids=lambda case: case.label)
def test_megatrons_own_moe_loads_it(ranks: Ranks, tmp_path: Path, saved: Case) -> None:
    assert ranks.run(4, load_by_megatron, saved, str(tmp_path)) == [0.0] * 4
