"""The plugin's flags as Megatron-LM's parser gives them: what is read, set and refused, without a checkout."""

from __future__ import annotations

import argparse
import copy
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.transformer_config import TransformerConfig

from hp_plugin import launch
from hp_plugin.config import HeadDimConfig
from hp_plugin.cpu_backend import megatron_lm as cpu_backend_of_megatron_lm
from hp_plugin.cpu_backend.megatron_lm import refuse_uneven_gathers
from hp_plugin.deepspeed_adapter.moe import megatron_lm as use_of_deepspeed
from hp_plugin.megatron_lm import flags, hooks
from hp_plugin.megatron_lm.argument_hooks import ArgumentHooks
from hp_plugin.megatron_lm.checkpoint_hooks import CheckpointHooks
from hp_plugin.megatron_lm.model_hooks import ModelHooks, on_grid
from hp_plugin.megatron_lm.releases import known

# What the plugin reads of Megatron-LM's arguments, and their defaults there.
STOCK: dict[str, Any] = dict(
    tensor_model_parallel_size=1,
    pipeline_model_parallel_size=1,
    context_parallel_size=1,
    world_size=8,
    rank=0,
    num_attention_heads=12,
    num_query_groups=1,
    group_query_attention=False,
    kv_channels=None,
    hidden_size=240,
    micro_batch_size=6,
    seq_length=48,
    position_embedding_type="rope",
    use_rotary_position_embeddings=False,
    rotary_percent=1.0,
    transformer_impl="local",
    optimizer="adam",
    qk_layernorm=False,
    normalization="LayerNorm",
    rotary_interleaved=False,
)

LATENT = {
    **{"multi_latent_attention": True, "q_lora_rank": None, "kv_lora_rank": 512, "qk_head_dim": 128},
    **{"qk_pos_emb_head_dim": 64, "v_head_dim": 128, "rope_type": "rope", "apply_rope_fusion": True},
}


def settled(command: str, **given: Any) -> argparse.Namespace:
    """Megatron-LM's arguments after the plugin has looked at them."""
    parser = flags.add_arguments(argparse.ArgumentParser())
    parser.add_argument(flags.TP_FLAG, type=int, default=1)
    words = command.split()
    args = argparse.Namespace(**(STOCK | given))
    parser.parse_args(words, namespace=args)
    args.read = flags.settle(args, words)
    return args


def test_a_grid_sets_the_tensor_parallel_size_and_is_recorded() -> None:
    args = settled("--head-dim-parallel 2,4 --head-dim-exchange sequence", num_attention_heads=12, kv_channels=20)
    assert args.read == HeadDimConfig(2, 4, "sequence")
    assert (args.tensor_model_parallel_size, args.head_dim_parallel) == (8, "2,4")
    assert args.head_dim_exchange == "sequence"


def test_the_order_of_ranks_is_read_and_recorded() -> None:
    args = settled("--head-dim-parallel 2,4 --head-dim-order head-innermost", kv_channels=20)
    assert args.read == HeadDimConfig(2, 4, order="head-innermost") and args.head_dim_order == "head-innermost"
    assert settled("--head-dim-parallel 2,4", kv_channels=20).head_dim_order == "dim-innermost"
    auto = settled("--head-dim-parallel auto --tensor-model-parallel-size 8 --head-dim-order head-innermost")
    assert auto.read == HeadDimConfig(4, 2, order="head-innermost")


def test_an_order_that_does_not_exist_ends_with_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        settled("--head-dim-parallel 2,4 --head-dim-order heads")
    assert "choose from" in (said := capsys.readouterr().err) and "head-innermost" in said


def test_without_a_grid_the_namespace_stays_stocks() -> None:
    args = settled("--tensor-model-parallel-size 4")
    assert args.read is None
    assert vars(args) == STOCK | {"tensor_model_parallel_size": 4, "read": None}


