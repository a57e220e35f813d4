"""The reference trainer's command line and what it refuses before anything starts."""

import math
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, fields, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from hp_plugin import cpu_backend
from hp_plugin.processes.refusals import connect, wait_for_others
from hp_plugin.training.arguments import build_parser, parse_arguments
from hp_plugin.training.checks import check_config
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.distributed import find_world_size
from hp_plugin.training.options import BELOW_ONE, NOT_NEGATIVE, PART, POSITIVE, SEED, flag, kind_of
from hp_plugin.training.transformer import build_transformer_config

SMALL = shlex.split(
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2"
    " --train-iters 5 --lr 1e-3"
)


MIXTURE = {"num_experts": 4, "disable_bias_linear": True}
EMPTY_STAGE = {
    "pipeline_model_parallel_size": 2,
    "moe_layer_freq": 4,
    "moe_backend": "deepspeed",
    "use_distributed_optimizer": True,
}


def config(**changes: object) -> TrainingConfig:
    return replace(parse_arguments(SMALL), **changes)


def test_defaults_are_the_dataclass_defaults():
    parsed = parse_arguments(SMALL)
    given = {"num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size", "train_iters", "lr"}
    assert {field.name for field in fields(TrainingConfig) if field.default is MISSING} == given
    for field in fields(TrainingConfig):
        if field.name not in given:
            assert getattr(parsed, field.name) == field.default, field.name


