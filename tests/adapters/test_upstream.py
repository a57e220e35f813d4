"""Where releases of Megatron-Core differ: every seam on the installed release, and in the shape of the others."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, model_parallel_cuda_manual_seed
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from hp_plugin import cpu_backend
from hp_plugin.attention.model_check import check_attention
from hp_plugin.attention.registration import initialize_on_grid
from hp_plugin.attention.self_attention import HeadDimSelfAttention
from hp_plugin.attention.specs import head_dim_spec
from hp_plugin.attention.transformer_config import unsupported
from hp_plugin.checkpoint import checks
from hp_plugin.config import HeadDimConfig
from hp_plugin.deepspeed_adapter.moe.layer import DeepSpeedMoELayer
from hp_plugin.deepspeed_adapter.moe.megatron_lm import use_deepspeed_moe
from hp_plugin.deepspeed_adapter.moe.model_check import check_mixtures
from hp_plugin.deepspeed_adapter.moe.specs import deepspeed_moe_spec
from hp_plugin.upstream import checkpoint_format
from hp_plugin.upstream.moe_log import forget_figures, record_figure, recorded_figures
from hp_plugin.upstream.spec_tree import Replacement, build, parts, with_replacements
from tests.adapters.moe_cases import deepspeed_forgotten
from tests.ranks import Ranks


class Stock:
    """A module class of upstream's."""

    def __init__(self, **given: Any) -> None:
        self.given = given

    @classmethod
    def as_submodule(cls, **given: Any) -> Stock:
        return cls(**given)


class Ours(Stock):
    """What is to stand in its place."""


class Other(Stock):
    """Another class of upstream's, which is left alone."""


@dataclass
class Submodules:
    """What a layer is made of, as upstream's dataclasses say it."""

    first: Any = None
    second: Any = None


REPLACED = {Stock: Replacement(Ours, {"option": 1})}


@pytest.mark.parametrize(
    "spec",
    [
        ModuleSpec(module=Stock, params={"width": 2}),
        partial(Stock, width=2),
        Submodules(first=partial(Stock, width=2)).first,
    ],
    ids=["as up to 0.17", "as from 0.18 on", "taken out of its parent"],
)
def test_a_class_is_replaced_with_what_it_was_given(spec: Any) -> None:
    built = build(with_replacements(spec, REPLACED), config="c")
    assert type(built) is Ours and built.given == {"width": 2, "option": 1, "config": "c"}


@pytest.mark.parametrize(
    "around",
    [
        lambda inner: ModuleSpec(module=Other, submodules=Submodules(first=inner, second=Other)),
        lambda inner: partial(Other, submodules=Submodules(first=inner, second=Other)),
        lambda inner: Submodules(first=[Other, Submodules(second=inner)]),
        lambda inner: partial(Other, inner),
    ],
    ids=["ModuleSpec", "partial", "list", "positional"],
)
@pytest.mark.parametrize("shape", [Stock, partial(Stock), ModuleSpec(module=Stock)], ids=["class", "partial", "spec"])
def test_it_is_found_however_deep_it_stands(around: Any, shape: Any) -> None:
    spec = around(shape)
    before = repr(spec)
    swapped = with_replacements(spec, {Stock: Replacement(Ours)})
    assert swapped is not spec and repr(spec) == before
    assert "Ours" in repr(swapped) and "Stock'" not in repr(swapped) and "Stock," not in repr(swapped)


def test_a_class_is_found_behind_its_own_method() -> None:
    swapped = with_replacements(partial(Stock.as_submodule, width=2), {Stock: Replacement(Ours)})
    built = build(swapped, config="c")
    assert type(built) is Ours and built.given == {"width": 2, "config": "c"}
    assert parts(swapped)[0] is Ours


def test_where_nothing_is_replaced_the_tree_is_the_very_same() -> None:
    spec = ModuleSpec(module=Other, submodules=Submodules(first=partial(Other, inner=[Other]), second=(Other,)))
    assert with_replacements(spec, REPLACED) is spec