@pytest.mark.parametrize(
    ("groups", "tp", "expected"), [(3, 6, "3,2"), (2, 8, "2,4"), (1, 4, "1,4"), (6, 4, "2,2"), (None, 4, "4,1")]
)
def test_auto_takes_the_widest_head_axis(
    groups: int | None, tp: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gqa = {} if groups is None else {"group_query_attention": True, "num_query_groups": groups}
    args = settled(f"--head-dim-parallel auto --tensor-model-parallel-size {tp}", world_size=2 * tp, **gqa)
    assert args.head_dim_parallel == expected and args.tensor_model_parallel_size == tp
    assert f"--head-dim-parallel auto: {expected}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["2,4", "2,4 --head-dim-exchange weights", "1,8", "4,1"])
def test_multi_latent_attention_is_taken_where_weights_move_or_nothing_does(command: str) -> None:
    # 12 heads, which 8 ranks do not divide.
    args = settled(f"--head-dim-parallel {command}", **LATENT)
    assert args.head_dim_parallel == command.split()[0]


@pytest.mark.parametrize(
    ("command", "given", "said"),
    [
        ("--head-dim-exchange batch", {}, ["--head-dim-exchange batch", "give --head-dim-parallel"]),
        ("--head-dim-order head-innermost", {}, ["--head-dim-order head-innermost", "give --head-dim-parallel"]),
        ("--head-dim-parallel auto", {}, ["--tensor-model-parallel-size"]),
        ("--head-dim-parallel 2,2 --tensor-model-parallel-size 8", {}, ["--tensor-model-parallel-size 8", "4"]),
        ("--head-dim-parallel 2,2 --tensor-model-parallel-size=1", {}, ["--tensor-model-parallel-size 1", "4"]),
        ("--head-dim-parallel 4x4", {}, ["4x4"]),
        ("--head-dim-parallel 0,4", {}, ["0"]),
        ("--head-dim-parallel 3,2", {}, ["8", "6"]),
        ("--head-dim-parallel 8,1", {}, ["12", "8"]),
        ("--head-dim-parallel 1,8", {}, ["20", "8"]),
        ("--head-dim-parallel 2,4 --head-dim-exchange batch", {}, ["6", "4"]),
        ("--head-dim-parallel 2,2", {"transformer_impl": "transformer_engine"}, ["--transformer-impl local"]),
        ("--head-dim-parallel 2,2", {"use_legacy_models": True}, ["--use-legacy-models"]),
        ("--head-dim-parallel 2,2", {"sft": True}, ["--sft", "n=1"]),
        ("--head-dim-parallel 2,2", {"optimizer": "dist_muon"}, ["--optimizer dist_muon", "n=1"]),
        ("--head-dim-parallel 2,2", {"optimizer": "soap"}, ["--optimizer soap", "adam, sgd, lion"]),
        ("--head-dim-parallel 2,2", {"hybrid_context_parallel": True}, ["--hybrid-context-parallel packs", "n=1"]),
        (
            "--head-dim-parallel 2,2",
            {"dataloader_inter_document_masking": True},
            ["--dataloader-inter-document-masking packs", "n=1"],
        ),
        ("--head-dim-parallel 2,2", {"ckpt_format": "torch_dcp"}, ["--ckpt-format torch_dcp", "n=1"]),
        ("--head-dim-parallel 2,2", {"non_persistent_ckpt_type": "local"}, ["--non-persistent-ckpt-type local"]),
        ("--head-dim-parallel 2,2", {"cuda_graph_impl": "full_iteration"}, ["--cuda-graph-impl full_iteration"]),
        ("--head-dim-parallel 2,2", {"enable_cuda_graph": True}, ["--enable-cuda-graph captures"]),
        ("--head-dim-parallel 2,2", {"perform_rl_step": True}, ["--perform-rl-step"]),
        (
            "--head-dim-parallel 4,1",
            {"use_megatron_fsdp": True},
            ["--use-megatron-fsdp", "--use-distributed-optimizer"],
        ),
        ("--head-dim-parallel 4,1", {"use_torch_fsdp2": True}, ["--use-torch-fsdp2"]),
        ("--head-dim-parallel 4,1", {"hybrid_layer_pattern": "*-*-"}, ["--hybrid-layer-pattern *-*-", "Hybrid"]),
        (
            "--head-dim-parallel 2,2",
            {"tensor_parallel_num_weight_shards": 8},
            ["--tensor-parallel-num-weight-shards 8", "4 ranks"],
        ),
        (
            "--head-dim-parallel 4,1",
            {"expert_tensor_parallel_num_weight_shards": 2, "expert_tensor_parallel_size": 1},
            ["--expert-tensor-parallel-num-weight-shards 2", "1 ranks"],
        ),
        (
            "--head-dim-parallel 2,2 --head-dim-exchange sequence",
            {"multi_latent_attention": True},
            ["latent", "`sequence`", "--head-dim-exchange weights, or --tensor-model-parallel-size alone"],
        ),
        ("--head-dim-parallel 2,4", LATENT | {"kv_lora_rank": 500}, ["564 channels of latents", "8 ranks"]),
        ("--head-dim-parallel 2,4", LATENT | {"rope_type": None}, ["--no-rope-fusion"]),
        ("--head-dim-parallel 4,1", LATENT | {"context_parallel_size": 2}, ["latent", "context parallelism"]),
        (
            "--head-dim-parallel 2,2",
            {"multi_latent_attention": True, "transformer_impl": "transformer_engine"},
            ["latent", "--transformer-impl local"],
        ),
    ],
)
def test_what_cannot_be_names_the_values(command: str, given: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ValueError) as mistake:
        settled(command, **given)
    assert all(words in str(mistake.value) for words in said), str(mistake.value)


def test_the_help_names_the_flags() -> None:
    text = flags.add_arguments(argparse.ArgumentParser()).format_help()
    assert all(word in text for word in ("--head-dim-parallel M,N", "--head-dim-exchange", "another function"))


def test_the_installed_release_has_what_the_hooks_replace() -> None:
    ModelHooks(lambda: None).check()
    stock = SimpleNamespace(_load_base_checkpoint=lambda load_dir, args, rank0=False: None)
    CheckpointHooks(stock, lambda: None).check()  # type: ignore[arg-type]


def test_a_checkpoint_is_looked_at_before_its_common_state_is_read(tmp_path: Path) -> None:
    stock = SimpleNamespace(_load_base_checkpoint=lambda load_dir, args, rank0=False: None)
    hooks_of_a_grid = CheckpointHooks(stock, lambda: HeadDimConfig(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"metadata\.json is missing: restore it"):
        hooks_of_a_grid.load_common(str(tmp_path))


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = str(made)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (self.made, 0o777, True)


def test_nothing_that_a_checkpoint_names_is_run_unless_it_is_trusted(tmp_path: Path) -> None:
    made = tmp_path / "made"
    dcp.save({"weight": torch.ones(3)}, checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    torch.save({"payload": Hostile(made)}, tmp_path / "common.pt")
    read = lambda load_dir, args, rank0=False: (None, "", False, None)  # noqa: E731
    stock = SimpleNamespace(_load_base_checkpoint=read)
    hooks_of_a_grid = CheckpointHooks(stock, lambda: HeadDimConfig(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"common\.pt names .*makedirs, .*--trust-checkpoint"):
        hooks_of_a_grid.load_common(str(tmp_path))
    assert not made.exists()
    hooks_of_a_grid.read(str(tmp_path), argparse.Namespace(trust_checkpoint=True))
    assert hooks_of_a_grid.load_common(str(tmp_path)) == {"payload": None}
    assert made.exists()


def test_another_signature_is_refused_with_the_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GPTModel, "__init__", lambda self, config, layers: None)
    with pytest.raises(RuntimeError, match=r"GPTModel\.__init__ has no parameter transformer_layer_spec") as refusal:
        ModelHooks(lambda: None).check()
    assert all(release in str(refusal.value) for release in known())


def test_without_the_flags_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    touched = [(TransformerConfig, "__post_init__"), (GPTModel, "__init__"), (dist_checkpointing, "load")]
    touched += [(dist_checkpointing, "save"), (dist_checkpointing, "load_common_state_dict")]
    touched.append((parallel_state, "initialize_model_parallel"))
    before = [getattr(owner, name) for owner, name in touched]
    monkeypatch.setitem(sys.modules, "megatron.training", None)  # would fail if it were looked for
    hooks.install(["--tensor-model-parallel-size", "4", "--distributed-backend", "gloo"])
    assert [getattr(owner, name) for owner, name in touched] == before


def test_a_mistake_ends_the_program_as_the_parsers_does(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ModuleType("arguments")
    arguments.add_megatron_arguments = lambda parser: parser  # type: ignore[attr-defined]
    arguments.validate_args = lambda args, defaults=None: args  # type: ignore[attr-defined]
    words = ["--head-dim-parallel", "2,2", "--tensor-model-parallel-size", "2"]
    hooked = ArgumentHooks(arguments, words)
    hooked.check()
    hooked.install()
    args = argparse.Namespace(**STOCK | {"tensor_model_parallel_size": 2, "head_dim_parallel": "2,2"})
    with pytest.raises(SystemExit) as end:
        hooked.validate(args)
    assert end.value.code == 2
    assert "error: " in (said := capsys.readouterr().err) and "--tensor-model-parallel-size 2" in said


def test_the_launcher_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (([], "usage:"), (["no_such_script.py"], "no_such_script.py is no file")):
        with pytest.raises(SystemExit) as end:
            launch.main(words)
        assert end.value.code == 2 and said in capsys.readouterr().err


def test_gloo_is_found_in_both_spellings() -> None:
    assert launch.on_gloo(["--distributed-backend", "gloo"]) and launch.on_gloo(["--distributed-backend=gloo"])
    assert not launch.on_gloo(["--distributed-backend", "nccl", "gloo"])


def uneven(monkeypatch: pytest.MonkeyPatch, **given: Any) -> str | None:
    """What Megatron-LM's making of process groups returns, with these arguments, on the CPU."""
    args = SimpleNamespace(rank=0, num_experts=4, tensor_model_parallel_size=2, **given)
    megatron_training = ModuleType("megatron.training")
    megatron_training.get_args = lambda: args  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.training", megatron_training)
    return refuse_uneven_gathers(lambda groups: f"made {groups}")("all")


@pytest.mark.parametrize("slices", [2, None], ids=["given", "the TP size"])
def test_gathers_that_gloo_lacks_end_megatron_lm_before_its_groups(
    slices: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        uneven(monkeypatch, expert_model_parallel_size=2, expert_tensor_parallel_size=slices)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "error: --expert-model-parallel-size 2 with --expert-tensor-parallel-size 2 gathers unequal" in said


def test_gathers_that_gloo_has_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert uneven(monkeypatch, expert_model_parallel_size=2, expert_tensor_parallel_size=1) == "made all"
    assert uneven(monkeypatch, expert_model_parallel_size=1, expert_tensor_parallel_size=None) == "made all"


def test_the_launcher_says_whose_experts_gather(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script, asked = tmp_path / "pretrain.py", []
    script.write_text("")
    monkeypatch.setattr(cpu_backend_of_megatron_lm, "enable", asked.append)
    monkeypatch.setattr(use_of_deepspeed, "use_deepspeed_moe", lambda: None)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for backend in ([], ["--moe-backend", "deepspeed"]):
        monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # put back after the test
        launch.main([str(script), "--num-experts", "4", "--distributed-backend", "gloo", *backend])
    assert asked == [True, False]


def test_configurations_that_are_built_again_keep_the_true_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = HeadDimConfig(2, 4)
    for owner, name in (
        (parallel_state, "initialize_model_parallel"),
        (TransformerConfig, "__post_init__"),
        (GPTModel, "__init__"),
        (Attention, "__init__"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back after the test
    ModelHooks(lambda: grid).install()
    config = TransformerConfig(
        num_layers=2,
        hidden_size=48,
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=12,
        tensor_model_parallel_size=8,
        use_cpu_initialization=True,
    )
    for built in (config, replace(config), replace(replace(config, num_layers=3)), copy.deepcopy(config)):
        assert (built.num_attention_heads, built.num_query_groups, built.kv_channels) == (6, 2, 12)
        assert on_grid(built)
    other = TransformerConfig(num_layers=1, hidden_size=48, num_attention_heads=6, use_cpu_initialization=True)
    assert not on_grid(other)
