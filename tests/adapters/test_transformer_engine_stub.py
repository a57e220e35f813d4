"""Grids through Transformer Engine's layer spec, beside a stub with its signatures, attributes and asserts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STUB = ROOT / "tests" / "te_stub"
VERSIONS = list(json.loads((STUB / "transformer_engine" / "signatures.json").read_text("utf-8")))
FP32 = 2e-5
EQUAL = [
    *(f"{name}{fused}" for name in ("batch", "sequence", "scores") for fused in ("", ", fused rotary", ", norms")),
    *("batch, biases in QKV", "4x1", "batch, full recompute", "batch, window", "batch, FP8", "scores, FP8"),
    "batch, d = 260, fused",
]
# What differs between releases: arguments of linears and attention, rotary kernels, FP8's states.
ELSEWHERE = ["batch, fused rotary", "scores, norms", "batch, FP8"]
LINEARS = [
    *("HeadDimTELayerNormColumnParallelLinear", "HeadDimTERowParallelLinear"),
    *("TELayerNormColumnParallelLinear", "TERowParallelLinear"),
]
BROKEN = {
    # What is passed wrongly, and what the stub says of it as Transformer Engine would.
    "wrong group": "Keys and values must have 0 heads! Found 1.",
    "wrong head count": "Keys and values must have 2 heads! Found 1.",
    "changed signature": "unexpected keyword argument 'zero_centered_gamma'",
}
REFUSED = {
    "weights": "exchange `weights` gathers for Megatron-Core's own linears only, not for those of",
    "weights, FP8": "exchange `weights` cannot do fp8 or fp4",
    "FP8, narrow slices": "fp8 (delayed) works on blocks of 16, and a rank of 2,2 has 8 columns of linear_proj",
    "MXFP8, narrow slices": "fp8 (mxfp8) works on blocks of 32, and a rank of 2,2 has 16 columns of linear_proj",
    "FP8 parameters": "--fp8-param-gather keeps quantized weights",
    "userbuffers": "--tp-comm-overlap: userbuffers own the ranks of a TP group",
}


@pytest.fixture(scope="module", params=VERSIONS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What four ranks saw beside one release's stub, in processes that have not met another."""
    result = tmp_path_factory.mktemp("te") / "result.json"
    environment = os.environ | {
        "PYTHONPATH": f"{STUB}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "TE_STUB_VERSION": request.param,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += ["tests/adapters/te_ranks.py", str(result), *([] if request.param == VERSIONS[-1] else ELSEWHERE)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    results: dict[str, Any] = json.loads(result.read_text("utf-8"))
    assert results["have"] and results["version"] == request.param
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUAL)
def test_losses_and_gradients_are_those_of_one_stock_rank(found: dict[str, Any], name: str) -> None:
    if name not in ELSEWHERE and found["version"] != VERSIONS[-1]:
        pytest.skip("beside the newest release")
    outcome = found[f"equal: {name}"]
    assert "raised" not in outcome, outcome["trace"]
    assert outcome["losses"] < FP32 and outcome["gradients"][1] < FP32, outcome
    if "FP8" in name:
        # The amax of all four linears of a layer, over every rank of the grid; attention only where it is the stub's.
        core = ["HeadDimTEDotProductAttention"] if name.startswith("batch") else []
        assert outcome["fp8 modules"] == [*core, *LINEARS] and outcome["fp8 group"] == [4]
    assert (outcome["fused calls"] > 0) == ("fused" in name.split(", ") and "260" in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_in_words(found: dict[str, Any], name: str) -> None:
    outcome = found[f"refused: {name}"]
    assert outcome["raised"] in ("ValueError", "RefusedError") and REFUSED[name] in outcome["text"], outcome


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_the_stub_catches_a_call_that_is_wrong_on_purpose(found: dict[str, Any], name: str) -> None:
    outcome = found[f"broken: {name}"]
    assert isinstance(outcome, dict) and BROKEN[name] in outcome["text"], outcome
