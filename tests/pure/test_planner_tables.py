"""The measured tables: read between points, monotone, close to the measurements they were not made from."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from hp_plugin.planner.counts.core_attention import core_backward, core_forward
from hp_plugin.planner.counts.program import FusedAttention, Gemm, Stream
from hp_plugin.planner.machine.curve import TimeCurve
from hp_plugin.planner.machine.gemm import GemmTable
from hp_plugin.planner.machine.hardware import load_hardware
from hp_plugin.planner.machine.json_file import package_json
from hp_plugin.planner.seconds.pricing import Pricer

H100 = load_hardware("h100-ib")


def test_a_curve_goes_through_its_points_and_is_straight_between_them() -> None:
    curve = TimeCurve.from_points([(1000, 2.0), (3000, 4.0), (9000, 13.0)])
    assert curve.seconds(1000) == 2.0
    assert curve.seconds(2000) == pytest.approx(3.0)
    assert curve.seconds(6000) == pytest.approx(8.5)
    assert curve.seconds(10) == 2.0  # latency
    assert curve.seconds(18000) == pytest.approx(26.0)  # the last bandwidth goes on


def test_a_disturbed_small_transfer_takes_the_time_of_a_larger_one() -> None:
    curve = TimeCurve.from_points([(8, 13.0), (32, 68.0), (64, 15.0)])
    assert curve.seconds(32) == 15.0


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([], "at least one point"),
        ([(0, 1.0)], "positive"),
        ([(8, -1.0)], "positive"),
        ([(8, 1.0), (8, 2.0)], "8 bytes occur twice"),
    ],
)
def test_malformed_curves_are_refused(points: list[tuple[float, float]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TimeCurve.from_points(points)


def test_gemm_rates_are_the_measured_ones_at_measured_shapes() -> None:
    for batch, m, n, k, tflops in package_json("machine/data/gemm_h100.json")["rows"]:
        assert H100.gemm.rate(batch, m, n, k) == pytest.approx(tflops * 1e12, rel=1e-9)


def test_gemm_rate_between_beyond_and_below_the_table() -> None:
    between = H100.gemm.rate(1, 3000, 3000, 3000)
    assert H100.gemm.rate(1, 2048, 2048, 2048) < between < H100.gemm.rate(1, 4096, 4096, 4096)
    assert H100.gemm.rate(1, 65536, 8192, 8192) == H100.gemm.rate(1, 4096, 4096, 4096)
    # More small matrices fill the GPU as one larger one does.
    assert H100.gemm.rate(16, 1024, 1024, 1024) == pytest.approx(H100.gemm.rate(4, 4096, 1024, 1024))
    # So do more columns.
    assert H100.gemm.rate(1, 256, 16384, 4096) == pytest.approx(H100.gemm.rate(1, 1024, 4096, 4096))
    # Fewer rows keep the rate: memory bounds such products.
    assert H100.gemm.rate(1, 1, 4096, 4096) == pytest.approx(H100.gemm.rate(1, 256, 4096, 4096))


def test_a_products_time_never_falls_when_a_side_grows() -> None:
    pricer = Pricer(H100, {}, itemsize=2)
    for axis in ("m", "n", "k"):
        sides = {"m": 300, "n": 700, "k": 900}
        times = [pricer.kernel(Gemm("g", **{**sides, axis: 2**power})) for power in range(15)]
        # Measured tables have their own noise: a few percent.
        assert all(later >= earlier * 0.97 for earlier, later in pairwise(times)), axis


def test_a_thin_product_is_bound_by_memory() -> None:
    # One row against a 8192 × 8192 matrix of 16-bit weights: 2 · 8192² bytes and two vectors at 3.0 TB/s.
    pricer = Pricer(H100, {}, itemsize=2)
    streaming = (2 * 8192**2 + 4 * 8192) / 3.0e12
    assert pricer.kernel(Gemm("g", 1, 8192, 8192)) == pytest.approx(streaming + H100["kernel_gap_s"])
    assert pricer.kernel(Gemm("g", 256, 8192, 8192)) > 1.2 * streaming
    # Accumulating into fp32 reads and writes 8 bytes per result instead of writing 2.
    assert Gemm("g", 3, 5, 7, accumulate=True).bytes(2) - Gemm("g", 3, 5, 7).bytes(2) == 6 * 3 * 5


def test_streams_run_at_memory_bandwidth() -> None:
    gap = H100["kernel_gap_s"]
    pricer = Pricer(H100, {}, itemsize=2)
    assert pricer.kernel(Stream("s", 3.0e9)) == pytest.approx(1e-3 + gap)
    assert pricer.kernel(Stream("s", 3.0e9, slow=True)) == pytest.approx(2e-3 + gap)


def test_fused_attention_reproduces_the_figures_it_came_from() -> None:
    """Head dimension 128, 16 heads, 16k tokens per batch, as in the FlashAttention benchmark."""
    kernel = H100.attention["fa2"]
    for seq, forward, both in ((2048, 298e12, 265e12), (8192, 333e12, 308e12)):
        heads = 16 * 16384 // seq
        pairs = seq * seq / 2
        one = kernel.seconds(pairs, heads, seq, seq, 128, causal=True, backward=False)
        two = kernel.seconds(pairs, heads, seq, seq, 128, causal=True, backward=True)
        # The figures' own occupancy is nearly the reference's, not exactly.
        assert 4 * pairs * heads * 128 / one == pytest.approx(forward, rel=0.03)
        assert 3.5 * 4 * pairs * heads * 128 / (one + two) == pytest.approx(both, rel=0.03)


def test_few_heads_leave_the_gpu_idle_as_measured() -> None:
    """8, 16, 32 and 64 heads at 2048 tokens: 289, 347, 434, 488 TFLOP/s (source in the attention table)."""
    measured = {8: 289, 16: 347, 32: 434, 64: 488}
    kernel = H100.attention["cudnn"]
    rates = {
        heads: 4 * 2048**2 / 2 * heads * 128 / kernel.seconds(2048**2 / 2, heads, 2048, 2048, 128, True, False)
        for heads in measured
    }
    for heads in (8, 16, 32):
        assert rates[heads] / rates[64] == pytest.approx(measured[heads] / measured[64], rel=0.08)


def test_unfused_attention_is_near_its_published_rates() -> None:
    """Standard attention's bars were not used for the products, only to find one efficiency of the softmax passes."""
    alone = H100.with_parameter("gemm_efficiency", 1.0, "user", "products alone, as in the benchmark")
    pricer = Pricer(alone, {}, itemsize=2)
    published = package_json("machine/data/attention_h100.json")["unfused_check"]
    ratios = []
    for seq in (2048, 4096, 8192):
        samples = 16384 // seq
        shape = {
            "samples": samples, "heads": 16, "groups": 16, "queries": seq, "keys": seq, "width": 128, "fused": False,
            "dropout": False, "e": 2,
        }  # fmt: skip
        forward = sum(map(pricer.kernel, core_forward(**shape)))
        backward = sum(map(pricer.kernel, core_backward(**shape)))
        operations = 4 * samples * 16 * seq**2 * 128
        ratios.append(operations / forward / published["forward"][str(seq)] / 1e12)
        ratios.append(3.5 * operations / (forward + backward) / published["forward_backward"][str(seq)] / 1e12)
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=0.02)
    assert all(0.85 < ratio < 1.15 for ratio in ratios), ratios


