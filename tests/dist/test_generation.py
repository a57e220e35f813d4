"""Text of whole models on the grid beside its caches, against one rank of stock that caches nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor, nn

from hp_plugin.compare.ranks.traffic import counted
from hp_plugin.exchange.rules import RULES
from hp_plugin.exchange.sizes import AttentionShape
from hp_plugin.generation.checkpoint import loaded_model, on_layout
from hp_plugin.generation.decoding import Step, generate
from hp_plugin.generation.job import prepare, steps
from hp_plugin.generation.options import GenerationOptions
from hp_plugin.generation.sampler import Sampler
from hp_plugin.generation.sampling import Sampling
from hp_plugin.training.config import TrainingConfig
from hp_plugin.training.distributed import prepare_device, running_ranks
from hp_plugin.training.initialization import initialize_parameters
from hp_plugin.training.model import build_gpt
from hp_plugin.training.transformer import build_transformer_config
from tests.adapters.test_checkpoint_resume import train_saving
from tests.dist import training_runs
from tests.dist.test_generation_caches import held
from tests.ranks import Ranks, destroy_groups_but

NEW = 64
VOCABULARY = 100
MODEL = TrainingConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    seq_length=96,
    vocab_size=VOCABULARY,
    micro_batch_size=1,
    train_iters=1,
    lr=1e-3,
    position_embedding_type="rope",
    attention_dropout=0.0,
    hidden_dropout=0.0,
    # Scores far enough apart that the last bit of a sum does not decide which token is the most likely.
    init_method_std=0.3,
)
MQA = replace(MODEL, num_query_groups=1, position_embedding_type="learned_absolute")
MHA = replace(MODEL, num_query_groups=4)
EXPERTS = replace(MODEL, num_experts=4, moe_router_topk=2, disable_bias_linear=True, expert_tensor_parallel_size=1)
DEEPSPEED = replace(EXPERTS, moe_backend="deepspeed")


def on(model: TrainingConfig, grid: str, exchange: str = "auto") -> TrainingConfig:
    """The model on a grid, its experts as far apart as they go."""
    config = replace(model, head_dim_parallel=grid, head_dim_exchange=exchange)
    return config if model.num_experts is None else replace(config, expert_model_parallel_size=4)


def prompts(*lengths: int) -> list[list[int]]:
    """Random tokens."""
    drawn = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(VOCABULARY, (length,), generator=drawn).tolist() for length in lengths]


def model_of(
    config: TrainingConfig, passes: tuple[tuple[int, int, int], ...], device: torch.device, ends: bool = False
) -> nn.Module:
    """`ends`: as a training run would have made it, whose embedding and output layer work on a share, too."""
    transformer_config = build_transformer_config(config, cached=passes)
    if ends:
        transformer_config.micro_batch_size, transformer_config.seq_length = passes[0][1], config.seq_length
    model = build_gpt(config, transformer_config).to(device)
    initialize_parameters([model], transformer_config, config.seed)
    return model.eval()


@torch.no_grad()
def without_cache(
    model: nn.Module, texts: list[list[int]], how: Sampling, new: int = NEW, vocabulary: int = VOCABULARY
) -> Iterator[tuple[list[int | None], Tensor]]:
    """Every step's tokens and logits; all of each text goes through the model for each of its tokens."""
    device = next(model.parameters()).device
    texts, lengths = [list(text) for text in texts], [len(text) for text in texts]
    sampler = Sampler(how, len(texts))
    for stop in range(min(lengths), max(lengths) + new):
        logits = []
        for text in texts:
            part = torch.tensor(text[:stop], device=device).unsqueeze(0)
            places = torch.arange(part.shape[1], device=device).unsqueeze(0)
            logits.append(model(part, places, None)[0, -1, :vocabulary])
        asking = [length <= stop < length + new for length in lengths]
        chosen = sampler.pick(torch.stack(logits), asking)
        for text, token in zip(texts, chosen, strict=True):
            text += [] if token is None else [token]
        yield chosen, torch.stack(logits)


def compared(
    config: TrainingConfig,
    texts: list[list[int]],
    how: Sampling,
    ends: bool = False,
    sent: list[dict[tuple[str, str], float]] | None = None,
) -> tuple[float, int, int, int]:
    """Largest difference of logits, steps whose tokens differ, bytes that this rank caches and that are cached whole.

    What every step sends, by axis and kind, is added to `sent`.
    """
    prepare_device()
    total = max(map(len, texts)) + NEW
    passes = ((min(map(len, texts)), len(texts), min(map(len, texts))), (1, len(texts), total))
    stock = replace(config, head_dim_parallel=None, head_dim_exchange="auto", expert_model_parallel_size=1)
    worst, other = 0.0, 0
    with running_ranks(stock) as device:
        steps = list(without_cache(model_of(stock, passes, device), texts, how))
    destroy_groups_but(dist.group.WORLD)
    with running_ranks(config) as device:
        context = StaticInferenceContext(len(texts), total)
        model = model_of(config, passes, device, ends)
        found = generate(model, texts, NEW, vocabulary=VOCABULARY, sampling=how, context=context)
        for step, (tokens, logits) in zip(recorded(found, sent), steps, strict=True):
            # What is behind the end of a text is nothing that anyone asks for.
            for number, token in enumerate(tokens):
                if token is not None:
                    worst = max(worst, float((step.logits[number] - logits[number]).abs().max()))
            other += list(step.tokens) != tokens
    if config.moe_backend == "deepspeed":
        from hp_plugin.deepspeed_adapter.moe.groups import forget_expert_groups

        forget_expert_groups()
    whole = 2 * 4 * config.num_layers * total * len(texts) * config.query_groups * 8
    return worst, other, held(context), whole


