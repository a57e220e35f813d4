"""What a rank computes and sends, against counts by hand and the exchange rules that the real layers are held to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hp_plugin.exchange.rules import RULES
from hp_plugin.planner.counts.ends import embedding, head
from hp_plugin.planner.counts.exchange import exchanged
from hp_plugin.planner.counts.gradients import bucket_parameters, chunk_sync, end_of_step, optimizer_bytes
from hp_plugin.planner.counts.layer import attention_backward, attention_forward, layer_passes, mlp_forward
from hp_plugin.planner.counts.program import Collective, collectives, operations, received
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.counts.stages import RankParameters, build_stages
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from hp_plugin.planner.machine.hardware import load_hardware

ODD = ModelShape("odd", 3, 40, 12, 6, 20, 72, 104, gated=True)
"""D 40, 12 heads of 20, 6 groups, MLP 72: nothing square."""


def share(layout: str, model: ModelShape = ODD, mode: str = "train", seq: int = 24, batch: int = 64) -> Share:
    return Share.on(load_hardware("h100-ib"), model, Layout.parse(layout), Workload(mode, seq, batch))


def sizes(mine: Share) -> dict[str, int]:
    layout = mine.layout
    return {"tp": layout.tp, "dim": layout.n, "head": layout.m, "cp": layout.cp, "ep": layout.ep, "dp": layout.dp}


def listed(program: tuple[object, ...]) -> list[tuple[str, str, float]]:
    return [(each.kind, each.axis, each.bytes) for each in collectives(program)]  # type: ignore[arg-type]


def test_stock_tensor_parallel_layer_by_hand() -> None:
    """Without sequence parallelism: one sum of [s, b, D] after each half, forward and backward."""
    mine = share("tp=2,mbs=3")
    hidden = 3 * 24 * 40 * 2
    passes = layer_passes(mine, moe=False)
    assert listed(passes.forward) == [("all_reduce", "tp", hidden)] * 2
    assert listed(passes.backward) == [("all_reduce", "tp", hidden)] * 2


def test_sequence_parallel_layer_by_hand() -> None:
    mine = share("tp=2,mbs=3,sp")
    hidden = 3 * 24 * 40 * 2
    gather, scatter = ("all_gather", "tp", hidden), ("reduce_scatter", "tp", hidden)
    passes = layer_passes(mine, moe=False)
    assert listed(passes.forward) == [gather, scatter] * 2
    # Output gradient gathered, input gathered again for the weight gradient, input gradient scattered: twice.
    assert listed(passes.backward) == [gather, gather, scatter] * 2


def test_operations_of_a_layer_add_up_over_ranks() -> None:
    """Products of TP ranks add to the model's own; backward has twice as many; fused attention counts half and 2.5."""
    tokens, seq = 3 * 24, 24
    dense = 2 * tokens * (40 * (12 + 2 * 6) * 20 + 12 * 20 * 40 + 3 * 40 * 72)
    attention = 4 * 3 * 12 * seq * seq / 2 * 20
    for text in ("tp=1,mbs=3", "tp=2,mbs=3", "tp=6,mbs=3,sp"):
        mine = share(text)
        passes = layer_passes(mine, moe=False)
        assert operations(passes.forward) * mine.P == pytest.approx(dense + attention), text
        assert operations(passes.backward) * mine.P == pytest.approx(2 * dense + 2.5 * attention), text


def test_grids_compute_what_stock_computes() -> None:
    stock = layer_passes(share("tp=4,mbs=8"), moe=False)
    for text in ("grid=2x2,exchange=batch,mbs=8", "grid=2x2,exchange=sequence,mbs=8", "grid=1x4,exchange=batch,mbs=8"):
        grid = layer_passes(share(text), moe=False)
        assert operations(grid.forward) == pytest.approx(operations(stock.forward)), text
        assert operations(grid.backward) == pytest.approx(operations(stock.backward)), text


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("exchange", list(RULES))
@pytest.mark.parametrize(("m", "n"), [(2, 2), (3, 4), (1, 5), (6, 2)])
def test_exchanges_move_what_their_rules_say(exchange: str, m: int, n: int, rotary: bool) -> None:
    """Bytes received in the dim group per layer, forward and backward, equal the closed forms of the exchange rules."""
    model = replace(ODD, rotary=rotary)
    mine = share(f"grid={m}x{n},exchange={exchange},mbs={2 * n}", model, seq=520 * n if exchange == "scores" else 8 * n)
    if RULES[exchange].missing(mine.attention_shape):
        pytest.skip(f"{exchange} cannot carry this shape")
    rule, shape = RULES[exchange], mine.attention_shape
    forward = received(attention_forward(mine), sizes(mine)).get("dim", 0.0)
    assert forward == pytest.approx(rule.bytes(shape, 2), rel=1e-9, abs=4)
    backward = received(attention_backward(mine), sizes(mine)).get("dim", 0.0)
    assert backward == pytest.approx(2 * rule.elements_backward(shape), rel=1e-9, abs=4)


