"""One attention layer beside a key/value cache, in any pieces, against one forward pass over the whole sequence."""

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from hp_plugin import cpu_backend
from hp_plugin.attention.registration import initialize_head_dim_parallel
from hp_plugin.config import HeadDimConfig
from tests.dist import attention_cases
from tests.dist.attention_cases import Case
from tests.ranks import Ranks


def pieces(case: Case, *sizes: int) -> tuple[float, int]:
    """Greatest difference of the output in pieces from that of one pass, relative; bytes that this rank caches."""
    cpu_backend.enable()
    head_dim = HeadDimConfig(case.m, case.n, case.exchange)
    initialize_head_dim_parallel(head_dim)
    # Whatever carries the whole sequence at once is no matter here, and tested elsewhere.
    reference = attention_cases.build(case, head_dim.with_exchange("scores"), case.h, case.g, case.d).eval()
    module = attention_cases.build(case, head_dim, case.h, case.g, case.d).eval()
    inputs, _ = attention_cases.data(case)
    rope = attention_cases.angles(case, case.d)
    with torch.no_grad():
        whole, _ = reference(inputs, None, rotary_pos_emb=rope)
        cache = StaticInferenceContext(case.b, case.s)
        found = []
        for tokens in inputs.split(list(sizes)):
            found.append(module(tokens, None, rotary_pos_emb=rope, inference_context=cache)[0])
            cache.sequence_len_offset += tokens.shape[0]
    parallel_state.destroy_model_parallel()
    return attention_cases.relative(torch.cat(found), whole), held(cache)


def held(cache: StaticInferenceContext) -> int:
    """Bytes of the memory behind a context, each counted once."""
    tensors = [tensor for pair in cache.key_value_memory_dict.values() for tensor in pair]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


GQA = {"h": 4, "g": 2, "d": 8, "rope": {}}
QK_NORM = {"qk_layernorm": True, "add_qkv_bias": True}
ONES = [1] * 40


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        (Case(2, 2, "batch", **GQA, s=9, b=4), (5, 1, 1, 1, 1)),
        (Case(1, 4, "batch", h=4, g=1, s=8, b=8), (3, 1, 1, 1, 1, 1)),
        (Case(4, 1, "batch", h=4, g=4, s=9, b=3, rope={}), (5, 1, 1, 1, 1)),
        # A prompt that has the chunks, one that has not, and pieces of any length behind it.
        (Case(2, 2, "sequence", **GQA, s=12, b=3), (8, 1, 1, 2)),
        (Case(2, 2, "sequence", **GQA, s=40, b=2), (7, 3, *ONES[:30])),
        (Case(1, 4, "sequence", h=4, g=1, d=16, s=64, b=1, rope={}, config=QK_NORM), (24, 1, 38, 1)),
        (Case(1, 4, "sequence", h=4, g=4, d=16, s=11, b=1), (1,) * 11),
        (Case(2, 2, "sequence", **GQA, s=36, b=1, config={"window_size": (9, 0)}), (4, 20, 1, 10, 1)),
        (Case(2, 2, "sequence", **GQA, s=12, b=1, config={"attention_output_gate": True}), (8, 1, 3)),
        # b decides what `auto` does.
        (Case(2, 2, "auto", **GQA, s=12, b=2), (8, 1, 1, 1, 1)),
        (Case(2, 2, "auto", **GQA, s=12, b=3), (8, 1, 1, 1, 1)),
    ],
    ids=lambda value: value.label if isinstance(value, Case) else None,
)
def test_pieces_make_the_whole(ranks: Ranks, case: Case, sizes: tuple[int, ...]) -> None:
    found = ranks.run(4, pieces, case, *sizes)
    assert max(error for error, _ in found) < 1e-5
    assert sum(size for _, size in found) == 2 * 4 * case.s * case.b * case.g * case.d
    if case.s % case.n == 0 or case.b % case.n == 0:
        assert len({size for _, size in found}) == 1


