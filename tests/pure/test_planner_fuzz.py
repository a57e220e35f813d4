"""Whatever a user writes is planned with finite figures, or refused in one short line that names the file, soon.

The same examples in every run; about a thousand inputs.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from io import StringIO
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hp_plugin.commands import plan as plan_cli
from hp_plugin.planner.inputs.launch_script import launch_words
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.megatron_launch import read_launch
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.models import load_model
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.gemm import GemmTable
from hp_plugin.planner.machine.hardware import Hardware, load_hardware
from hp_plugin.planner.machine.json_file import package_json
from hp_plugin.planner.machine.nccl_tests import read_nccl_log
from hp_plugin.planner.seconds.step import predict
from hp_plugin.refusal import LONGEST
from tests.pure.test_planner_nccl_tests import NCCL_TESTS

SECONDS = 2.0
"""Of this process alone, whatever else the machine does."""


def examples(number: int) -> settings:
    """That many, the same in every run."""
    return settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=number,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


NUMBERS = st.one_of(
    st.integers(1, 64).map(str),
    st.integers(-2, 2).map(str),
    st.sampled_from(
        ["1000000001", "10000000000000", "9" * 400, "9" * 5000, "1e999", "nan", "inf", "-inf", "1.5", "", "0x10"]
    ),
    st.sampled_from(["9" * 50, "٣", "true", "none", "x" * 5000, "4,4", "4x4", "1e-320"]),
)
VALUES: st.SearchStrategy[Any] = st.one_of(
    st.integers(-2, 64),
    st.sampled_from([10**9 + 1, 10**20, 10**400, 1.5, 1e-320, 1e300, -0.0, float("nan"), float("inf")]),
    st.sampled_from(
        [None, True, False, "", "4", "full_attention", "x" * 5000, [], [1, "a", None], {}, {"a": {"b": [1]}}]
    ),
)


def answered(read: Callable[[], Any], priced: Callable[[Any], float] | None = None, file: str = "") -> None:
    """Reads, and prices what was read: a finite number, or a refusal, which says the file if it was not read."""
    began = time.process_time()
    try:
        found = read()
        file = ""
        price = found if priced is None else priced(found)
    except ValueError as error:
        said = str(error)
        assert said and "\n" not in said, said
        assert len(said) <= LONGEST, f"{len(said)} characters: {said[:600]}"
        assert file in said, f"{said} does not name {file}"
    else:
        assert isfinite(price)
    assert time.process_time() - began < SECONDS


def step(
    model: ModelShape | str = "qwen2.5-3b",
    layout: str = "tp=2,mbs=2",
    mode: str = "train",
    machine: Hardware | None = None,
) -> float:
    """Sums up a prediction."""
    shape = load_model(model) if isinstance(model, str) else model
    found = predict(shape, Layout.parse(layout), Workload(mode, 4096, 64), machine or load_hardware("h100-ib"))
    assert found.step > 0
    return found.tokens_per_s + found.tpot + found.memory.total


FIELDS = [field.name for field in fields(ModelShape)] + ["typo", "", "d" * 4000]


@examples(300)
@given(st.lists(st.tuples(st.sampled_from(FIELDS), NUMBERS), max_size=5), st.booleans())
def test_models_in_words(pairs: list[tuple[str, str]], shipped: bool) -> None:
    base = "qwen2.5-3b" if shipped else "layers=4,D=64,h=4"
    answered(lambda: step(",".join([base, *(f"{key}={value}" for key, value in pairs)])))


@examples(40)
@given(
    st.text(max_size=60) | st.sampled_from(["x" * 5000, "a/" * 3000 + ".json", "\0", ".", "/", "=,=", "x.json" * 900])
)
def test_names_of_models_and_machines(text: str) -> None:
    answered(lambda: step(text))
    answered(lambda: step(machine=load_hardware(text)))


def written(folder: Path, name: str, found: object, rest: str = "") -> Path:
    path = folder / name
    path.write_text((found if isinstance(found, str) else json.dumps(found)) + rest, encoding="utf-8")
    return path


@examples(120)
@given(
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5), st.sampled_from(["", "}", "x", "\x00", "[" * 5000])
)
def test_model_files(tmp_path: Path, changes: dict[str, Any], rest: str) -> None:
    path = written(tmp_path, "mine.json", {"layers": 4, "D": 64, "h": 4, **changes}, rest)
    answered(lambda: load_model(str(path)), step, "mine")


LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu",
}  # fmt: skip
MORE = [
    "head_dim", "sliding_window", "layer_types", "rope_scaling", "rope_parameters", "max_window_layers", "num_experts",
    "use_sliding_window", "attention_bias", "tie_word_embeddings", "num_experts_per_tok", "moe_intermediate_size",
    "partial_rotary_factor", "query_pre_attn_scalar", "attention_multiplier", "text_config", "sliding_window_pattern",
    "embedding_multiplier", "decoder_sparse_step", "num_local_experts", "hidden_activation", "norm_epsilon",
]  # fmt: skip
TYPES = ["llama", "mistral", "qwen2", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "granite", "mixtral", "starcoder2"]


@examples(200)
@given(
    st.sampled_from(TYPES),
    st.dictionaries(st.sampled_from([*LLAMA, *MORE]), VALUES, max_size=4),
    st.dictionaries(
        st.sampled_from(["factor", "rope_type", "type", "rope_theta", "low_freq_factor"]), VALUES, max_size=3
    ),
)
def test_hugging_face_files(tmp_path: Path, kind: str, changes: dict[str, Any], scaling: dict[str, Any]) -> None:
    config = {**LLAMA, "model_type": kind, "rope_scaling": scaling or None, **changes}
    path = written(tmp_path, "config.json", config)
    answered(lambda: load_model(str(path)), step, "config.json")


TABLES = {name: package_json(f"machine/data/{name}_h100.json") for name in ("gemm", "attention", "collectives")}
PARAMETERS = list(package_json("machine/data/machines/h100-ib.json")["parameters"])


def damaged(table: Any, value: Any, where: random.Random) -> Any:
    """A copy of a table with one value, at any depth, in place of another."""
    whole = copy.deepcopy(table)
    at = whole
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = where.choice(keys)
        if not isinstance(at[key], (dict, list)) or not at[key] or where.random() < 0.1:
            at[key] = value
            return whole
        at = at[key]


@examples(120)
@given(
    st.dictionaries(st.sampled_from(PARAMETERS), VALUES, max_size=3), st.sampled_from(["value", "kind", "source", ""])
)
def test_hardware_files(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    figure = {"value": 1.0, "kind": "user", "source": "here"}
    given_ = {name: {**figure, part: value} if part else value for name, value in changes.items()}
    path = written(tmp_path, "cluster.json", {"based_on": "h100-ib", "parameters": given_})
    answered(lambda: load_hardware(str(path)), lambda machine: step(machine=machine), "cluster")
    load_hardware.cache_clear()


@examples(120)
@given(st.sampled_from(sorted(TABLES)), VALUES, st.integers(0, 10**6))
def test_tables_of_hardware_files(tmp_path: Path, name: str, value: Any, seed: int) -> None:
    path = written(
        tmp_path, "cluster.json", {"based_on": "h100-ib", name: damaged(TABLES[name], value, random.Random(seed))}
    )
    answered(lambda: load_hardware(str(path)), lambda machine: step(machine=machine), "cluster")
    load_hardware.cache_clear()


KEYS = [field.name for field in fields(Layout)] + ["mbs", "exchange", "order", "typo", "x" * 4000]
WORDS = st.sampled_from(["batch", "weights", "sequence", "scores", "full", "none", "deepspeed", "2x2", "1x4", "off"])


@examples(200)
@given(
    st.lists(st.tuples(st.sampled_from(KEYS), NUMBERS | WORDS), max_size=5),
    st.sampled_from(["train", "forward", "decode"]),
    st.sampled_from(["qwen2.5-3b", "qwen3-30b-a3b", "paper-dense"]),
)
def test_layouts(pairs: list[tuple[str, str]], mode: str, model: str) -> None:
    text = ",".join(f"{key}={value}" for key, value in pairs)
    answered(lambda: step(model, text, mode))


@examples(150)
@given(st.integers(0, 10**6), NUMBERS, st.sampled_from(["word", "line", "columns", "swap", "bytes"]))
def test_logs_of_nccl_tests(tmp_path: Path, seed: int, word: str, kind: str) -> None:
    where, lines = random.Random(seed), NCCL_TESTS.splitlines()
    at = where.randrange(len(lines))
    words = lines[at].split() or [""]
    if kind == "word":
        words[where.randrange(len(words))] = word
        lines[at] = " ".join(words)
    elif kind == "line":
        lines.insert(at, where.choice(lines) + word)
    elif kind == "columns":
        where.shuffle(words)
        lines[at] = " ".join(words)
    elif kind == "swap":
        other = where.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    path = tmp_path / "log.txt"
    raw = "\n".join(["$ all_reduce_perf", *lines]).encode()
    path.write_bytes(raw[: where.randrange(len(raw))] + bytes([where.randrange(256)]) * 3 if kind == "bytes" else raw)

    def curves() -> float:
        machine = load_hardware("h100-ib")
        found = read_nccl_log(path)
        # Whatever was read is what the log says: in a log of two sizes, nothing moves at another speed.
        assert all(45e-6 < each.curve.times[0] < 250e-6 for each in found if kind == "columns")
        mine = machine.with_curves({(each.kind, each.ranks, each.nodes): each.curve for each in found}, "log")
        return step(layout="tp=2,dp=8,mbs=2", machine=mine)

    answered(curves, file="log.txt")


@examples(60)
@given(st.lists(st.lists(NUMBERS, min_size=4, max_size=6), max_size=4), st.booleans())
def test_tables_of_products(tmp_path: Path, rows: list[list[str]], header: bool) -> None:
    path = tmp_path / "gemm.csv"
    text = [",".join(row) for row in rows]
    path.write_text("\n".join(["batch,m,n,k,tflops"] * header + ["1,128,128,128,400"] * header + text), "utf-8")
    answered(
        lambda: GemmTable.from_csv(path),
        lambda table: step(machine=load_hardware("h100-ib").with_gemm(table)),
        "gemm.csv",
    )


FLAGS = [
    "--num-layers",
    "--hidden-size",
    "--num-attention-heads",
    "--seq-length",
    "--micro-batch-size",
    "--kv-channels",
]
FLAGS += [
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--head-dim-parallel",
    "--global-batch-size",
]
FLAGS += [
    "--num-query-groups",
    "--moe-layer-freq",
    "--num-experts",
    "--window-size",
    "--vocab-size",
    "--rotary-percent",
]
FLAGS += [
    "--head-dim-exchange",
    "--norm-epsilon",
    "--moe-backend",
    "--recompute-granularity",
    "--context-parallel-size",
]
FLAGS += [
    "--num-layers-per-virtual-pipeline-stage",
    "--make-vocab-size-divisible-by",
    "--bf16",
    "--swiglu",
    "--unknown",
]


@examples(400)
@given(st.lists(st.tuples(st.sampled_from(FLAGS), NUMBERS | WORDS), max_size=5))
def test_launch_lines(pairs: list[tuple[str, str]]) -> None:
    line = "torchrun --nproc-per-node 8 pretrain_gpt.py --num-layers 4 --hidden-size 64 --num-attention-heads 4"
    line += " --seq-length 64 --micro-batch-size 2 --kv-channels 16 --group-query-attention --num-query-groups 2 "
    line += " ".join(f"{flag} {value}" for flag, value in pairs)

    def found() -> float:
        launch = read_launch(launch_words(line))
        prediction = predict(launch.model, launch.layout, launch.workload, load_hardware("h100-ib"))
        return prediction.tokens_per_s + prediction.memory.total

    answered(found)


OPTIONS = ["--gpus", "--global-batch", "--seq", "--memory-gb", "--top", "--max-micro-batch", "--micro-batches", "--tp"]
OPTIONS += [
    "--model",
    "--hardware",
    "--explain",
    "--sweep-to",
    "--nccl-tests",
    "--gemm-table",
    "--from-launch",
    "--mode",
]


@pytest.mark.parametrize("explained", [True, False])
@examples(60)
@given(st.lists(st.tuples(st.sampled_from(OPTIONS), NUMBERS), max_size=3))
def test_options(explained: bool, pairs: list[tuple[str, str]]) -> None:
    words = ["--model", "layers=2,D=64,h=4,g=2", "--gpus", "2", "--global-batch", "8", "--seq", "64"]
    words += ["--explain", "tp=2,mbs=2"] if explained else ["--tp", "2", "--max-micro-batch", "2"]
    words += [f"{option}={value}" for option, value in pairs]
    out, err = StringIO(), StringIO()
    began = time.process_time()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = plan_cli.main(words)
        except SystemExit as error:  # argparse shows its usage first
            status = error.code
    assert time.process_time() - began < SECONDS
    said = err.getvalue().strip().splitlines()
    if status == 0:
        assert not any(word in out.getvalue().split() for word in ("nan", "inf")), out.getvalue()
    else:
        assert status == 2 and said
        assert len(said[-1]) <= LONGEST + len("hp-plugin plan: "), said[-1][:600]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"layers": 4, "layers": 5}', "'layers' is given twice"),
        ('{"layers": NaN}', "'NaN' is no finite number"),
        ('{"layers": 1e999}', "'1e999' is no finite number"),
    ],
)
def test_files_that_mean_nothing(tmp_path: Path, text: str, said: str) -> None:
    for read in (load_model, load_hardware):
        with pytest.raises(ValueError, match=said):
            read(str(written(tmp_path, "mine.json", text)))
