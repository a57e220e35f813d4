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