def recorded(steps: Iterator[Step], sent: list[dict[tuple[str, str], float]] | None) -> Iterator[Step]:
    """The same, with what each sends."""
    if sent is None:
        yield from steps
        return
    while True:
        with counted() as traffic:
            step = next(steps, None)
        if step is None:
            return
        sent.append(traffic.sent())
        yield step


@pytest.mark.parametrize(
    ("config", "lengths"),
    [
        (on(MODEL, "2,2"), (3, 9, 5, 8)),
        (on(MODEL, "2,2", "sequence"), (4, 4)),
        (on(MQA, "1,4"), (16, 13, 8)),
        (on(MHA, "4,1"), (3, 9, 5)),
        (on(MODEL, "2,2", "weights"), (3, 8)),
        (on(EXPERTS, "2,2"), (2, 8)),
        (on(DEEPSPEED, "2,2"), (8,)),
    ],
    ids=[
        "2x2 by sequences",
        "2x2 by tokens",
        "1x4 MQA learned",
        "4x1",
        "2x2 weights",
        "experts",
        "DeepSpeed's experts",
    ],
)
def test_tokens_and_logits_are_those_of_one_rank_without_cache(
    ranks: Ranks, config: TrainingConfig, lengths: tuple[int, ...]
) -> None:
    for worst, other, own, whole in ranks.run(4, compared, config, prompts(*lengths), Sampling()):
        assert worst < 1e-4 and other == 0
        assert own == whole / 4


def compared_recording(
    config: TrainingConfig, texts: list[list[int]], ends: bool
) -> tuple[float, int, int, int, list[dict[tuple[str, str], float]]]:
    sent: list[dict[tuple[str, str], float]] = []
    return *compared(config, texts, Sampling(), ends, sent), sent


@pytest.mark.parametrize(
    ("config", "lengths", "ends"),
    [
        (on(MODEL, "2,2"), (24, 30, 26, 24), False),
        (on(MODEL, "2,2"), (24, 28, 25), False),
        (on(MODEL, "2,2"), (24, 30, 26, 24), True),
        (on(MODEL, "2,2"), (24, 28, 25), True),
        (on(MQA, "1,4"), (24, 26, 30, 25), False),
        (on(replace(MQA, seq_length=128), "1,4"), (32, 40, 35), False),
        (on(EXPERTS, "2,2"), (16, 18, 17, 20), False),
        (on(DEEPSPEED, "2,2"), (16, 18, 17, 20), False),
    ],
    ids=[
        "2x2 by sequences",
        "2x2 by tokens",
        "2x2 by sequences, ends too",
        "2x2 by tokens, ends too",
        "1x4 MQA by sequences",
        "1x4 MQA by tokens",
        "experts",
        "DeepSpeed's experts",
    ],
)
def test_auto_gathers_weights_for_long_prompts_and_trades_activations_for_single_tokens(
    ranks: Ranks, config: TrainingConfig, lengths: tuple[int, ...], ends: bool
) -> None:
    layers, grid, b = config.num_layers, config.head_dim, len(lengths)
    shape = AttentionShape(s=1, b=b, h=4, g=config.query_groups, d=8, m=grid.m, n=grid.n, cache=max(lengths))
    # Weights of the linears of attention, and of the MLPs where there are no experts, which lie still.
    weights = 32 * (2 * shape.h + 2 * shape.g) * 8 + (0 if config.num_experts else 2 * 32 * 128)
    of_step = layers * RULES["batch" if b % grid.n == 0 else "sequence"].bytes(shape, 4)
    for worst, other, own, whole, sent in ranks.run(4, compared_recording, config, prompts(*lengths), ends):
        assert worst < 1e-4 and other == 0
        assert own == whole / 4
        prompt, *steps = sent
        assert prompt["dim", "all_gather"] >= layers * 4 * weights / grid.m * (grid.n - 1) / grid.n
        for step in steps:
            assert sum(size for (axis, _), size in step.items() if axis == "dim") == of_step


def test_a_seed_gives_the_same_tokens_on_another_layout(ranks: Ranks) -> None:
    how = Sampling(temperature=1.3, top_k=20, top_p=0.95, seed=11)
    for worst, other, _, _ in ranks.run(4, compared, on(MODEL, "2,2"), prompts(3, 5, 4), how):
        assert worst < 1e-4 and other == 0


