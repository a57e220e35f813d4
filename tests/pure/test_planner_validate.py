"""The planner against published runs, and that it is fitted to what it says and to nothing else."""

from __future__ import annotations

import pytest

from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.machine.hardware import load_hardware
from hp_plugin.planner.machine.json_file import package_json
from hp_plugin.planner.reports import reproduce, validate
from hp_plugin.planner.reports.published import FOUNDRY, MEGATRON, bridge_rows, decode_rows, foundry_rows, megatron_rows

COMPARED = validate.compare_all()
HELD_OUT = [one for one in COMPARED if one.role == "held out"]


def test_the_one_fitted_number_is_what_the_calibration_rows_give() -> None:
    hardware = load_hardware("h100-ib")
    fitted = validate.calibrate(hardware, validate.calibration_rows())
    assert fitted == pytest.approx(hardware["gemm_efficiency"], abs=0.002)
    assert {row.name for row in validate.calibration_rows()} == {"7.1 B", "16 B", "32 B"}


def test_all_published_rows_are_compared() -> None:
    tables = package_json("reports/data/published.json")
    rows = sum(len(tables[name]["rows"]) for name in ("megatron_weak_scaling", "llm_foundry", "gpt_fast"))
    assert len(COMPARED) == rows == 75
    held = {one.row.name for one in HELD_OUT}
    assert len(held) == 6 + 5
    assert not held & set(validate.CALIBRATION)


def test_held_out_rows_are_within_ten_percent_on_average() -> None:
    assert validate.mean_error(HELD_OUT) < 0.10
    for group in (MEGATRON, FOUNDRY):
        assert validate.mean_error([one for one in HELD_OUT if one.row.group == group]) < 0.10
    assert abs(validate.worst_error(HELD_OUT).error) < 0.20


def test_published_rows_are_read_as_published() -> None:
    megatron = {row.name: row for row in megatron_rows()}
    row = megatron["70 B"]
    assert (row.gpus, row.workload.global_batch, row.model.vocab) == (768, 384, 131072)
    # 419.7 TFLOP/s per GPU by the publication's own formula.
    per_token = 3 * row.model.matmul_operations(1, 4096)
    assert row.measured * per_token == pytest.approx(419.7e12)
    assert row.model.parameters == pytest.approx(70e9, rel=0.02)
    foundry = {row.name: row for row in foundry_rows()}
    thirty = foundry["30b, 16 GPUs, sequence 2048"]
    assert (thirty.measured, thirty.layouts[0].micro_batch, thirty.layouts[0].recompute) == (2263, 10, "full")
    # 426 model TFLOP/s: the table's own operations from its tokens per second.
    assert thirty.measured * 3 * thirty.model.matmul_operations(1, 2048) == pytest.approx(426e12, rel=0.01)
    alone = {row.name: row for row in decode_rows()}["llama2-7b, 1 A100"]
    # 1397.31 GB/s by the publication: its bytes of weights (embeddings are looked up, not read) per token.
    weights = 2 * (alone.model.parameters - alone.model.embedding_parameters)
    assert alone.measured * weights == pytest.approx(1397.31e9, rel=0.03)


def test_decode_of_published_rows_is_within_a_fifth_on_average() -> None:
    """Held out entirely, on another GPU: nothing about decode is fitted to anything."""
    decode = [one for one in COMPARED if one.role == "decode"]
    assert len(decode) == 14
    assert validate.mean_error(decode) < 0.20


def test_the_report_prints_every_requested_row_and_all_means() -> None:
    text = "\n".join(validate.validation_report(COMPARED))
    for one in COMPARED:
        if one.role != "also":
            assert one.row.name in text and f"{one.error:+.1%}" in text
    assert f"{validate.mean_error(HELD_OUT):.1%}" in text
    assert "Without virtual stages" in text


def test_the_source_experiments_enter_no_parameter() -> None:
    """Their figures stand in one data file under one key, which only the comparison reads."""
    reported = package_json("reports/data/published.json")["source_experiments"]["rows"]
    assert [(row[2], row[3]) for row in reported] == [
        (1_200_000, 0.35), (1_580_000, 0.22), (850_000, 0.45), (1_150_000, 0.30),
    ]  # fmt: skip
    names = {row.name for row in validate.calibration_rows()}
    assert not any("paper" in name for name in names)


def test_reproduction_covers_what_the_table_leaves_open() -> None:
    settings = list(reproduce.settings("paper-dense"))
    assert {setting.machine for setting in settings} == {"h100-ib", "h100-nvlink"}
    assert {setting.mode for setting in settings} == {"forward", "train", "decode"}
    assert len(settings) == len(set(settings)) == 2 * 6 * (3 + 3 + 3)


def test_one_reproduced_pair_by_its_parts() -> None:
    found = reproduce.pair(reproduce.Setting("paper-dense", "h100-ib", "forward", 2048, 16))
    assert found.baseline.layout.pp == 2 and found.baseline.layout.tp == 8
    assert found.grid.layout.grid is not None and found.grid.layout.grid.exchange == "batch"
    assert found.ratio == pytest.approx(found.grid.tokens_per_s / found.baseline.tokens_per_s)
    assert found.baseline.micro_batches == found.grid.micro_batches == 16
    # One micro-batch leaves half of a two-stage pipeline idle: the grid then wins whatever it costs.
    single = reproduce.pair(reproduce.Setting("paper-dense", "h100-ib", "forward", 2048, 1))
    assert single.ratio > 1.3 and single.baseline.bubble > 0.4


def test_experts_of_the_source_model_are_deepspeeds() -> None:
    found = reproduce.pair(reproduce.Setting("paper-moe", "h100-nvlink", "forward", 512, 8))
    assert found.grid.layout.ep == 8 and found.grid.layout.moe == "deepspeed"
    assert found.grid.waiting["ep"] > 0


def test_mixtures_as_published_are_in_a_table_of_their_own() -> None:
    """Every row with its layout, nothing chosen and nothing fitted; the errors are those of the columns."""
    head, columns, *lines, summary = validate.bridge_report()
    table = package_json("reports/data/published.json")["megatron_bridge"]["rows"]
    assert "Megatron-Bridge" in head and columns.split() == ["row", "published", "predicted", "error", "fits", "layout"]
    assert len(lines) == len(table) == 5
    errors = []
    for line, row in zip(lines, table, strict=True):
        assert line.startswith(f"{row[0]}, {row[1]}, {row[2]} ")
        published, predicted, error = line[38:].split()[:3]
        assert float(published.replace(",", "")) == row[-1]
        errors.append(float(predicted.replace(",", "")) / row[-1] - 1)
        assert float(error.rstrip("%")) / 100 == pytest.approx(errors[-1], abs=2e-3)
        layout = Layout.parse(line.split()[-1])
        assert (layout.world, layout.ep, layout.pp, layout.micro_batch) == (row[3], row[10], row[8], row[5])
    assert f"mean error {sum(map(abs, errors)) / 5:.1%}" in summary
    machines = {one.name: one.own.domain for one in bridge_rows() if one.own is not None}
    assert machines["qwen3-235b-a22b, 25.11, gb200-nvl72"] == 64, "256 GPUs are no multiple of 72"