def test_the_parts_of_the_installed_releases_mixture_are_found() -> None:
    mixture = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False).submodules.mlp
    module, submodules = parts(mixture)
    assert module is MoELayer
    assert parts(submodules.experts)[1].linear_fc1 is not None


def test_the_parts_of_the_installed_releases_mlp_are_found() -> None:
    module, submodules = parts(get_gpt_layer_local_spec().submodules.mlp)
    assert module is MLP and submodules.linear_fc1 is ColumnParallelLinear


def mixture_config(**given: Any) -> TransformerConfig:
    sizes = dict(num_layers=2, hidden_size=16, num_attention_heads=4, num_moe_experts=2, use_cpu_initialization=True)
    return TransformerConfig(
        **sizes, moe_router_topk=1, moe_router_pre_softmax=True, add_bias_linear=False, moe_ffn_hidden_size=16, **given
    )


def model_of(config: TransformerConfig, spec: Any) -> GPTModel:
    return GPTModel(config, spec, vocab_size=32, max_sequence_length=8)


def said_of_mixtures() -> list[str]:
    """What is said of models with Megatron's mixture, DeepSpeed's, and none, in this order."""
    cpu_backend.enable()
    with deepspeed_forgotten():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        config = mixture_config()
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
        dense = get_gpt_layer_local_spec()
        ours = model_of(config, deepspeed_moe_spec(spec))
        assert sum(isinstance(module, DeepSpeedMoELayer) for module in ours.modules()) == 2
        said = []
        for model in (model_of(config, spec), ours, model_of(config, dense)):
            try:
                check_mixtures(model, config)
                said.append("")
            except RuntimeError as refusal:
                said.append(str(refusal))
        return said


def test_a_built_model_is_asked_whose_mixtures_it_has(ranks: Ranks) -> None:
    ((theirs, ours, none),) = ranks.run(1, said_of_mixtures)
    assert "2 mixtures of experts were built as Megatron's (decoder.layers.0.mlp)" in theirs
    assert ours == ""
    assert "layers [1, 2] are to be mixtures of 2 experts" in none


def built_behind_the_launchers_back() -> list[str]:
    """What the launcher's replacement says of mixtures that no spec of a GPT model names."""
    cpu_backend.enable()
    stock = GPTModel.__init__, MoELayer.__init__
    try:
        with deepspeed_forgotten():
            use_deepspeed_moe()
            parallel_state.initialize_model_parallel()
            model_parallel_cuda_manual_seed(1)
            config = mixture_config()
            spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
            model = model_of(config, spec)
            assert sum(isinstance(module, DeepSpeedMoELayer) for module in model.modules()) == 2
            said = []
            for attempt in (
                lambda: build(spec.layer_specs[0].submodules.mlp, config=config),
                lambda: model_of(config, get_gpt_layer_local_spec()),
            ):
                try:
                    attempt()
                except RuntimeError as refusal:
                    said.append(str(refusal))
            return said
    finally:
        GPTModel.__init__, MoELayer.__init__ = stock  # type: ignore[method-assign]


def test_the_launcher_lets_no_other_mixture_be_built(ranks: Ranks) -> None:
    ((alone, none),) = ranks.run(1, built_behind_the_launchers_back)
    assert "builds Megatron's MoELayer outside the layer specs of a GPT model" in alone
    assert "the model was built with none" in none


def test_a_built_model_is_asked_whether_its_attention_is_on_the_grid() -> None:
    # As a spec would leave it that hides a layer where `head_dim_spec` does not look.
    stray, ours = (torch.nn.Module.__new__(kind) for kind in (SelfAttention, HeadDimSelfAttention))
    for module in (stray, ours):
        torch.nn.Module.__init__(module)
    check_attention(torch.nn.ModuleDict({"one": ours}))
    with pytest.raises(RuntimeError, match=r"1 of 2 attention layers were built off the grid \(two\)"):
        check_attention(torch.nn.ModuleDict({"one": ours, "two": stray}))


