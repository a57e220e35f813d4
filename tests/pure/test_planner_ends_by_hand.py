"""What stands before the first and behind the last layer, in order, and the parameters of each stage, by hand.

D = 8 and a vocabulary of 10; 16 tokens in 16 bit, so that a hidden state is 256 bytes and there are 160 logits.
"""

from __future__ import annotations

from dataclasses import replace

from hp_plugin.planner.counts.ends import embedding, head
from hp_plugin.planner.counts.gradients import end_of_step
from hp_plugin.planner.counts.parts import parts_of, passes_of
from hp_plugin.planner.counts.share import Share
from hp_plugin.planner.counts.stages import RankParameters
from hp_plugin.planner.inputs.layout import Layout
from hp_plugin.planner.inputs.model_shape import ModelShape
from hp_plugin.planner.inputs.workload import Workload
from tests.programs import listed

MODEL = ModelShape("tiny", 3, 8, 4, 2, 4, 24, vocab=10)


def share(layout: str, **changes: object) -> Share:
    return Share(replace(MODEL, **changes), Layout.parse(f"{layout},mbs=2"), Workload("train", 8, 8))


def test_embeddings() -> None:
    """Rows are read and written; a learned position is read beside each."""
    for changes, read in (({}, 2), ({"learned_positions": 8}, 3)):
        alone = embedding(share("tp=1", **changes))
        assert listed(alone.forward) == [("embedding", read * 256)]
        assert listed(alone.backward) == [("embedding gradient", read * 256)]
    assert listed(embedding(share("tp=2")).forward)[1:] == [("all_reduce", "tp", 256)]
    assert len(listed(embedding(share("tp=2")).backward)) == 1
    split = embedding(share("tp=2,sp"))
    assert listed(split.forward)[1:] == [("reduce_scatter", "tp", 256)]
    assert listed(split.backward) == [("all_gather", "tp", 256), ("embedding gradient", 512)]
    # Positions are added in between, so that the sum is taken whole.
    assert listed(embedding(share("tp=2,sp", learned_positions=8)).forward)[1:] == [("all_reduce", "tp", 256)]
    assert embedding(share("tp=1", vocab=0)).forward == ()


def test_logits_and_loss() -> None:
    """Megatron-Core's vocabulary-parallel loss moves 54 bytes a logit, two thirds of them forward; PyTorch's own 30."""
    alone = head(share("tp=1"))
    assert listed(alone.forward) == [("final norm", 2 * 256), ("logits", 16, 10, 8, 1), ("loss", 36 * 160)]
    assert listed(alone.backward) == [
        ("loss gradient", 18 * 160),
        ("logits input gradient", 16, 8, 10, 1),
        ("logits weight gradient", 10, 8, 16, 1, "+="),
        ("final norm gradient", 3 * 256),
    ]
    plain = head(share("tp=1,fused=off"))
    assert ("loss", 20 * 160) in listed(plain.forward) and ("loss gradient", 10 * 160) in listed(plain.backward)
    # Largest logit, target's logit and sum of exponentials, an fp32 number for each of 16 tokens.
    assert listed(head(share("tp=2")).forward)[1:] == [
        ("logits", 16, 5, 8, 1),
        ("loss", 36 * 80),
        *[("all_reduce", "tp", 4 * 16)] * 3,
    ]
    body = head(share("tp=2,sp", vocab=0))
    assert (listed(body.forward), listed(body.backward)) == ([("final norm", 256)], [("final norm gradient", 384)])


def test_parameters_of_stages() -> None:
    """A layer has 768 in its linears and two LayerNorms of 16; 80 are an embedding, and 16 the last norm."""
    assert [found.dense for found in share("pp=3").parameters] == [800 + 80, 800, 800 + 16 + 80]
    assert [found.dense for found in share("tp=2,pp=3").parameters] == [416 + 40, 416, 416 + 16 + 40]
    # A tied matrix is there once on one stage, and on both ends of several.
    assert [found.dense for found in share("tp=1", tied=True).parameters] == [3 * 800 + 80 + 16]
    assert [found.dense for found in share("pp=3", tied=True).parameters] == [880, 800, 896]
    # Norms of queries and of keys, 4 channels with a bias each, are whole on every rank.
    assert [found.dense for found in share("tp=2,pp=3", qk_norm=True).parameters] == [472, 432, 488]
    assert RankParameters(3.0, 40.0).total == 43.0


def test_ends_on_the_share_where_weights_move() -> None:
    """2 × 2 ranks, 10 words of 8 channels: 5 on a head group are 80 bytes; 8 of 16 tokens, 128 bytes of states."""
    model = ModelShape("tiny", 2, 8, 4, 2, 4, 24, 10)
    mine = Share(model, Layout.parse("grid=2x2,exchange=weights,mbs=2"), Workload("train", 8, 8))
    assert mine.moved_ends == (True, True)
    first = passes_of(mine, "first")
    gather, reduce = ("all_gather", "dim", 80), ("reduce_scatter", "dim", 80)
    assert listed(first.forward) == [gather, ("embedding", 2 * 128), ("all_reduce", "head", 128)]
    assert listed(first.backward) == [("embedding gradient", 2 * 128), reduce]
    last = passes_of(mine, "last")
    sums = [("all_reduce", "head", 4 * 8)] * 3
    assert listed(last.forward) == [
        ("final norm", 2 * 128),
        gather,
        ("logits", 8, 5, 8, 1),
        ("loss", 54 * 5 * 8 * 2 / 3),
        *sums,
        ("all_gather", "dim", 4 * 16),
    ]
    assert listed(last.backward) == [
        ("loss gradient", 54 * 5 * 8 / 3),
        gather,
        ("logits input gradient", 8, 8, 5, 1),
        ("logits weight gradient", 5, 8, 8, 1, "+="),
        ("all_reduce", "head", 128),
        reduce,
        ("final norm gradient", 3 * 128),
    ]
    # No tokens go to their ranks or back then, and the others' gradients are summed over the dim axis.
    (stage,) = set(mine.stages)
    assert parts_of(mine, stage) == {"dense": 1, "moe": 0, "first": 1, "last": 1, "dense ends embedded read": 1}
    layer = [each for each in listed(passes_of(mine, "dense ends embedded read").forward) if each[0] == "all_gather"]
    assert len(layer) == 1, "weights alone"
    both = [each for each in listed(passes_of(mine, "dense ends").forward) if each[0] == "all_gather"]
    assert both == [*layer, ("all_gather", "dim", 256)]
    assert [each.bytes for each in end_of_step(mine, mine.stages) if each.axis == "dim"] == [4.0 * (2 * 2 * 16 + 16)]
    many = replace(mine, model=replace(model, vocab=100))
    assert many.moved_ends == (False, False)
    assert replace(mine, layout=Layout.parse("grid=2x2,exchange=batch,mbs=2")).moved_ends == (False, False)
    other = replace(mine, layout=Layout.parse("grid=2x2,exchange=weights,mbs=2,order=head-innermost"))
    assert other.moved_ends == (False, False)