@pytest.mark.parametrize(("norm_biases", "sums"), [(False, 1), (True, 2)])
def test_norms_of_queries_and_keys_by_hand(norm_biases: bool, sums: int) -> None:
    """Slices sum their squares (and means) over the dim group; the weights' gradients are summed over all ranks."""
    model = replace(ODD, qk_norm=True, norm_biases=norm_biases)
    mine = share("grid=2x2,exchange=scores,mbs=3", model)
    fp32 = 4 * 24 * 3
    norms = [("all_reduce", "dim", 6 * fp32), ("all_reduce", "dim", 3 * fp32)] * sums
    assert listed(attention_forward(mine))[: 2 * sums] == norms
    assert [each for each in listed(attention_backward(mine)) if each in norms] == norms
    plain = listed(attention_forward(share("grid=2x2,exchange=batch,mbs=4", model)))
    assert plain == listed(attention_forward(share("grid=2x2,exchange=batch,mbs=4")))
    stages = build_stages(model, mine.layout)
    (found,) = [each.bytes for each in end_of_step(mine, stages) if each.axis == "tp"]
    assert found == 3 * 2 * 20 * sums * 4


def test_batch_trade_by_hand() -> None:
    """2 × 2 grid, b = 4, s = 24: q, k and v of 6 + 2·3 slots of 10 channels there, 6 slots back."""
    trades = [each for each in listed(attention_forward(share("grid=2x2,exchange=batch,mbs=4"))) if each[1] == "dim"]
    qkv, context = 24 * 4 * (6 + 2 * 3) * 10 * 2, 24 * 4 * 6 * 10 * 2
    assert trades == [("all_to_all", "dim", qkv), ("all_to_all", "dim", context)]
    back = [each for each in listed(attention_backward(share("grid=2x2,exchange=batch,mbs=4"))) if each[1] == "dim"]
    assert back == trades[::-1]


def test_the_reduction_that_runs_beside_the_weight_gradient() -> None:
    blocks = [block for block in attention_backward(share("tp=2,mbs=3")) if block.collectives]
    assert [block.overlap for block in blocks] == [True]
    assert blocks[0].kernels[0].name == "qkv weight gradient"


def test_a_grid_with_one_slice_is_stock() -> None:
    for pick in (attention_forward, attention_backward, mlp_forward):
        assert pick(share("grid=6x1,mbs=2")) == pick(share("tp=6,mbs=2"))


def test_stock_beyond_the_key_value_heads_gathers_all_of_qkv() -> None:
    """12 ranks, 6 groups: every rank gathers s·b·(h + 2g)·d and scatters its gradient; the grid moves a fraction."""
    mine = share("tp=12,mbs=4")
    whole = 24 * 4 * (12 + 12) * 20 * 2
    assert ("all_gather", "tp", whole) in listed(attention_forward(mine))
    assert ("reduce_scatter", "tp", whole) in listed(attention_backward(mine))
    names = [kernel.name for block in attention_forward(mine) for kernel in block.kernels]
    assert names.index("join gathered qkv") < names.index("rotary embedding")
    grid = share("grid=6x2,exchange=batch,mbs=4")
    stock_bytes = received(attention_forward(mine), sizes(mine))["tp"]
    grid_bytes = sum(received(attention_forward(grid), sizes(grid)).values())
    shared = 24 * 4 * 40 * 2 * 2 * 11 / 12  # the sum of [s, b, D] that both have
    assert grid_bytes - shared < (stock_bytes - shared) / 6