def test_attention_operations() -> None:
    # 3 heads, 10 queries on 20 keys causally balanced: 100 pairs, 4 operations per pair and channel.
    kernel = FusedAttention("a", 100.0, 3, 10, 20, 64, True)
    assert kernel.operations == 4 * 100 * 3 * 64
    assert FusedAttention("a", 100.0, 3, 10, 20, 64, True, backward=True).operations == 2.5 * kernel.operations


def test_a_users_gemm_table_replaces_the_shipped_one(tmp_path: Path) -> None:
    path = tmp_path / "gemm.csv"
    lines = ["batch,m,n,k,tflops"]
    lines += [f"{b},{m},{n},{k},100" for b in (1, 2) for m in (256, 512) for n in (256, 512) for k in (256, 512)]
    path.write_text("\n".join(lines))
    mine = H100.with_gemm(GemmTable.from_csv(path))
    assert mine.gemm.rate(1, 400, 300, 500) == pytest.approx(100e12)
    seconds = Pricer(mine.with_parameter("gemm_efficiency", 1.0, "user", ""), {}, 2).kernel(Gemm("g", 4096, 4096, 4096))
    assert seconds == pytest.approx(2 * 4096**3 / 100e12 + mine["kernel_gap_s"])


def test_small_products_are_padded_to_a_tile_only_where_nothing_small_was_measured() -> None:
    def table(sides: tuple[int, ...]) -> GemmTable:
        return GemmTable([(1, m, n, k, 1e12) for m in sides for n in sides for k in sides], "test")

    assert table((256, 512)).rate(1, 512, 32, 512) == pytest.approx(1e12 * 32 / 128)
    assert table((16, 512)).rate(1, 512, 32, 512) == pytest.approx(1e12)
    assert table((16, 512)).rate(1, 8, 4, 512) == pytest.approx(1e12 * 4 / 16)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batch,m,n,tflops\n1,2,3,4", r"line 1: GEMM table needs the columns.*missing \['k'\]"),
        ("batch,m,n,k,tflops\n1,256,256,256,1\n1,256,x,256,1", "line 3: expected four integers"),
        ("batch,m,n,k,tflops\n1,256,256,256,-1", "must be positive"),
        ("batch,m,n,k,tflops\n1,256,256,256,1\n1,256,256,256,2", "given twice"),
        ("batch,m,n,k,tflops\n1,256,256,256,1\n1,512,256,512,2", "no row for batch=1, m=256, n=256, k=512"),
        ("batch,m,n,k,tflops\n", "no rows"),
    ],
)
def test_malformed_gemm_tables_name_the_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "gemm.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        GemmTable.from_csv(path)
