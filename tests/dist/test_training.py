"""The reference trainer trains one and the same model on every layout, stock or grid."""

import math

import pytest

from tests.dist.training_runs import train, train_with_other_seed_on
from tests.ranks import Ranks

GATED = (
    "--swiglu --normalization RMSNorm --untie-embeddings-and-output-weights --qk-layernorm --disable-bias-linear "
    "--add-qkv-bias --num-query-groups 2 --rotary-interleaved --rotary-percent 0.5"
)
MASKED = "--position-embedding-type learned_absolute --reset-attention-mask --reset-position-ids --eod-mask-loss"
# The one-rank run that a layout's losses are compared with is the same flags without the layout's.
LAYOUTS = {
    "tp2 pp2": (4, "", "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "dp2, distributed optimizer": (2, "", "--use-distributed-optimizer"),
    "pp2, interleaved": (2, "", "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "tp2, sequence parallel, recompute": (
        2,
        "",
        "--tensor-model-parallel-size 2 --sequence-parallel --recompute-activations",
    ),
    "grid 2x2": (4, "", "--head-dim-parallel 2,2"),
    "grid 2x2 pp2": (8, "", "--head-dim-parallel 2,2 --pipeline-model-parallel-size 2"),
    "grid 1x4, one key/value head": (4, "--num-query-groups 1", "--head-dim-parallel 1,4"),
    "grid 2x2, two heads": (4, "--num-attention-heads 2", "--head-dim-parallel 2,2"),
    "grid 2x2, scores": (4, "", "--head-dim-parallel 2,2 --head-dim-exchange scores"),
    "grid 2x2, head-innermost": (4, "", "--head-dim-parallel 2,2 --head-dim-order head-innermost"),
    "grid 2x2, sequence": (4, "", "--head-dim-parallel 2,2 --head-dim-exchange sequence"),
    "gated tp2": (2, GATED, "--tensor-model-parallel-size 2"),
    "gated grid 1x2 pp2": (
        4,
        GATED,
        "--head-dim-parallel 1,2 --sequence-parallel --pipeline-model-parallel-size 2 "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "masked grid 2x2": (4, MASKED, "--head-dim-parallel auto --tensor-model-parallel-size 4 --num-query-groups 4"),
}
# The interleaved schedule wants as many layers as there are chunks, and one micro-batch per stage.
FOUR_LAYERS = {"pp2, interleaved": "--num-layers 4"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def one_rank(ranks: Ranks, cache: str):
    """Losses of a run on one rank, each run once."""
    known: dict[str, dict[int, float]] = {}

    def run(model: str) -> dict[int, float]:
        if model not in known:
            known[model] = ranks.run(1, train, cache, model)[0][0]
        return known[model]

    return run


def difference(losses: dict[int, float], reference: dict[int, float]) -> float:
    assert losses.keys() == reference.keys()
    return max(abs(losses[iteration] - reference[iteration]) for iteration in reference)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_do_not_depend_on_the_layout(ranks, cache, one_rank, layout):
    world_size, model, flags = LAYOUTS[layout]
    model = f"{model} {FOUR_LAYERS.get(layout, '')}".strip()
    reports = ranks.run(world_size, train, cache, f"{model} {flags}")
    assert all(not losses for losses, _ in reports[:-1])
    losses = reports[-1][0]
    assert len(losses) == 20
    assert losses[20] < losses[1] - 0.5  # the comparison is one of models that learn
    assert difference(losses, one_rank(model)) < 1e-4


RECOMPUTED = "--train-iters 4 --recompute-granularity selective --recompute-modules mlp"


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (1, "--hidden-dropout 0.1"),
        (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        (2, "--head-dim-parallel 1,2"),
        (2, "--head-dim-parallel 1,2 --head-dim-exchange scores --sequence-parallel"),
    ],
)
def test_mlps_with_biases_are_recomputed(ranks, cache, world_size, flags):
    """Stock hangs: the bias parameter itself would be the output of its checkpoint function."""
    expected = ranks.run(world_size, train, cache, f"--train-iters 4 {flags}")[-1][0]
    found = ranks.run(world_size, train, cache, f"{RECOMPUTED} {flags}", timeout=120)[-1][0]
    assert len(found) == 4 and difference(found, expected) < 1e-6


@pytest.mark.parametrize("flags", ["", "--head-dim-parallel 2,2"], ids=["stock", "grid 2x2"])
def test_fp16_skips_nothing_and_stays_near_fp32(ranks, cache, one_rank, flags):
    losses, said = ranks.run(4 if flags else 1, train, cache, f"--fp16 --initial-loss-scale 1024 {flags}")[-1]
    assert said.count("number of skipped iterations:   0 |") == 20
    assert said.count("loss scale: 1024.0 |") == 20
    # fp16 keeps 11 bits: a relative 5e-4 per rounding, and 20 Adam steps turn near-zero gradients into full steps.
    assert difference(losses, one_rank("")) < 2e-2


def test_a_loss_scale_that_overflows_is_skipped_and_halved(ranks, cache):
    losses, said = ranks.run(1, train, cache, "--fp16 --initial-loss-scale 1048576 --hysteresis 1")[0]
    assert "number of skipped iterations:   1 |" in said
    assert "loss scale: 524288.0 |" in said
    assert losses[20] < losses[1] - 0.5


@pytest.mark.parametrize("flags", ["", "--head-dim-parallel 2,2"], ids=["stock", "grid 2x2"])
def test_bf16_stays_near_fp32(ranks, cache, one_rank, flags):
    losses, said = ranks.run(4 if flags else 1, train, cache, f"--bf16 {flags}")[-1]
    assert said.count("number of skipped iterations:   0 |") == 20
    # Three bits less than fp16, so eight times its bound.
    assert difference(losses, one_rank("")) < 1.6e-1


def test_dropout_is_drawn_and_repeats(ranks, cache, one_rank):
    flags = "--attention-dropout 0.1 --hidden-dropout 0.1 --tensor-model-parallel-size 2"
    losses = ranks.run(2, train, cache, flags)[-1][0]
    assert difference(losses, one_rank("")) > 1e-3
    assert ranks.run(2, train, cache, flags)[-1][0] == losses
    recomputed = f"{flags} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    assert difference(ranks.run(2, train, cache, recomputed)[-1][0], losses) < 1e-5


def test_real_text_is_learned(ranks, cache):
    """Bytes of Python source: far below the log(256) = 5.5 of knowing nothing, on text that was not trained on too."""
    flags = (
        "--hidden-size 64 --train-iters 250 --lr-warmup-iters 20 --lr-decay-style cosine "
        "--eval-interval 125 --eval-iters 8"
    )
    losses, said = ranks.run(1, train, cache, flags)[0]
    assert losses[1] > math.log(256)
    assert sum(losses[iteration] for iteration in range(241, 251)) / 10 < 3.0
    assert "validation loss at iteration 250 | lm loss value: 2." in said


def test_ranks_that_disagree_say_what_differs(ranks, cache):
    for message in ranks.run(2, train_with_other_seed_on, 1, cache):
        assert message == "the ranks were started with different options: --seed is 1 on rank 0; 7 on rank 1"