def test_context_parallel_ring_by_hand() -> None:
    mine = share("tp=2,cp=3,mbs=2", seq=48)
    sends = [each for each in listed(attention_forward(mine)) if each[1] == "cp"]
    # k and v of 3 groups of 20 channels, 16 positions, 2 samples, 2 bytes, passed on twice.
    assert sends == [("send_recv", "cp", 2 * 3 * 20 * 16 * 2 * 2)] * 2
    # A grid's rank has half of the samples in `batch`, half of the channels in `local`.
    for exchange in ("batch", "local"):
        grid = share(f"grid=2x2,cp=3,mbs=2,exchange={exchange}", seq=48)
        sends = [each for each in listed(attention_forward(grid)) if each[1] == "cp"]
        assert sends == [("send_recv", "cp", 2 * 3 * 20 * 16 * 2 * 2 / 2)] * 2, exchange


def test_unfused_attention_beyond_256_channels_in_training_only() -> None:
    wide = replace(ODD, h=2, g=2, d=512)
    names = [kernel.name for block in exchanged(share("mbs=1", wide)).core for kernel in block.kernels]
    assert names == ["scores", "softmax", "context"]
    forward = exchanged(share("mbs=1", wide, mode="forward")).core
    assert [kernel.name for block in forward for kernel in block.kernels] == ["attention"]
    narrow = exchanged(share("grid=1x4,exchange=local,mbs=1", wide)).core
    assert [kernel.name for block in narrow for kernel in block.kernels] == ["attention"]  # slices of 128 channels


def test_decode_reads_the_cache_of_its_share() -> None:
    """Context 24, 8 sequences: stock ranks beyond g read a whole head each, a grid rank its samples' share."""
    gqa = replace(ODD, h=12, g=2)
    stock = exchanged(share("tp=4,mbs=8", gqa, mode="decode")).core[0].kernels[0]
    assert stock.bytes == 2 * 8 * 1 * 20 * 24 * 2  # type: ignore[union-attr]
    grid = exchanged(share("grid=2x2,exchange=batch,mbs=8", gqa, mode="decode")).core[0].kernels[0]
    assert grid.bytes == stock.bytes / 2  # type: ignore[union-attr]


def test_recomputation_repeats_the_forward_pass_with_its_collectives() -> None:
    plain, full = layer_passes(share("tp=2,mbs=2"), False), layer_passes(share("tp=2,mbs=2,recompute=full"), False)
    assert full.backward == plain.forward + plain.backward
    wide = replace(ODD, h=2, g=2, d=512)
    selective = layer_passes(share("mbs=1,recompute=selective", wide), False)
    extra = operations(selective.backward) - operations(layer_passes(share("mbs=1", wide), False).backward)
    assert extra == 2 * 2 * (24 * 24 * 512) * 2  # scores and context of two heads


MOE = ModelShape("moe", 2, 40, 12, 12, 20, 72, experts=8, top_k=2)


def test_megatron_experts_by_hand() -> None:
    """tp 4, ep 4, 96 tokens: a rank routes 96·2/4 copies of 40 channels there and back."""
    mine = share("tp=4,ep=4,mbs=4,sp", MOE)
    trade, gates = ("all_to_all", "ep", 48 * 40 * 2), ("all_to_all", "ep", 48 * 4)
    forward = [each for each in listed(layer_passes(mine, moe=True).forward) if each[1] == "ep"]
    assert forward == [("all_gather", "ep", 4 * 8 * 8), trade, gates, trade]  # first, what each rank will send
    backward = [each for each in listed(layer_passes(mine, moe=True).backward) if each[1] == "ep"]
    assert backward == [trade, trade, gates]


def test_without_sequence_parallelism_megatron_routes_the_same_tokens_on_every_rank() -> None:
    mine = share("tp=4,ep=4,mbs=96", MOE, mode="decode", batch=96)
    trades = [
        each for each in listed(layer_passes(mine, moe=True).forward) if each[0] == "all_to_all" and each[2] > 4 * 192
    ]
    assert trades == [("all_to_all", "ep", 96 * 2 * 40 * 2)] * 2
    deepspeed = share("tp=4,ep=4,mbs=96,moe=deepspeed", MOE, mode="decode", batch=96)
    trades = [each for each in listed(layer_passes(deepspeed, moe=True).forward) if each[0] == "all_to_all"]
    assert trades == [("all_to_all", "ep", 96 * 2 * 40 * 2 / 4)] * 2


