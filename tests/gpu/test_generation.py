"""Generation with four ranks on one GPU: tokens and logits beside caches, against one rank that caches nothing."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest

from hp_plugin.generation.sampling import Sampling
from hp_plugin.training.config import TrainingConfig
from tests.dist.test_generation import DEEPSPEED, EXPERTS, MHA, MODEL, MQA, compared, on, prompts
from tests.gpu.rehearsal import marked
from tests.ranks import Ranks

# name: (model and layout, lengths of the prompts)
CASES = {
    "by sequences": (on(MODEL, "2,2"), (3, 9, 5, 8)),
    "by tokens": (on(MODEL, "2,2", "sequence"), (4, 4)),
    "one key/value head": (on(MQA, "1,4"), (16, 13, 8)),
    "4x1": (on(MHA, "4,1"), (3, 9, 5)),
    "weights": (on(MODEL, "2,2", "weights"), (3, 8)),
    "Megatron's mixture": (on(EXPERTS, "2,2"), (2, 8)),
    "DeepSpeed's mixture": (on(DEEPSPEED, "2,2"), (8,)),
}


@pytest.mark.parametrize("case", marked(CASES, "by sequences", "by tokens"))
def test_tokens_and_logits_of_one_rank(ranks: Ranks, case: tuple[TrainingConfig, tuple[int, ...]]) -> None:
    config, lengths = case
    if config.moe_backend == "deepspeed" and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    config = replace(config, distributed_backend="gloo")
    for worst, other, own, whole in ranks.run(4, compared, config, prompts(*lengths), Sampling()):
        assert worst < 1e-4 and other == 0
        assert own == whole / 4