def trained(cache: str, flags: str, with_rollouts: bool) -> dict[int, float]:
    """Losses of examples/pretrain_gpt.py, or of examples/train_and_generate.py under the same flags."""
    if not with_rollouts:
        return training_runs.train(cache, flags)[0]
    program = training_runs.example("train_and_generate")
    config = training_runs.configured(cache, flags)
    try:
        return program.train(config, 2, ["ab", "c", "def", "g"], 6)
    finally:
        destroy_groups_but(dist.group.WORLD)


def test_training_goes_on_behind_rollouts_as_if_there_had_been_none(ranks: Ranks, tmp_path: Path) -> None:
    flags = "--head-dim-parallel 2,2 --head-dim-exchange weights --train-iters 6 --hidden-dropout 0.1"
    alone = ranks.run(4, trained, str(tmp_path), flags, False)[-1]
    between = ranks.run(4, trained, str(tmp_path), flags, True)[-1]
    assert between == alone and len(alone) == 6


TEXTS = ("def f(x):\n    return", "import", "class A")


def from_checkpoint(load: str, grid: str | None) -> list[tuple[tuple[int | None, ...], Any]]:
    """Every step's tokens and logits on a layout; without cache where there is no grid."""
    job, _ = prepare(GenerationOptions(load=load, prompts=TEXTS, new_tokens=24, head_dim_parallel=grid, past_end=True))
    try:
        if grid is not None:
            return [(step.tokens, step.logits.numpy()) for step in steps(job)]
        with running_ranks(job.config) as device:
            transformer_config = build_transformer_config(job.config, cached=job.passes)
            model = loaded_model(job.config, transformer_config, job.folder, device)
            texts = [list(prompt) for prompt in job.prompts]
            found = without_cache(model, texts, Sampling(), new=24, vocabulary=job.vocabulary)
            return [(tuple(tokens), logits.numpy()) for tokens, logits in found]
    finally:
        if job.config.moe_backend == "deepspeed":
            from hp_plugin.deepspeed_adapter.moe.groups import forget_expert_groups

            forget_expert_groups()
        destroy_groups_but(dist.group.WORLD)


MIXTURE = "--num-experts 4 --moe-router-topk 2 --disable-bias-linear --expert-tensor-parallel-size 1"


@pytest.mark.filterwarnings("ignore:.*load_state_dict. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:.*we are deprecating ShardedTensor:FutureWarning")
@pytest.mark.filterwarnings("ignore:`sequence_parallel` is set to `True`:UserWarning:megatron")
@pytest.mark.filterwarnings("ignore:When using expert parallelism and tensor parallelism:UserWarning:megatron")
@pytest.mark.parametrize(
    ("flags", "grids"),
    [
        ("--train-iters 30 --lr 1e-2", ("1,4", "2,2", "4,1")),
        (f"{MIXTURE} --expert-model-parallel-size 4 --sequence-parallel --moe-expert-capacity-factor 1", ("1,4",)),
        (f"{MIXTURE} --expert-model-parallel-size 2 --moe-backend deepspeed", ("4,1",)),
    ],
    ids=["dense", "experts", "DeepSpeed's experts"],
)
def test_a_checkpoint_of_a_grid_goes_on_alike_on_any_other(
    ranks: Ranks, tmp_path: Path, flags: str, grids: tuple[str, ...]
) -> None:
    saved = str(tmp_path / "saved")
    flags = f"--train-iters 2 --init-method-std 0.3 {flags} --head-dim-parallel 2,2 --save {saved}"
    ranks.run(4, train_saving, str(tmp_path), flags)
    expected = ranks.run(4, from_checkpoint, saved, None)[0]
    for grid in grids:
        for found in ranks.run(4, from_checkpoint, saved, grid):
            assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
            for (tokens, logits), (_, others) in zip(found, expected, strict=True):
                going = [token is not None for token in tokens]
                assert abs(logits[going] - others[going]).max() < 1e-4


def test_a_checkpoint_of_local_is_refused_where_it_is_another_function(tmp_path: Path) -> None:
    local = replace(MODEL, head_dim_parallel="1,2", head_dim_exchange="local")
    assert on_layout(local, tmp_path, 1, head_dim_parallel="2,2", head_dim_exchange="local").head_dim is not None
    for grid, exchange in ((None, "auto"), ("1,2", "auto"), ("1,4", "local")):
        with pytest.raises(ValueError, match="give --head-dim-exchange local with a grid of n = 2"):
            on_layout(local, tmp_path, 1, head_dim_parallel=grid, head_dim_exchange=exchange)
    with pytest.raises(ValueError, match=r"computes another function than checkpoint .* was trained for"):
        on_layout(MODEL, tmp_path, 1, head_dim_parallel="1,2", head_dim_exchange="local")