@pytest.mark.parametrize("k", [1, 2])
def test_deepspeeds_own_operators_touch_every_token_on_every_rank(k: int) -> None:
    """In hidden sizes of 16 bit, as counted on deepspeed 0.19.8: 24 (k = 1) and 36 (k = 2) forward, 32 and 49 back."""
    mine = share("tp=4,ep=4,mbs=4,moe=deepspeed", replace(MOE, top_k=k))
    passes = layer_passes(mine, moe=True)
    for program, names, measured in (
        (passes.forward, ("encode tokens", "decode tokens"), {1: 24.2, 2: 35.9}[k]),
        (passes.backward, ("decode gradients", "encode gradients"), {1: 32.2, 2: 49.4}[k]),
    ):
        streams = [kernel for block in program for kernel in block.kernels if kernel.name in names]
        counted = sum(kernel.bytes for kernel in streams) / mine.hidden_bytes  # type: ignore[union-attr]
        # The router's own product and its gradients are priced apart: 1 and 2 hidden sizes.
        assert counted == pytest.approx(measured - {1: 1, 2: 1}[k], rel=0.12)


def test_deepspeed_experts_gather_what_tensor_ranks_split() -> None:
    mine = share("tp=4,ep=4,mbs=4,moe=deepspeed", MOE)
    mlp = listed(layer_passes(mine, moe=True).forward)[1:]
    assert mlp == [("all_to_all", "ep", 48 * 40 * 2)] * 2 + [("all_gather", "tp", 96 * 40 * 2 * 2)]
    replicated = share("dp=4,ep=4,mbs=4,moe=deepspeed", MOE)
    assert [axis for _, axis, _ in listed(layer_passes(replicated, moe=True).forward)] == ["ep", "ep"]


def test_expert_operations_add_up_over_ranks() -> None:
    mine = share("tp=4,ep=4,mbs=4,sp", MOE)
    per_rank = operations(layer_passes(mine, True).forward) - operations(attention_forward(mine))
    tokens = 96
    assert per_rank * 4 == pytest.approx(2 * tokens * (2 * 2 * 40 * 72 + 40 * 8))


def test_few_tokens_read_the_experts_they_choose_alone() -> None:
    """Three top-2 tokens choose 6 of 8 experts at most, one row each; 16 rows over 8 experts are 2 rows each."""
    for tokens, experts, rows in ((3, 6, 1), (1, 2, 1), (8, 8, 2)):
        mine = share(f"mbs={tokens}", MOE, mode="decode", batch=tokens)
        kernels = [kernel for block in layer_passes(mine, True).forward for kernel in block.kernels]
        (first,) = [kernel for kernel in kernels if kernel.name == "expert fc1"]
        assert (first.batch, first.m) == (experts, rows)  # type: ignore[union-attr]


def test_ends_of_the_model_by_hand() -> None:
    """Vocabulary 104 over 2 ranks, 72 tokens: embedding sum; three sums of one fp32 number per token in the loss."""
    mine = share("tp=2,mbs=3")
    hidden = 72 * 40 * 2
    assert listed(embedding(mine).forward) == [("all_reduce", "tp", hidden)]
    assert listed(head(mine).forward) == [("all_reduce", "tp", 4 * 72)] * 3
    assert listed(head(mine).backward) == [("all_reduce", "tp", hidden)]
    assert operations(head(mine).forward) == 2 * 72 * 40 * 52
    # Decode gathers the logits of its 3 new tokens instead, and draws from them on every rank.
    assert listed(head(share("tp=2,mbs=3", mode="decode")).forward) == [("all_gather", "tp", 3 * 104 * 2)]
    assert listed(head(share("mbs=3", mode="decode")).forward) == []
    bodiless = replace(ODD, vocab=0)
    assert embedding(share("tp=2,mbs=3", bodiless)).forward == ()
    assert operations(head(share("tp=2,mbs=3", bodiless)).forward) == 0