def test_the_installed_releases_attention_is_replaced_in_its_specs() -> None:
    layers = {"dense": get_gpt_layer_local_spec(), "mixture": get_gpt_layer_local_spec(num_experts=2)}
    for spec in (*layers.values(), Submodules(first=list(layers.values()))):
        swapped = head_dim_spec(spec, mixture_config())
        assert "HeadDimSelfAttention" in repr(swapped) and "attention.SelfAttention" not in repr(swapped)


def log_and_read() -> dict[str, float]:
    cpu_backend.enable()
    parallel_state.initialize_model_parallel()
    copies = parallel_state.get_data_parallel_group()
    for layer in (1, 2):
        record_figure("load_balancing_loss", torch.tensor(1.0 * layer), layer, 2, copies)
        record_figure("dropped_token_share", torch.tensor(0.5), layer, 2, copies)
    read = recorded_figures(["load_balancing_loss", "dropped_token_share"], 1, 2, 1)
    record_figure("load_balancing_loss", torch.tensor(8.0), 1, 2, copies)
    forget_figures()
    return read | {"after": recorded_figures(["load_balancing_loss"], 1, 2, 1)["load_balancing_loss"]}


def test_figures_of_a_mixture_are_read_whatever_their_name_ends_in(ranks: Ranks) -> None:
    (read,) = ranks.run(1, log_and_read)
    assert read == {"load_balancing_loss": 1.5, "dropped_token_share": 0.5, "after": 0.0}


@pytest.mark.parametrize(
    ("keys", "common_file", "reads", "said"),
    [
        (["common_state/shard_0_1"], False, True, None),
        (["common_state/shard_0_1"], False, False, "Megatron-Core 0.19 and newer write it, and this is"),
        (["embedding.weight"], True, False, None),
        (["embedding.weight"], False, True, r"common\.pt is missing"),
        ([], True, True, r"metadata\.json is missing"),
    ],
    ids=["0.19 in 0.19", "0.19 in 0.16", "0.16", "neither", "no metadata"],
)
def test_the_common_state_is_looked_for_where_the_checkpoint_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: list[str], common_file: bool, reads: bool, said: str | None
) -> None:
    index = Metadata(state_dict_metadata={key: BytesStorageMetadata() for key in keys}, storage_data={})
    torch.save([{"iteration": 1}], tmp_path / "__0_0.distcp")
    place = _StorageInfo("__0_0.distcp", 0, (tmp_path / "__0_0.distcp").stat().st_size)
    index.storage_data = {MetadataIndex(key): place for key in keys}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    monkeypatch.setattr(checks, "reads_sharded_common_state", lambda: reads)
    if keys:
        (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    if common_file:
        torch.save({}, tmp_path / "common.pt")
    if said is None:
        checks.check_files(tmp_path)
        return
    with pytest.raises(ValueError, match=said):
        checks.check_files(tmp_path)


def test_the_installed_release_is_asked_by_feature() -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import serialization

    # The name under which 0.19 reads both kinds; it is private, so the seam itself goes by the public signature.
    assert checkpoint_format.reads_sharded_common_state() == hasattr(serialization, "_legacy_common_state_exists")
    taken = dist_checkpointing.save.__code__.co_varnames
    assert set(checkpoint_format.own_queue()) <= set(taken)


def said_of_gtp() -> str:
    def initialize_model_parallel(tensor_model_parallel_size: int = 1, gtp_remat_size: int = 1) -> None:
        raise AssertionError("no group may be made")

    with pytest.raises(ValueError) as refusal:
        initialize_on_grid(initialize_model_parallel, "1,1", gtp_remat_size=2)
    return str(refusal.value)


def test_gtp_is_refused_on_a_grid_before_groups_are_made(ranks: Ranks) -> None:
    assert ranks.run(1, said_of_gtp) == ["gtp_remat_size 2: GTP shards weights across the grid's pieces; leave it out"]
    config = SimpleNamespace(expert_gtp_weight_remat_size=2, num_attention_heads=4, num_query_groups=4)
    (said,) = unsupported(config, HeadDimConfig(4, 1))
    assert "expert_gtp_weight_remat_size 2: GTP" in said.text
    assert unsupported(SimpleNamespace(gtp_weight_remat_size=1), HeadDimConfig(4, 1)) == []