def test_every_kind_of_value():
    parsed = parse_arguments(
        [
            *SMALL,
            *shlex.split("--window-size 7,0 --swiglu --data-path 0.3 a 0.7 b --initial-loss-scale 1024"),
            *shlex.split("--kv-channels 8 --recompute-modules core_attn mlp --head-dim-parallel 2,2"),
        ]
    )
    assert parsed.window_size == (7, 0)
    assert parsed.swiglu and not parsed.disable_bias_linear
    assert parsed.data_path == ("0.3", "a", "0.7", "b")
    assert parsed.initial_loss_scale == 1024.0
    assert parsed.kv_channels == 8
    assert parsed.recompute_modules == ("core_attn", "mlp")
    assert parsed.head_dim is not None and parsed.tensor_parallel == 4
    assert hash(parsed) == hash(replace(parsed))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--num-layers"),
        ([*SMALL, "--num-layer", "3"], "unrecognized arguments: --num-layer"),
        ([*SMALL, "--seed", "x"], "--seed: invalid int value: 'x'"),
        ([*SMALL, "--window-size", "7"], "takes two integers left,right (for example 127,0), got '7'"),
        ([*SMALL, "--head-dim-exchange", "bat"], "invalid choice: 'bat'"),
        (
            [*SMALL, "--head-dim-order", "heads"],
            "invalid choice: 'heads' (choose from 'dim-innermost', 'head-innermost'",
        ),
        ([*SMALL, "--normalization", "BatchNorm"], "invalid choice: 'BatchNorm'"),
        ([*SMALL, "--recompute-modules", "mlp", "x"], "invalid choice: 'x'"),
        ([*SMALL, "--lr", "inf"], "--lr must be positive, got inf"),
        ([*SMALL, "--attention-dropout", "1"], "--attention-dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_malformed_flags_end_with_one_line_and_status_2(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/some/where/pretrain_gpt.py"])
    with pytest.raises(SystemExit) as stop:
        parse_arguments(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("pretrain_gpt.py: error: ") and said.count("\n") == 1
    assert message in said


def test_the_first_rank_that_refuses_speaks_for_all_that_say_the_same(capsys, monkeypatch):
    # As torchrun's agent has it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1"}
    launched |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    said = []
    for rank, words in (("3", []), ("5", []), ("6", [*SMALL, "--lr", "inf"]), ("0", [])):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            parse_arguments(words)
        assert stop.value.code == 2
        said.append(capsys.readouterr().err)
    assert "arguments are required" in said[0] and said[1] == said[3] == ""
    assert "--lr must be positive, got inf" in said[2]
    # Who has nothing to refuse learns of it at once.
    with pytest.raises(SystemExit) as stop:
        wait_for_others(connect(timedelta(seconds=20)), timedelta(seconds=20))
    assert stop.value.code == 2 and capsys.readouterr().err == ""


def test_ranks_that_all_agree_go_on_together(monkeypatch):
    store, timeout = dist.HashStore(), timedelta(seconds=20)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with ThreadPoolExecutor(3) as ranks:
        first = [ranks.submit(wait_for_others, store, timeout) for _ in range(2)]
        assert not any(rank.done() for rank in first)
        assert ranks.submit(wait_for_others, store, timeout).result(20) is None
        assert [rank.result(20) for rank in first] == [None, None]


def test_ranks_that_do_not_come_are_counted(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(TimeoutError, match=r"^1 of 3 ranks are here after"):
        wait_for_others(dist.HashStore(), timedelta(seconds=1))


@pytest.mark.parametrize("size", ["0", "-1", "x", "1" * 5000, "", "2.0"])
def test_a_world_size_that_is_none_is_refused(size, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(
        ValueError, match=r"^WORLD_SIZE must be a number of ranks of at least 1, got '.{0,60}…?'?:"
    ) as refused:
        find_world_size()
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        ({"RANK": "4"}, "RANK must be a number below WORLD_SIZE 4, got '4'"),
        ({"RANK": "x"}, "RANK must be a number below WORLD_SIZE 4, got 'x'"),
        ({"RANK": "1"}, "ranks meet at MASTER_ADDR '', MASTER_PORT ''"),
        ({"RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "99999"}, "ranks meet at .* 'a', MASTER_PORT '99999'"),
    ],
)
def test_a_launcher_that_does_not_say_where_ranks_meet_is_refused(launcher, said, monkeypatch):
    for name, value in {"WORLD_SIZE": "4", **launcher}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^{said}: use torchrun$"):
        find_world_size()


def test_help_lists_every_flag_once():
    text = build_parser().format_help()
    for field in fields(TrainingConfig):
        flag = field.name.replace("_", "-")
        assert len(re.findall(rf"^  --{flag}\b(?!-)", text, re.MULTILINE)) == 1, field.name


def test_a_stage_without_experts_matters_where_their_distributed_optimizer_is_saved():
    check_config(config(**MIXTURE, **EMPTY_STAGE), 2)
    check_config(config(**MIXTURE, **EMPTY_STAGE | {"moe_layer_freq": 2, "save": "x"}), 2)
    check_config(config(**MIXTURE, **EMPTY_STAGE | {"use_distributed_optimizer": False, "save": "x"}), 2)


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({"num_layers": 0}, 1, "--num-layers must be positive, got 0"),
        ({"lr": -1.0}, 1, "--lr must be positive, got -1.0"),
        ({"tensor_model_parallel_size": 4}, 6, "world size 6 is not a multiple of TP × PP × CP = 4 × 1 × 1 = 4"),
        ({"head_dim_parallel": "2,2"}, 6, "world size 6 is not a multiple of 4"),
        (
            {"head_dim_parallel": "2,2", "tensor_model_parallel_size": 2},
            4,
            "--tensor-model-parallel-size 2 contradicts --head-dim-parallel 2,2, which sets it to m·n = 4",
        ),
        ({"head_dim_parallel": "4x4"}, 16, "--head-dim-parallel takes two integers m,n (for example 4,4), got '4x4'"),
        ({"head_dim_order": "head-innermost"}, 4, "give --head-dim-parallel with it"),
        ({"head_dim_parallel": "auto"}, 4, "--head-dim-parallel auto needs --tensor-model-parallel-size"),
        (
            {"pipeline_model_parallel_size": 3},
            3,
            "--num-layers 4 does not divide over --pipeline-model-parallel-size 3",
        ),
        (
            {"num_layers_per_virtual_pipeline_stage": 1},
            1,
            "--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size of at least 2",
        ),
        (
            {"num_layers": 12, "pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 4},
            2,
            "--num-layers-per-virtual-pipeline-stage 4 does not divide the 6 layers of a pipeline stage",
        ),
        (
            {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1, "global_batch_size": 6},
            2,
            "needs a multiple of 2 micro-batches per iteration (one per pipeline stage), got 3: make "
            "--global-batch-size (6) a multiple of 4",
        ),
        ({"global_batch_size": 6}, 2, "--global-batch-size 6 is not a multiple of --micro-batch-size 2 × 2"),
        ({"tensor_model_parallel_size": 5}, 5, "the padded vocabulary of 384 does not divide over 5"),
        (
            {"sequence_parallel": True, "tensor_model_parallel_size": 2, "seq_length": 33},
            2,
            "--sequence-parallel needs --seq-length (33) divisible by TP × CP = 2",
        ),
        ({"context_parallel_size": 2}, 2, "--context-parallel-size 2 needs --transformer-impl transformer_engine"),
        ({"hidden_size": 65}, 1, "--hidden-size 65 is not a multiple of --num-attention-heads 4"),
        (MIXTURE | {"moe_router_topk": 5}, 1, "--moe-router-topk 5 must be at most --num-experts 4"),
        (MIXTURE | {"expert_model_parallel_size": 3}, 3, "--num-experts 4 do not divide over"),
        (MIXTURE | EMPTY_STAGE | {"save": "x"}, 2, "freq 4 leaves pipeline stage 1 without experts"),
        (MIXTURE | EMPTY_STAGE | {"load": "x"}, 2, "leave --use-distributed-optimizer out, or --save and --load"),
        (MIXTURE | {"disable_bias_linear": False}, 1, "local experts with biases run only where they are spread"),
        (MIXTURE | {"tensor_model_parallel_size": 2}, 2, "Megatron's MoE on 2 tensor-parallel ranks needs"),
        ({"num_query_groups": 3}, 1, "--num-attention-heads 4 is not a multiple of --num-query-groups 3"),
        ({"max_position_embeddings": 16}, 1, "--max-position-embeddings 16 is smaller than --seq-length 32"),
        ({"rotary_percent": 1.5}, 1, "--rotary-percent must be above 0 and at most 1, got 1.5"),
        ({"recompute_granularity": "full"}, 1, "--recompute-granularity full needs --recompute-method"),
        ({"fp16": True, "bf16": True}, 1, "--fp16 and --bf16 exclude each other"),
        ({"optimizer": "sgd", "use_distributed_optimizer": True}, 1, "spreads Adam's state alone"),
        ({"min_lr": 1.0}, 1, "--min-lr 1.0 is above --lr 0.001"),
        ({"lr_warmup_iters": 5}, 1, "the warm-up of 5 iterations must be shorter than the decay of 5"),
        ({"data_path": ("/nowhere/x",)}, 1, "--data-path /nowhere/x: there is no file /nowhere/x.bin"),
        ({"data_path": ("a",), "mock_data": True}, 1, "give --data-path or --mock-data, not both"),
        ({"data_path": ("0.5", "a", "b")}, 1, "prefixes alone or a weight before every prefix, got 0.5 a b"),
        ({"vocab_size": 100}, 1, "--vocab-size 100 is too small for the byte tokens of the default data"),
        ({"split": "0,1"}, 1, "--split takes up to three shares, the first positive"),
        ({"split": "a"}, 1, "--split takes up to three shares, the first positive"),
    ],
)
def test_what_cannot_run_is_refused_in_words(changes, world_size, message):
    with pytest.raises(ValueError) as refusal:
        check_config(config(**changes), world_size)
    assert message in str(refusal.value)


@pytest.mark.filterwarnings("ignore:When using expert parallelism and tensor parallelism:UserWarning:megatron")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_model_parallel_size": 2}, "--expert-tensor-parallel-size 2 gathers unequal numbers of tokens"),
        (
            {"expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1},
            "4 × --expert-tensor-parallel-size 1 does",
        ),
    ],
)
def test_mixtures_that_no_ranks_can_run_are_refused_before_any_group(changes, message, monkeypatch):
    monkeypatch.setattr(cpu_backend, "is_enabled", lambda: True)
    mixture = config(**MIXTURE, tensor_model_parallel_size=2, sequence_parallel=True, **changes)
    with pytest.raises(ValueError) as refusal:
        check_config(mixture, 2)
        build_transformer_config(mixture, 2)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "world_size", "batch", "micro_batches"),
    [
        ({}, 1, 2, 1),
        ({}, 4, 8, 1),
        ({"global_batch_size": 16}, 2, 16, 4),
        ({"global_batch_size": 16, "head_dim_parallel": "2,2"}, 8, 16, 4),
        ({"pipeline_model_parallel_size": 2, "global_batch_size": 8}, 2, 8, 4),
    ],
)
def test_batches_per_layout(changes, world_size, batch, micro_batches):
    checked = config(**changes)
    check_config(checked, world_size)
    assert (checked.batch_size(world_size), checked.micro_batches(world_size)) == (batch, micro_batches)


