"""The map of motions: bytes against the design's formulas by hand, rates against single predictions."""

from __future__ import annotations

import pytest

from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import load_hardware
from hp_plugin.planner.reports.motion_map import TOKENS, map_motions, map_report
from hp_plugin.planner.seconds.step import predict

H100 = load_hardware("h100-ib")
MODEL = ModelShape("m", 4, 512, 8, 4, 64, 2048, 1000)
TRAIN = Workload("train", 256, 4096)
MAP = map_motions(MODEL, 4, TRAIN, H100)


def test_bytes_are_those_of_the_design() -> None:
    W = 2 * 512 * (8 + 4) * 64 + 2 * 512 * 2048
    for cell in MAP.cells:
        T, P = cell.tokens, cell.m * cell.n
        if 256 * cell.n > T:  # fewer samples than n
            continue
        traded = 2 * T * (8 + 4) * 64 * 2 * (cell.n - 1) / (cell.n * P)
        assert cell.activations == pytest.approx(2 * (4 * T * 512 * 2 * (P - 1) / P + traded))
        ends = 2 * T * 512 * 2 * (cell.n - 1) / cell.n / 4  # a block of four layers
        layer = 8 * T * 512 * 2 * (cell.m - 1) / P + 3 * W * 2 * (cell.n - 1) / P
        assert cell.weights == pytest.approx(layer + ends)


def test_weights_send_less_from_some_size_on() -> None:
    for m, n in ((2, 2), (1, 4)):
        less = [(cell.ratio or 2.0) < 1 for cell in MAP.cells if (cell.m, cell.n) == (m, n)]
        assert len(less) == len(TOKENS) and less == sorted(less) and less[0] is False and less[-1] is True


def test_rates_are_the_predictions() -> None:
    cell = next(cell for cell in MAP.cells if (cell.tokens, cell.m) == (4096, 2))
    for exchange, rate in cell.rates.items():
        found = [predict(MODEL, Layout.parse(f"grid=2x2,exchange={exchange},mbs=16{sp}"), TRAIN, H100)
                 for sp in ("", ",sp")]  # fmt: skip
        assert rate == pytest.approx(max(one.tokens_per_s for one in found))
    name, rate = MAP.stock[4096]
    assert rate >= predict(MODEL, Layout.parse("tp=2,dp=2,mbs=16,sp"), TRAIN, H100).tokens_per_s and "TP=" in name


def test_the_tables_mark_what_sends_less_and_what_ties() -> None:
    text = "\n".join(map_report(MAP, MODEL, 4, "train", H100.name))
    assert "906 / 306*" in text and "2* / 5" in text
    last = text.splitlines()[-1]
    assert last.split()[-1].endswith("="), "the best ties with itself"


def test_what_has_no_map_is_refused() -> None:
    with pytest.raises(ValueError, match="--mode forward or train"):
        map_motions(MODEL, 4, Workload("decode", 256, 64), H100)
    with pytest.raises(ValueError, match="no grid of 3 GPUs"):
        map_motions(MODEL, 3, TRAIN, H100)
