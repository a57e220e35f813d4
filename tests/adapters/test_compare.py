"""`hp-plugin compare`: what is refused, whole runs with counted bytes against the closed form, and failed ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hp_plugin.commands.main import main
from hp_plugin.compare.entries.catalogue import catalogue_model
from hp_plugin.compare.entries.decoding import check_decodes
from hp_plugin.compare.entries.entrant import NotPossibleError, enter, smallest_world
from hp_plugin.compare.entries.suites import DECODE_SUITES
from hp_plugin.compare.job import Job
from hp_plugin.compare.rank import pass_gate
from hp_plugin.compare.ranks.gate import LossMismatchError, require_equal_losses
from hp_plugin.compare.ranks.together import seconds_together
from hp_plugin.compare.rates.collective_curves import measure_curves
from hp_plugin.compare.report.planner_columns import prediction_rows, winners
from hp_plugin.compare.results import Results
from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.batch.strategy import BatchExchange
from hp_plugin.exchange.rules import RULES
from hp_plugin.exchange.sizes import AttentionShape
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.curve import TimeCurve
from hp_plugin.planner.machine.hardware import load_hardware
from hp_plugin.planner.machine.parameter import PARAMETERS
from hp_plugin.planner.seconds.step import predict
from tests.ranks import Ranks

ROOT = Path(__file__).parents[2]
ODD = '{{"num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "seq_length": 16, {}}}'
QUICK = ["--model", "tiny-gqa", "--steps", "1", "--rounds", "1"]


def run(tmp_path: Path, *options: str) -> dict[str, Any]:
    assert main(["compare", *options, "--out", str(tmp_path)]) == 0
    (report,) = tmp_path.glob("*/report.json")
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def test_a_layout_with_another_loss_is_not_timed() -> None:
    require_equal_losses("grid=1x2", [5.00001, 4.0], "tp=2", [5.0, 4.0], 1e-4)
    with pytest.raises(LossMismatchError, match=r"nothing was timed: grid=1x2 has loss \[5.0, 4.01\] where tp=2"):
        require_equal_losses("grid=1x2", [5.0, 4.01], "tp=2", [5.0, 4.0], 1e-4)
    with pytest.raises(LossMismatchError, match="nothing was timed"):
        require_equal_losses("grid=1x2", [float("nan")], "tp=2", [5.0], 1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layouts", "tp=3", "--ranks", "4"], "takes a multiple of tp·pp·cp = 3 GPUs, and 4 is none"),
        (["--layouts", "grid=4x1"], "4 ranks could be 1,4 or 2,2"),
        (["--layouts", "tp=4", "tp=4"], "one is given twice"),
        (["--layouts", "tp=4", "--model", "tiny-gpa"], "did you mean tiny-gqa?"),
        (["--layouts", "tp=4", "--rounds", "0"], "--rounds must be positive, got 0"),
        (["--layouts", "tp=4,ep=2"], "ep and moe need a model with num_experts"),
        (["--layouts", "tp=4,tp_overlap,sp"], "compare runs no tp_overlap"),
        (["--layouts", "tp=4,cpp=2"], "unknown key 'cpp'"),
        (["--layouts", "tp=16"], "no layout can run: tp=16: "),  # in stock's own words: 8 heads over 16 ranks
        (["--layouts", "tp=1", "--predict"], "takes at least 2 ranks"),
        (["--layouts", "tp=4", "--into", "nowhere.md"], "--into nowhere.md: no such file"),
        ([], "--model needs --layouts"),
        (["--layouts", "tp=2,pp=2", "--mode", "decode"], "leave out pp, cp and sp"),
        (["--layouts", "grid=2x2,exchange=local", "--mode", "decode"], "compares exact layouts"),
        (["--layouts", "grid=2x2,exchange=scores", "--mode", "decode"], "has no key/value cache"),
        (["--layouts", "tp=2", "--mode", "decode", "--context", "0"], "--context must be positive, got 0"),
        (["--suite", "auto", "--mode", "decode"], "--suite auto has no layouts that decode: paper-dense,"),
    ],
)
def test_bad_input_is_refused_before_ranks_start(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if {"--model", "--suite"} & {*options} else ["--model", "tiny-gqa"]
    assert main(["compare", *model, "--out", str(tmp_path / "out"), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ('{"num_layers": 2', "line 1: not JSON"),
        ("[]", "expected one JSON object, got list"),
        ('{"num_layers": 2, "num_layers": 3}', "'num_layers' is given twice"),
        ('{"model_type": "llama", "hidden_size": 64}', "is a Hugging Face configuration ('llama')"),
        (ODD.format('"swiglu": "false"'), "--swiglu must be true or false, got 'false'"),
        (
            ODD.format('"position_embedding_type": "rotary"'),
            "must be one of learned_absolute, rope, none, got 'rotary'",
        ),
        (ODD.format('"ffn_hidden_size": "auto"'), "--ffn-hidden-size must be an integer, got 'auto'"),
        (ODD.format('"rotary_base": null'), "--rotary-base must be an integer, got None"),
        (ODD.format('"rotary_base": 2.5'), "--rotary-base must be an integer, got 2.5"),
        (ODD.format('"norm_epsilon": [1e-5]'), "--norm-epsilon must be a number, got [1e-05]"),
        (ODD.format('"norm_epsilon": NaN'), "'NaN' is no finite number"),
        (ODD.format('"data_path": "tokens"'), "--data-path must be a list of at least one word, got 'tokens'"),
        (ODD.format('"global_batch_size": 0'), "--global-batch-size must be positive, got 0"),
        ('{"num_layers": 2, "hiden_size": 8}', "unknown key 'hiden_size'; did you mean hidden_size?"),
        ('{"num_layers": 2, "sequence_parallel": true}', "is the layout's to say"),
        ('{"num_layers": 2}', "missing hidden_size"),
    ],
)
def test_a_model_file_that_is_none(model: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.json").write_text(model)
    assert main(["compare", "--model", str(tmp_path / "model.json"), "--layouts", "tp=1"]) == 2
    assert said in capsys.readouterr().err


def test_a_model_file_in_another_encoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.json").write_text(ODD.format('"seed": 1'), encoding="utf-16")
    assert main(["compare", "--model", str(tmp_path / "model.json"), "--layouts", "tp=1"]) == 2
    assert "model.json: not UTF-8 text" in capsys.readouterr().err


def test_stock_and_grid_side_by_side(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- compare: begin -->\nold\n<!-- compare: end -->\nbelow\n")
    layouts = ["tp=2,mbs=2", "grid=1x2,mbs=2", "grid=1x2,exchange=local"]
    model = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 2, "seq_length": 16}
    (tmp_path / "odd.json").write_text(json.dumps(model | {"global_batch_size": 4}))
    options = ["--model", str(tmp_path / "odd.json"), "--mode", "both", "--steps", "2", "--rounds", "1", "--trace"]
    report = run(tmp_path, *options, "--into", str(page), "--layouts", *layouts)
    assert report["schema"] == 2 and report["complete"] and report["model"] == "odd"
    assert report["machine"]["ranks"] == 2 and report["versions"]["megatron-core"]
    for mode in ("forward", "train"):
        assert list(report["modes"][mode]) == layouts
        stock, grid, local = report["modes"][mode].values()
        assert stock["losses"] == pytest.approx(grid["losses"], rel=1e-4)
        assert local["losses"] == pytest.approx(local["twin_losses"], rel=1e-4) and not local["exact"]
        # One sequence per micro-batch: whole heads cannot be traded, and `auto` takes another exchange than `batch`.
        for one in (stock, grid, local):
            assert len(one["samples"]) == 2 and one["peak_bytes"] > 1e7
            assert one["tpot_ms"]["min"] <= one["tpot_ms"]["median"] <= one["tpot_ms"]["max"]
            assert one["tpot_ms"]["median"] == pytest.approx(
                sum(1e3 * sum(sample["comm_s"].values()) / 16 for sample in one["samples"]) / 2
            )
            by_layout = {key: size for key, size in one["sent_bytes_per_token"].items() if key[:5] != "world"}
            formula = {key: size for key, size in one["closed_form_bytes_per_token"].items() if key[:5] != "world"}
            assert by_layout == pytest.approx(formula)
        assert grid["sent_bytes_per_token"]["dim/all_to_all"] > 0
        assert not any(key.startswith("dim/") for key in stock["sent_bytes_per_token"])
    written = {path.name for path in (tmp_path / "odd").iterdir()}
    traces = {f"trace-{name}-{mode}.json" for name in ("tp-2-mbs-2", "grid-1x2-mbs-2", "grid-1x2-exchange-local")
              for mode in ("forward", "train")}  # fmt: skip
    assert written == {"report.json", "report.md", "report.png"} | traces
    assert (tmp_path / "odd" / "report.png").read_bytes()[:4] == b"\x89PNG"
    events = json.loads((tmp_path / "odd" / "trace-grid-1x2-mbs-2-train.json").read_text())["traceEvents"]
    assert any("all_to_all" in event.get("name", "") for event in events)
    shown = capfd.readouterr().out
    table = (tmp_path / "odd" / "report.md").read_text(encoding="utf-8")
    assert all(f"| {name}" in table and name in shown for name in layouts) and "another function" in table
    assert page.read_text().startswith("above\n") and page.read_text().endswith("\nbelow\n")
    assert "| grid=1x2,exchange=local ≠ |" in page.read_text() and "old" not in page.read_text()


@pytest.mark.slow
def test_decode_steps_behind_cached_prompts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    layouts = ["tp=4", "grid=2x2", "grid=2x2,exchange=sequence"]
    report = run(tmp_path, *QUICK, "--mode", "decode", "--context", "24", "40", "--layouts", *layouts)
    assert list(report["modes"]) == ["decode-24", "decode-40"]
    short, found = report["modes"].values()
    assert [one["context"] for one in short.values()] == [24] * 3
    stock, by_sequences, by_tokens = found.values()
    # Two layers, 8 sequences of 40 + 8 tokens, keys and values of 2 heads of 8 in fp32; stock holds each head twice.
    whole = 2 * 8 * 48 * 2 * 2 * 8 * 4
    assert [one["cache_bytes"] for one in found.values()] == [whole // 2, whole // 4, whole // 4]
    assert by_sequences["losses"] == pytest.approx(stock["losses"], rel=1e-4) and len(stock["losses"]) == 1
    assert by_tokens["losses"] == pytest.approx(stock["losses"], rel=1e-4)
    for one in found.values():
        assert one["context"] == 40 and one["tpot_ms"]["median"] < 1e3 * one["step_s"]["median"]
        assert one["tokens_per_s"]["median"] == pytest.approx(8 / one["step_s"]["median"])
        assert one["sent_bytes_per_token"] == pytest.approx(one["closed_form_bytes_per_token"])
    # What the rules say of one token, beside stock's all-reduces.
    shape = AttentionShape(s=1, b=8, h=8, g=2, d=8, m=2, n=2, cache=48)
    for one, name in ((by_sequences, "batch"), (by_tokens, "sequence")):
        sent = sum(size for key, size in one["sent_bytes_per_token"].items() if key.startswith("dim/"))
        assert sent == pytest.approx(2 * RULES[name].bytes(shape, 4) / 8)
    assert "ms per token" in capfd.readouterr().out
    pages = list(tmp_path.glob("*/report.md"))
    assert [page.read_text(encoding="utf-8").count("tokens cached") for page in pages] == [2]


@pytest.mark.filterwarnings("ignore:When using expert parallelism and tensor parallelism for training:UserWarning")
@pytest.mark.parametrize("suite", DECODE_SUITES)
def test_layouts_of_every_suite_can_decode(suite: str) -> None:
    for one in DECODE_SUITES[suite]:
        model, ranks = catalogue_model(one.model), smallest_world(list(one.layouts))
        for layout in one.layouts:
            try:
                entrant = enter(model, layout, ranks)
            except NotPossibleError:
                continue
            check_decodes(entrant, max(one.contexts), ranks)


def test_experts_of_both_backends_and_what_stock_cannot_do(tmp_path: Path) -> None:
    model = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 16, "num_experts": 4}
    model |= {"moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_expert_capacity_factor": 1.0}
    (tmp_path / "experts.json").write_text(json.dumps(model | {"disable_bias_linear": True, "global_batch_size": 8}))
    layouts = ["tp=2,dp=2,sp,ep=2", "grid=2x2,sp,ep=4,mbs=2", "grid=2x2,ep=4,moe=deepspeed,mbs=2", "tp=4,sp,ep=4"]
    options = ["--model", str(tmp_path / "experts.json"), "--steps", "1", "--rounds", "1"]
    report = run(tmp_path, *options, "--layouts", *layouts)
    assert list(report["modes"]["train"]) == layouts[:3]
    assert "num_attention_heads (2) must be a multiple" in report["not_possible"]["tp=4,sp,ep=4"]
    first, *others = report["modes"]["train"].values()
    for one in others:
        assert one["losses"] == pytest.approx(first["losses"], rel=1e-4)
        assert one["sent_bytes_per_token"]["ep/all_to_all"] > 0


@pytest.mark.slow
def test_predictions_from_the_measured_machine_stand_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"num_layers": 1, "hidden_size": 48, "num_attention_heads": 6, "num_query_groups": 1, "seq_length": 20}
    model |= {"disable_bias_linear": True, "position_embedding_type": "rope", "normalization": "RMSNorm"}
    (tmp_path / "odd.json").write_text(json.dumps(model | {"global_batch_size": 4}))
    options = ["--model", str(tmp_path / "odd.json"), "--steps", "1", "--rounds", "1", "--predict"]
    report = run(tmp_path, *options, "--layouts", "tp=2,mbs=2", "grid=1x2,exchange=batch,mbs=2")
    machine = tmp_path / "odd" / "machine.json"
    hardware = load_hardware(str(machine))
    assert hardware.domain == 2 and all(hardware.parameters[name].source for name in PARAMETERS)
    shape = ModelShape("by hand", 1, D=48, h=6, g=1, d=8, ffn=192, vocab=report["options"]["padded_vocab_size"],
                       tied=True, norm_biases=False)  # fmt: skip
    for name, grid in (("tp=2,mbs=2", None), ("grid=1x2,exchange=batch,mbs=2", HeadDimConfig(1, 2, "batch"))):
        layout = Layout(tp=2, grid=grid, micro_batch=2, fused=False)
        expected = predict(shape, layout, Workload("train", 20, 4, itemsize=4), hardware)
        found = report["modes"]["train"][name]["predicted"]
        assert found["tokens_per_s"] == pytest.approx(80 / found["step_s"]) == pytest.approx(expected.tokens_per_s)
        assert found["tpot_ms"] == pytest.approx(1e3 * expected.tpot)
    text = (tmp_path / "odd" / "report.md").read_text(encoding="utf-8")
    assert "Predicted from rates of this machine alone" in text and "Fastest" in text
    capsys.readouterr()
    assert main(["plan", "--hardware", str(machine), "--show-hardware"]) == 0
    assert "kernel_gap_s = " in capsys.readouterr().out


def test_the_winner_is_named_measured_and_predicted() -> None:
    def one(measured: float, predicted: float, exact: bool = True) -> dict[str, Any]:
        guess = {"tokens_per_s": predicted, "tpot_ms": 2.0}
        return {"tokens_per_s": {"median": measured}, "tpot_ms": {"median": 1.0}, "predicted": guess, "exact": exact}

    layouts = {"tp=2": one(100, 150), "grid=1x2": one(110, 180), "grid=1x2,exchange=local": one(999, 999, False)}
    assert winners(layouts) == "Fastest, measured and predicted: grid=1x2."
    assert winners(layouts | {"tp=2": one(120, 150)}) == "Fastest: tp=2; predicted: grid=1x2."
    rows = list(prediction_rows(layouts))
    assert rows[1] == ("grid=1x2", "110", "180", "+64%", "1.10", "1.20", "+9%", "1.000", "2.000")
    assert rows[2][0] == "grid=1x2,exchange=local ≠"


@pytest.mark.parametrize("model", ["llama3-like", "qwen2.5-like", "qwen3-like", "mqa", "few-heads"])
def test_docs_say_what_the_reports_of_the_suite_hold(model: str) -> None:
    report = json.loads((ROOT / "docs" / "compare" / model / "report.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "planner.md").read_text(encoding="utf-8")
    by_mode = [list(prediction_rows(report["modes"][mode])) for mode in ("forward", "train")]
    base = by_mode[0][0][0]
    for forward, train in zip(*(rows[1:] for rows in by_mode), strict=True):
        cells = [f"`{model}`", f"`{base}`", f"`{forward[0]}`", *forward[4:7], *train[4:7]]
        assert f"| {' | '.join(cells)} |" in page


def curves_of_this_machine() -> dict[str, Any]:
    return measure_curves(torch.float32, "test")


def test_every_collective_is_measured_on_three_ranks(ranks: Ranks) -> None:
    curves = ranks.run(3, curves_of_this_machine)[0]["curves"]
    sizes = {curve["collective"]: curve["ranks"] for curve in curves}
    assert sizes == {"all_reduce": 3, "all_gather": 3, "reduce_scatter": 3, "all_to_all": 3, "send_recv": 2}
    for curve in curves:
        assert all(size % 12 == 0 for size, _ in curve["points"]) and len(curve["points"]) == 8
        TimeCurve.from_points(curve["points"])


def test_predictions_are_for_machines_without_gpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    options = ["--model", "tiny", "--layouts", "tp=2", "--predict", "--out", str(tmp_path / "out")]
    assert main(["compare", *options]) == 2
    assert "--predict describes machines without GPUs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def sleep_by_rank() -> float:
    return seconds_together(lambda: time.sleep(0.01 * (1 + dist.get_rank())))


def test_work_of_all_ranks_takes_as_long_as_the_slowest_rank_needs(ranks: Ranks) -> None:
    first, second = ranks.run(2, sleep_by_rank)
    assert first == second and first >= 0.02


def start(tmp_path: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hp_plugin.commands.main", "compare", *options, "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def wait_for(process: subprocess.Popen[str], words: str) -> str:
    assert process.stderr is not None
    said = ""
    while words not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    return said


def test_a_rank_that_dies_leaves_a_partial_report(tmp_path: Path) -> None:
    process = start(tmp_path, *QUICK[:-1], "1000", "--layouts", "tp=2", "grid=2x1")
    ranks: list[psutil.Process] = []
    try:
        wait_for(process, "round 2 of 1000")
        ranks = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in ranks if "spawn_main" in " ".join(child.cmdline())]
        workers[-1].send_signal(signal.SIGKILL)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "was ended by SIGKILL" in err and f"partial results are in {tmp_path}/tiny-gqa" in err
    assert "Traceback" not in err and "partial: the run did not end" in out
    assert not json.loads((tmp_path / "tiny-gqa" / "report.json").read_text())["complete"]
    assert not [child for child in ranks if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_or_killed_comparison_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, *QUICK[:-1], "1000", "--layouts", "tp=2", "grid=2x1")
    try:
        wait_for(process, "round 1 of 1000")
        ranks = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
        assert process.returncode == (130 if number == signal.SIGINT else -number)
        assert "Traceback" not in err
        deadline = time.monotonic() + 60
        while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in ranks):
            assert time.monotonic() < deadline, ranks
            time.sleep(0.2)
    finally:
        process.kill()
    assert ranks


def gate_with_wrong_output(job: Job) -> str:
    """The gate on ranks whose grid hands every token the attention output of its neighbour."""
    right = BatchExchange.to_slices
    BatchExchange.to_slices = lambda self, context: right(self, context).roll(1, 0)
    try:
        return refusal(job)
    finally:
        BatchExchange.to_slices = right


def gate_with_wrong_gradient(job: Job) -> str:
    """The gate on ranks whose grid is right in forward and doubles a gradient in backward."""
    right = BatchExchange.to_heads

    def doubling(self: BatchExchange, mixed: Tensor) -> Tensor:
        found = right(self, mixed)
        if found.requires_grad:
            found.register_hook(lambda gradient: 2 * gradient)
        return found

    BatchExchange.to_heads = doubling
    try:
        return refusal(job)
    finally:
        BatchExchange.to_heads = right


def refusal(job: Job) -> str:
    try:
        pass_gate(job, Results(job))
    except LossMismatchError as mismatch:
        return str(mismatch)
    return "passed"


@pytest.mark.parametrize("wrong", [gate_with_wrong_output, gate_with_wrong_gradient])
def test_a_deliberately_wrong_layout_is_refused(ranks: Ranks, wrong: Callable[[Job], str]) -> None:
    model = catalogue_model("tiny-gqa")
    job = Job("tiny-gqa", "", tuple(enter(model, text, 2) for text in ("tp=2", "grid=1x2,exchange=batch")))
    for said in ranks.run(2, wrong, job):
        assert said.startswith("nothing was timed: grid=1x2,exchange=batch has loss") and "where tp=2 has" in said
    assert ranks.run(2, refusal, job) == ["passed"] * 2