def test_derived_values():
    assert config().padded_vocab_size == 384  # 256 bytes + end-of-document, to a multiple of 128
    assert config(tensor_model_parallel_size=3).padded_vocab_size == 384
    assert config(vocab_size=50256, make_vocab_size_divisible_by=1).padded_vocab_size == 50257
    assert config().query_groups == 4
    assert config(group_query_attention=True).query_groups == 1
    assert config(num_query_groups=2).query_groups == 2
    virtual = config(num_layers=12, pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=3)
    assert virtual.virtual_pipeline == 2
    widest = config(head_dim_parallel="auto", tensor_model_parallel_size=8, num_query_groups=2).head_dim
    assert widest is not None and (widest.m, widest.n) == (2, 4)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["examples/pretrain_gpt.py"], ["mixed precision", "mixture of experts", "validation and logging"]),
        (["-m", "hp_plugin.bench.attention_layer"], ["grid against stock on the same ranks"]),
        (["-m", "hp_plugin.bench.checkpoint"], ["Saving and loading a checkpoint on a grid"]),
        (["-m", "hp_plugin.commands.main", "plan"], ["communication time and memory of every layout"]),
    ],
    ids=lambda value: value[-1],
)
def test_the_help_is_complete_where_python_leaves_docstrings_out(command, said):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-OO", *command, "--help"],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert all(words in text for words in said) and "None" not in text