def test_gradient_buckets_conserve_bytes() -> None:
    mine = share("tp=2,dp=4,mbs=1")
    sync = chunk_sync(mine, RankParameters(170e6, 0.0), 0, 0)
    assert len(sync.gradients) == round(170e6 / bucket_parameters(4)) == 4
    assert sum(each.bytes for each in sync.gradients) == pytest.approx(170e6 * 4)
    assert sum(each.bytes for each in sync.weights) == pytest.approx(170e6 * 2)
    assert {each.kind for each in sync.gradients} == {"reduce_scatter"}
    # Megatron-Core cuts buckets on the first rank's first chunk alone.
    for later in ((1, 0), (0, 1)):
        assert len(chunk_sync(mine, RankParameters(170e6, 0.0), *later).gradients) == 1
    replicated = chunk_sync(share("dp=4,mbs=1,zero=replicated"), RankParameters(1e6, 0.0), 0, 0)
    assert [each.kind for each in replicated.gradients] == ["all_reduce"]
    assert replicated.weights == ()
    assert chunk_sync(share("tp=2,mbs=1"), RankParameters(1e6, 0.0), 0, 0).gradients == ()


def test_optimizer_traffic_by_hand() -> None:
    """Adam touches a shard; clearing (4 bytes) and scaling (8) the fp32 gradients touch all of them."""
    chunks = [RankParameters(1e6, 0.0), RankParameters(3e6, 0.0)]
    assert optimizer_bytes(share("tp=2,dp=4,mbs=1"), chunks) == 34 * 1e6 + 12 * 4e6
    assert optimizer_bytes(share("tp=2,mbs=1"), chunks) == (34 + 4) * 4e6
    assert optimizer_bytes(share("dp=4,mbs=1,zero=replicated"), chunks) == (34 + 12) * 4e6
    assert optimizer_bytes(share("dp=4,mbs=1,zero=full"), chunks) == (34 + 4) * 1e6
    experts = [RankParameters(1e6, 2e6)]
    assert optimizer_bytes(share("tp=2,dp=4,ep=4,mbs=1,sp", MOE), experts) == 34 * (1e6 / 4 + 2e6 / 2) + 12 * 3e6


def test_expert_gradients_go_over_the_experts_replicas() -> None:
    mine = share("tp=2,dp=4,ep=4,mbs=1,sp", MOE)
    sync = chunk_sync(mine, RankParameters(1e6, 3e6), 0, 0)
    assert {(each.axis, each.bytes) for each in sync.gradients} == {("dp", 4e6), ("edp", 12e6)}


def test_what_follows_the_last_backward_pass() -> None:
    tied = replace(ODD, tied=True)
    mine = share("tp=2,pp=3,mbs=1,sp", tied)
    norm = Collective("gradient norm", "all_reduce", "world", 8.0)
    embeddings = Collective("sum tied embedding gradients", "all_reduce", "ends", 104 / 2 * 40 * 4)

    def norms(count: int) -> Collective:
        return Collective("sum norm gradients", "all_reduce", "tp", count * 80 * 4)

    first, middle, last = build_stages(tied, mine.layout)
    assert list(end_of_step(mine, [first])) == [embeddings, norms(2), norm]
    assert list(end_of_step(mine, [middle])) == [norms(2), norm]
    assert list(end_of_step(mine, [last])) == [embeddings, norms(3), norm]  # the final norm
    assert end_of_step(share("tp=2,mbs=1", mode="forward"), [first]) == ()


def test_routers_of_stock_experts_are_summed_with_the_norms() -> None:
    for moe, routers in (("megatron", 1), ("deepspeed", 0)):
        mine = share(f"tp=2,mbs=1,sp,ep=2,moe={moe}", MOE)
        stages = build_stages(MOE, mine.layout)
        (found,) = [each.bytes for each in end_of_step(mine, stages) if each.axis == "tp"]
        norms = (2 * MOE.layers + 1) * MOE.norm_parameters
        assert found == 4 * (norms + routers * MOE.moe_layers * MOE.D * MOE.experts)


def test_fully_sharded_weights_travel_beside_each_pass() -> None:
    mine = share("dp=4,mbs=2,zero=full,fused=off")
    passes = layer_passes(mine, False)
    parameters = ODD.layer_parameters(False)
    assert listed(passes.forward) == [("all_gather", "dp", parameters * 2)]
    assert listed(passes.backward) == [("all_gather", "dp", parameters * 2), ("reduce_scatter", "dp", parameters * 4)]
    for program in (passes.forward, passes.backward):
        assert [block.behind for block in program if block.collectives] == [True] * len(listed(program))
