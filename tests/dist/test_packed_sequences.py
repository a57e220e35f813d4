"""Packed sequences where weights move: each document's losses, and all gradients, as of the documents one by one."""

from typing import Any

import pytest
import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from hp_plugin import cpu_backend
from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.masks import document_numbers, document_positions, other_documents
from tests.dist.gpt import SEQUENCE, VOCABULARY, Case, build, start
from tests.dist.gpt_parts import Part, assemble, collect
from tests.ranks import Ranks

Found = tuple[Tensor, dict[str, Part]]
"""Losses of all tokens, and gradients of their sum."""


def text() -> tuple[Tensor, Tensor]:
    """Tokens of one row, and what each is to be followed by."""
    row = torch.randint(VOCABULARY, (1, SEQUENCE + 1), generator=torch.Generator().manual_seed(7))
    return row[:, :-1], row[:, 1:]


def gradients(case: Case, chunk: Any, losses: Tensor) -> Found:
    losses.sum().backward()
    finalize_model_grads([chunk])
    return losses.detach().flatten(), collect([chunk], lambda parameter: parameter.main_grad)


def built(case: Case) -> Any:
    cpu_backend.enable()
    start(case)
    (chunk,) = build(case)
    chunk.zero_grad_buffer()
    return chunk


def one_by_one(case: Case, lengths: tuple[int, ...]) -> Found:
    chunk, (tokens, labels) = built(case), text()
    losses = []
    for mine, expected in zip(tokens.split(lengths, dim=1), labels.split(lengths, dim=1), strict=True):
        s = mine.shape[1]
        mask = torch.ones(1, 1, s, s, dtype=torch.bool).triu(1)
        losses.append(chunk(mine, torch.arange(s)[None], mask, labels=expected))
    return gradients(case, chunk, torch.cat(losses, dim=1))


def packed(case: Case, lengths: tuple[int, ...], padded: bool = False) -> Found:
    chunk, (tokens, labels) = built(case), text()
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    # With padding, `cu_seqlens` count what documents hold; where they lie the padded ones say.
    held = torch.tensor([0, *(length - 1 for length in lengths)]).cumsum(0).to(torch.int32)
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=held if padded else bounds,
        cu_seqlens_kv=held if padded else bounds,
        cu_seqlens_q_padded=bounds if padded else None,
        cu_seqlens_kv_padded=bounds if padded else None,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    return gradients(case, chunk, chunk(tokens, places, None, labels=labels, packed_seq_params=params))


def on(m: int, n: int, exchange: str = "weights", **fields: Any) -> Case:
    return Case(grid=HeadDimConfig(m, n, exchange), tp=m * n, micro_batch=1, **fields)


SP = {"sequence_parallel": True}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
CASES = {
    "2x2": on(2, 2),
    "1x4 QK-norm": on(1, 4, model={"qk_layernorm": True, "num_query_groups": 1}),
    "2x2 SP, ends as stock's": on(2, 2, model=SP, ends=False, tied=False),
    "2x2 recompute layers": on(2, 2, model=FULL),
    "2x2 recompute attention, output gate": on(
        2, 2, model={"recompute_granularity": "selective", "attention_output_gate": True}
    ),
    "2x2 learned positions": on(2, 2, positions="learned_absolute", model={"add_bias_linear": False}),
    # Of so few tokens activations would move, but they cannot.
    "2x2 auto": on(2, 2, "auto"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("lengths", "with_padding"), [((5, 1, 7, 3), False), ((9, 7), True)])
def test_documents_are_what_they_are_one_by_one(
    ranks: Ranks, case: Case, lengths: tuple[int, ...], with_padding: bool
) -> None:
    fields = ("qk_layernorm", "num_query_groups", "attention_output_gate", "add_bias_linear")
    kept = {name: case.model[name] for name in fields if name in case.model}
    alone = Case(micro_batch=1, positions=case.positions, tied=case.tied, model=kept)
    ((losses, expected),) = ranks.run(1, one_by_one, alone, lengths)
    found = ranks.run(4, packed, case, lengths, with_padding)
    for mine, _ in found:
        torch.testing.assert_close(mine, losses, rtol=1e-5, atol=1e-5)
    whole, stock = assemble([grads for _, grads in found], 4), assemble([expected], 1)
    assert whole.keys() == stock.keys()
    for name, gradient in stock.items():
        assert (whole[name] - gradient).abs().max() < 2e-5 * gradient.abs().max(), name


@pytest.mark.parametrize(
    ("exchange", "said"), [("batch", "or --head-dim-exchange weights"), ("scores", "packed sequences cannot be split")]
)
def test_where_activations_move_they_are_refused(ranks: Ranks, exchange: str, said: str) -> None:
    for words in ranks.run(4, refused, on(2, 2, exchange)):
        assert said in words


def refused(case: Case) -> str:
    try:
        packed(case, (8, 8))
    except ValueError as mistake:
        return str(mistake)
    return "took them"


def test_bounds_give_numbers_and_places() -> None:
    bounds = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    numbers = document_numbers(bounds, 10)
    # What lies behind the last document is none of it.
    assert numbers.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2, 3]
    assert document_positions(bounds, numbers).tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4, 0]
    assert other_documents(numbers, range(2, 4), 5).tolist() == [[False] * 3 + [True] * 2, [True] * 3 + [False, True]]