@pytest.mark.parametrize("name", ["attention_layer", "checkpoint"])
def test_a_benchmark_without_its_ranks_ends_in_a_line(name):
    done = subprocess.run(
        [sys.executable, "-m", f"hp_plugin.bench.{name}", "--head-dim-parallel", "2,2"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "world size 1 is not a multiple of 4" in last and "torchrun" in last


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_layers": "4"}, "--num-layers must be an integer, got '4'"),
        ({"num_layers": 4.0}, "--num-layers must be an integer, got 4.0"),
        ({"num_layers": True}, "--num-layers must be an integer, got True"),
        ({"num_layers": None}, "--num-layers must be an integer, got None"),
        ({"num_layers": [4]}, "--num-layers must be an integer, got [4]"),
        ({"kv_channels": "x" * 1000}, "--kv-channels must be an integer, got 'xxx"),
        ({"lr": "1e-3"}, "--lr must be a number, got '1e-3'"),
        ({"lr": 10**400}, "--lr must be positive, got 1000"),
        ({"swiglu": "false"}, "--swiglu must be true or false, got 'false'"),
        ({"swiglu": 1}, "--swiglu must be true or false, got 1"),
        ({"position_embedding_type": "rop"}, "got 'rop'; did you mean rope?"),
        ({"position_embedding_type": 3}, "--position-embedding-type must be a string, got 3"),
        ({"window_size": (-1, 0)}, "--window-size must be two integers, each at least 0, got (-1, 0)"),
        ({"window_size": [127]}, "--window-size must be two integers, got [127]"),
        ({"window_size": [127, "0"]}, "--window-size must be two integers, got [127, '0']"),
        ({"recompute_modules": "mlp"}, "--recompute-modules must be a list of at least one word, got 'mlp'"),
        ({"recompute_modules": ["mpl"]}, "got 'mpl'; did you mean mlp?"),
        ({"recompute_modules": []}, "--recompute-modules must be a list of at least one word, got []"),
        ({"num_layer": 4}, "unknown key 'num_layer'; did you mean num_layers?"),
    ],
)
def test_json_and_python_are_held_to_the_options_own_types(values, message):
    given = {field.name: getattr(config(), field.name) for field in fields(TrainingConfig)} | values
    with pytest.raises(ValueError) as refusal:
        TrainingConfig.from_options(given)
    assert message in str(refusal.value) and len(str(refusal.value)) < 300


def test_json_without_a_required_option_names_it():
    with pytest.raises(ValueError, match=r"missing .*num_layers, hidden_size"):
        TrainingConfig.from_options({"lr": 1.0})


def test_values_that_mean_the_same_become_the_options_own(tmp_path):
    meant = config(lr=1, window_size=[7, 0], recompute_modules=["mlp"], save=tmp_path)
    assert type(meant.lr) is float
    assert (meant.window_size, meant.recompute_modules, meant.save) == ((7, 0), ("mlp",), str(tmp_path))
    assert hash(meant) == hash(config(lr=1.0, window_size=(7, 0), recompute_modules=("mlp",), save=str(tmp_path)))


# By hand: what Adam, SGD, dropout, norms and Megatron-Core's configuration divide by, index or draw from.
OUTSIDE = {
    POSITIVE: (0, -1, math.inf, math.nan),
    NOT_NEGATIVE: (-1, math.inf, math.nan),
    PART: (0, 1.5, -0.5, math.nan),
    BELOW_ONE: (1, -0.5, math.nan),
    SEED: (-1, 2**31),
}


def test_every_number_has_a_domain_that_is_kept_and_in_the_help():
    text = " ".join(build_parser().format_help().split())
    for field in fields(TrainingConfig):
        if kind_of(field) not in ("int", "float"):
            continue
        domain = field.metadata["domain"]
        assert domain is not None, field.name
        assert f"[{domain.words}]" in text
        for value in OUTSIDE[domain]:
            if kind_of(field) == "int" and not isinstance(value, int):
                continue
            with pytest.raises(ValueError, match=re.escape(f"{flag(field.name)} must be {domain.words}, got {value}")):
                config(**{field.name: value})