def batches(case: Case, *sizes: int) -> list[float]:
    """One context for one batch after another, of these numbers of sequences; the differences from one pass each."""
    cpu_backend.enable()
    head_dim = HeadDimConfig(case.m, case.n, case.exchange)
    initialize_head_dim_parallel(head_dim)
    module = attention_cases.build(case, head_dim, case.h, case.g, case.d).eval()
    inputs, _ = attention_cases.data(case)
    rope = attention_cases.angles(case, case.d)
    cache, errors = StaticInferenceContext(case.b, case.s), []
    with torch.no_grad():
        for size in sizes:
            cache.reset()
            part = inputs[:, :size]
            whole, _ = module(part, None, rotary_pos_emb=rope)
            first, _ = module(part[:-1], None, rotary_pos_emb=rope, inference_context=cache)
            cache.sequence_len_offset += case.s - 1
            last, _ = module(part[-1:], None, rotary_pos_emb=rope, inference_context=cache)
            errors.append(attention_cases.relative(torch.cat((first, last)), whole))
    parallel_state.destroy_model_parallel()
    return errors


def test_a_context_serves_batches_that_are_cached_otherwise(ranks: Ranks) -> None:
    assert max(map(max, ranks.run(4, batches, Case(2, 2, "auto", **GQA, s=8, b=4), 4, 3, 2, 1))) < 1e-5


def refusal(case: Case, sequences: int, tokens: int, before: int = 0, of_context: tuple[int, int] = (8, 16)) -> str:
    """What is said of a pass of so many sequences and tokens behind `before` of the case's."""
    cpu_backend.enable()
    head_dim = HeadDimConfig(case.m, case.n, case.exchange)
    initialize_head_dim_parallel(head_dim)
    module = attention_cases.build(case, head_dim, case.h, case.g, case.d).eval()
    cache = StaticInferenceContext(*of_context)
    try:
        with torch.no_grad():
            if before:
                module(torch.zeros(before, case.b, case.hidden), None, inference_context=cache)
                cache.sequence_len_offset += before
            module(torch.zeros(tokens, sequences, case.hidden), None, inference_context=cache)
    except ValueError as error:
        return str(error)
    finally:
        parallel_state.destroy_model_parallel()
    return "ran"


def test_what_no_cache_fits_is_refused_with_a_way_out(ranks: Ranks) -> None:
    grid = Case(2, 2, "batch", **GQA, b=4)
    one = ranks.run(4, refusal, grid, 1, 5)
    assert all("1 % 2 = 1" in said and said.endswith("--head-dim-exchange sequence can") for said in one)
    scores = ranks.run(4, refusal, Case(2, 2, "scores", **GQA), 2, 5)
    assert all("`scores` has no key/value cache" in said and "batch or sequence can" in said for said in scores)
    long = ranks.run(4, refusal, grid, 4, 12, 5)
    assert all("12 tokens behind 5 do not fit into a key/value cache of 16 tokens" in said for said in long)
    many = ranks.run(4, refusal, grid, 10, 1)
    assert all("10 sequences behind 0 do not fit into a key/value cache of 8" in said for said in many)
    other = ranks.run(4, refusal, Case(2, 2, "auto", **GQA, b=4), 3, 1, 2)
    assert all("the parts of a batch must be all divisible" in said for said in other)


def stock_holds(case: Case) -> int:
    """Bytes that a rank of stock's tensor parallelism caches, beyond the key/value heads."""
    cpu_backend.enable()
    parallel_state.initialize_model_parallel(4)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=case.hidden,
        num_attention_heads=case.h,
        num_query_groups=case.g,
        kv_channels=case.d,
        tensor_model_parallel_size=4,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
    )
    model_parallel_cuda_manual_seed(1)
    attention = get_gpt_layer_local_spec().submodules.self_attention
    module = build_module(attention, config=config, layer_number=1, pg_collection=None).eval()
    cache = StaticInferenceContext(case.b, case.s)
    with torch.no_grad():
        module(torch.zeros(case.s, case.b, case.hidden), None, inference_context=cache)
    parallel_state.destroy_model_parallel()
    return held(cache)


def test_stock_caches_whole_heads_and_the_grid_an_nth_of_them(ranks: Ranks) -> None:
    case = Case(2, 2, "batch", h=4, g=2, d=8, s=8, b=2)
    whole = 2 * 4 * case.s * case.b * case.g * case.d
    assert ranks.run(4, stock_holds, case) == [whole // 2] * 4
    assert [size for _, size in ranks.run(4, pieces, case, 7, 1)] == [whole // 4] * 4
