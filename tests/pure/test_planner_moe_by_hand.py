"""Every kernel and every message of a layer of experts, in order, for one small model.

D = 8 and 4 experts of width 24, two on each of two ranks, of which 2 see a token; 16 tokens in 16 bit, so that a hidden
state is 256 bytes. Expert groups of two ranks get 32 rows (of 8 channels, 512 bytes) from each rank, 16 an expert.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from hp_plugin.planner.counts.moe import moe_backward, moe_forward, routed_tokens
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from tests.programs import listed

MODEL = ModelShape("tiny", 2, 8, 4, 2, 4, 24, experts=4, top_k=2)


def share(layout: str, mode: str = "train", **changes: object) -> Share:
    return Share(replace(MODEL, **changes), Layout.parse(f"{layout},mbs=2"), Workload(mode, 8, 8))


# Two reads or writes of a hidden state in a norm, three around a residual; three in a norm's gradient.
NORM, RESIDUAL, NORM_GRADIENT = ("norm", 512), ("residual", 768), ("norm", 768)
# Rows are read and written when they are put in order.
PERMUTED, PERMUTED_BACK = ("permute tokens", 1024), ("permute gradients", 1024)


def experts(rows: int) -> list[tuple[object, ...]]:
    return [
        ("expert fc1", rows, 24, 8, 2),
        ("expert activation", 2 * rows * (24 + 24) * 2),
        ("expert fc2", rows, 8, 24, 2),
    ]


def experts_back(rows: int) -> list[tuple[object, ...]]:
    return [
        ("expert fc2 input gradient", rows, 24, 8, 2),
        ("expert fc2 weight gradient", 8, 24, rows, 2, "+="),
        # Reads fc1's output and the gradient, writes the gradient of fc1's output.
        ("expert activation gradient", 2 * rows * (24 + 24 + 24) * 2),
        ("expert fc1 input gradient", rows, 8, 24, 2),
        ("expert fc1 weight gradient", 24, 8, rows, 2, "+="),
    ]


ROUTER_BACK = [("router input gradient", 16, 8, 4, 1), ("router weight gradient", 4, 8, 16, 1, "+=")]


def test_megatron_core() -> None:
    mine = share("dp=2,ep=2")
    assert listed(moe_forward(mine)) == [
        NORM,
        ("router", 16, 4, 8, 1),
        PERMUTED,
        ("all_gather", "ep", 8 * 4 * 2),  # how many rows each expert gets from each of 2 ranks, 64 bit
        ("all_to_all", "ep", 512),
        ("all_to_all", "ep", 4 * 32),  # the gates, fp32
        *experts(16),
        ("all_to_all", "ep", 512),
        PERMUTED,
        RESIDUAL,
    ]
    assert listed(moe_backward(mine)) == [
        RESIDUAL,
        PERMUTED_BACK,
        ("all_to_all", "ep", 512),
        *experts_back(16),
        ("all_to_all", "ep", 512),
        ("all_to_all", "ep", 4 * 32),
        PERMUTED_BACK,
        *ROUTER_BACK,
        NORM_GRADIENT,
    ]


def test_gated_experts_have_a_first_linear_twice_as_wide() -> None:
    mine = share("dp=2,ep=2", gated=True)
    kernels = dict((name, sizes) for name, *sizes in listed(moe_forward(mine)) + listed(moe_backward(mine)))
    assert kernels["expert fc1"] == [16, 48, 8, 2] and kernels["expert fc2"] == [16, 8, 24, 2]
    assert kernels["expert activation"] == [2 * 16 * (48 + 24) * 2]
    assert kernels["expert activation gradient"] == [2 * 16 * (48 + 48 + 24) * 2]
    assert kernels["expert fc1 input gradient"] == [16, 8, 48, 2]
    assert kernels["expert fc1 weight gradient"] == [48, 8, 16, 2, "+="]


@pytest.mark.parametrize("sp", [False, True])
def test_deepspeed_under_tensor_parallelism(sp: bool) -> None:
    """Each of two ranks routes all 16 tokens and sends half of the rows, 256 bytes; what experts give is gathered."""
    mine = share("tp=2,ep=2,moe=deepspeed" + (",sp" if sp else ""))
    tokens = [("all_gather", "tp", 256)] if sp else []
    half = 2 if sp else 1  # norms and residuals see their own tokens
    assert listed(moe_forward(mine)) == [
        ("norm", 512 / half),
        *tokens,
        ("router", 16, 4, 8, 1),
        # Hidden states of 16 bit: 6 for the gate's fp32 copy and the padded copy, 2 for each choice's slots.
        ("encode tokens", (6 + 2 * 2) * 256),
        ("all_to_all", "ep", 256),
        *experts(8),
        ("all_to_all", "ep", 256),
        ("all_gather", "tp", 2 * 256),
        ("decode tokens", (5 + 2 * 9) * 256),
        ("residual", 768 / half),
    ]
    assert listed(moe_backward(mine)) == [
        ("residual", 768 / half),
        *tokens,
        ("decode gradients", (12 + 2 * 14) * 256),
        ("all_to_all", "ep", 256),
        *experts_back(8),
        ("all_to_all", "ep", 256),
        ("all_gather", "tp", 2 * 256),
        ("encode gradients", (1 + 2 * 3) * 256),
        *ROUTER_BACK,
        ("norm", 768 / half),
    ]


def test_rows_that_a_rank_sends() -> None:
    assert routed_tokens(share("dp=2,ep=2")) == 32
    assert routed_tokens(share("tp=2,sp,ep=2")) == 16  # its own 8 tokens
    assert routed_tokens(share("tp=2,ep=2", mode="decode")) == 2 * 2  # both ranks route the same two tokens
    assert routed_tokens(share("tp=2,ep=2,moe=deepspeed", mode="decode")) == 2
    assert routed_tokens(share("tp=4,ep=4,moe=deepspeed", mode="decode", top_k=1)) == 1, "at least one"


def test_fewer_rows_than_experts_meet_as_many_experts_as_there_are_rows() -> None:
    names = dict((name, sizes) for name, *sizes in listed(moe_forward(share("tp=4,moe=deepspeed", "decode", top_k=1))))
    assert names["expert fc1"] == [1, 24, 8, 1]  # 2 tokens over 4 ranks: one row
    names = dict((name, sizes) for name, *sizes in listed(moe_forward(share("tp=1", "decode", top_k=3, experts=4))))
    assert names["expert fc1"] == [2, 24, 8, 4]  # 6 rows over 4 experts, the fullest has 2
