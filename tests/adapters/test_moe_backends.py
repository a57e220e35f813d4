"""`--moe-backend`: Megatron's mixture and DeepSpeed's are one function, in the trainer and in the launcher."""

from pathlib import Path

import pytest

from hp_plugin.deepspeed_adapter.moe.megatron_lm import take_backend
from tests.adapters.moe_cases import deepspeed_forgotten
from tests.dist.training_runs import train
from tests.ranks import Ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:When using expert parallelism and tensor parallelism:UserWarning:megatron"),
    pytest.mark.filterwarnings("ignore:`sequence_parallel` is set to `True`:UserWarning:megatron"),
]

# Without biases: Megatron's router has one of its own, which DeepSpeed's gate lacks.
MIXTURE = (
    "--disable-bias-linear --num-experts 4 --moe-router-topk 1 --moe-router-pre-softmax --moe-aux-loss-coeff 0.01 "
    "--train-iters 4"
)
GRID = "--head-dim-parallel 2,2 --sequence-parallel --expert-model-parallel-size 4 --expert-tensor-parallel-size 1"


def losses_of(cache: str, flags: str) -> tuple[dict[int, float], str]:
    with deepspeed_forgotten():
        return train(cache, flags)


def test_both_backends_on_a_grid_equal_one_rank(ranks: Ranks, tmp_path: Path) -> None:
    ((expected, _),) = ranks.run(1, losses_of, str(tmp_path), f"{MIXTURE} --moe-backend deepspeed")
    for backend in ("deepspeed", "megatron"):
        found, said = ranks.run(4, losses_of, str(tmp_path), f"{MIXTURE} {GRID} --moe-backend {backend}")[-1]
        assert found == pytest.approx(expected, abs=1e-4)
        assert "load_balancing_loss: 1." in said
        assert ("dropped_token_share: 0.000000E+00" in said) == (backend == "deepspeed")


# Plain SGD with a large step, and a norm that is always clipped: a gradient that lacks a share or counts twice shows.
STEEP = "--num-experts 4 --moe-router-topk 2 --train-iters 3 --optimizer sgd --lr 0.5 --clip-grad 0.5"
PLAIN = f"{STEEP} --disable-bias-linear"
WHOLE = "--sequence-parallel --expert-tensor-parallel-size 1"
SPREAD = "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1"


@pytest.mark.parametrize(
    ("flags", "reference", "layout"),
    [
        (PLAIN, (1, ""), (2, f"--tensor-model-parallel-size 2 {WHOLE}")),
        (PLAIN, (1, ""), (2, f"--head-dim-parallel 1,2 {WHOLE}")),
        (
            f"{PLAIN} --swiglu",
            (1, ""),
            (4, "--head-dim-parallel 2,2 --sequence-parallel --expert-tensor-parallel-size 2"),
        ),
        (
            f"{PLAIN} --optimizer adam --lr 1e-2",
            (1, ""),
            (4, f"--head-dim-parallel 1,2 --micro-batch-size 2 {WHOLE} --use-distributed-optimizer"),
        ),
        # Stock's experts with biases do not run on one rank: here they are spread over data-parallel ones.
        (STEEP, (2, SPREAD), (2, f"--head-dim-parallel 1,2 --sequence-parallel {SPREAD}")),
    ],
    ids=["stock", "grid", "halved", "replicas", "biases"],
)
def test_megatrons_experts_have_whole_gradients_on_every_layout(
    ranks: Ranks, tmp_path: Path, flags: str, reference: tuple[int, str], layout: tuple[int, str]
) -> None:
    runs = [ranks.run(world, losses_of, str(tmp_path), f"{flags} {more}")[-1][0] for world, more in (reference, layout)]
    assert runs[1] == pytest.approx(runs[0], abs=2e-6)


def test_the_launcher_takes_its_flag_out_of_the_command_line() -> None:
    words = ["--num-experts", "4", "--lr", "1"]
    assert take_backend(words) == (words, "megatron")
    assert take_backend(["--moe-backend", "deepspeed", *words]) == (words, "deepspeed")
    assert take_backend([*words, "--moe-backend=megatron"]) == (words, "megatron")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--moe-backend"], "must be one of megatron, deepspeed, got ''"),
        (["--moe-backend=tutel"], "must be one of megatron, deepspeed, got 'tutel'"),
        (["--moe-backend", "deepspeed"], "give --num-experts with it"),
    ],
    ids=["nothing", "unknown", "dense"],
)
def test_the_launcher_refuses_in_words(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        take_backend(words)
