"""Both maps of every exchange, forward and backward, on drawn shapes: whose elements come where, element by element."""

from itertools import chain

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hp_plugin import cpu_backend
from hp_plugin.attention.registration import initialize_head_dim_parallel
from hp_plugin.config import HeadDimConfig
from hp_plugin.exchange.sizes import AttentionShape
from hp_plugin.exchange.strategies import STRATEGIES
from hp_plugin.exchange.strategy import QKVLayout
from hp_plugin.grid.groups import HeadDimGroups
from tests.ranks import Ranks
from tests.shapes import EXAMPLES, divided_shapes

# Ten shapes a job, as jobs take longer than what is in them; which of the ten fails is not searched for.
FEW = settings(EXAMPLES, max_examples=3, phases=[Phase.generate])


def tokens_of(shape: AttentionShape, name: str, j: int) -> list[int]:
    """The tokens whose queries rank j works on."""
    if name != "sequence":
        return list(range(shape.s))
    chunks = torch.arange(shape.s).chunk(2 * shape.n)
    return torch.cat((chunks[j], chunks[2 * shape.n - 1 - j])).tolist()


def own(shape: AttentionShape, name: str, j: int, heads: Tensor, all_tokens: bool = False) -> Tensor:
    """What rank j works on of `[s, b, heads, d]`: a slice where it keeps slices, else whole heads of its share."""
    if name in ("scores", "local"):
        return heads[..., sliced(shape, j)]
    if name == "batch":
        return heads.chunk(shape.n, dim=1)[j]
    return heads if all_tokens else heads[tokens_of(shape, name, j)]


def sliced(shape: AttentionShape, j: int) -> slice:
    return slice(j * shape.d // shape.n, (j + 1) * shape.d // shape.n)


def expected_heads(shape: AttentionShape, name: str, j: int, qkv: Tensor) -> list[Tensor]:
    """What `to_heads` gives rank j, from the whole `[s, b, kv_groups, slots of a group, d]`."""
    if name in ("batch", "local"):
        return [own(shape, name, j, qkv.flatten(2, 3)).flatten(2)]
    queries = shape.h // shape.g
    query, gate, key, value = qkv.split([queries, queries if shape.gate else 0, 1, 1], dim=3)
    parts = [query.flatten(2, 3), *([gate.flatten(2, 3)] if shape.gate else [])]
    found = [own(shape, name, j, part) for part in parts]
    return found + [own(shape, name, j, part.squeeze(3), all_tokens=True) for part in (key, value)]


def numbers(*shape: int, seed: int) -> Tensor:
    """Whole numbers, so that sums are exact in any order; not contiguous, as gradients are that come from a view."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-50, 50, shape[::-1], generator=generator).double()
    return drawn.permute(*reversed(range(drawn.dim())))


def trade(shapes: list[AttentionShape]) -> None:
    """Every exchange's maps on shapes of one grid; every rank knows the whole tensors and all ranks' gradients."""
    cpu_backend.enable()
    initialize_head_dim_parallel(HeadDimConfig(shapes[0].m, shapes[0].n))
    groups = HeadDimGroups.from_collection(None)
    for shape in shapes:
        for name in ("batch", "sequence", "scores", "local"):
            _trade(name, shape, groups)


def _trade(name: str, shape: AttentionShape, groups: HeadDimGroups) -> None:
    i, j = groups.coordinates
    n, kv_groups, heads, width = shape.n, shape.g // shape.m, shape.h // shape.m, shape.d // shape.n
    exchange = STRATEGIES[name](groups, QKVLayout(kv_groups, shape.h // shape.g, width, shape.gate))

    whole = numbers(shape.s, shape.b, kv_groups, exchange.layout.slots // kv_groups, shape.d, seed=i)
    whole.requires_grad_()
    mixed = whole.detach()[..., sliced(shape, j)].reshape(shape.s, shape.b, -1).requires_grad_()
    found = exchange.to_heads(mixed)
    parts = [found] if isinstance(found, Tensor) else [part for part in found if part is not None]
    everyone = [expected_heads(shape, name, k, whole) for k in range(n)]
    gradients = [[numbers(*part.shape, seed=100 * k + p) for p, part in enumerate(everyone[k])] for k in range(n)]
    assert len(parts) == len(everyone[j])
    for part, wanted in zip(parts, everyone[j], strict=True):
        torch.testing.assert_close(part, wanted, rtol=0, atol=0)
    (back,) = torch.autograd.grad(parts, mixed, gradients[j])
    (summed,) = torch.autograd.grad(list(chain(*everyone)), whole, list(chain(*gradients)))
    torch.testing.assert_close(back, summed[..., sliced(shape, j)].reshape(back.shape), rtol=0, atol=0)

    output = numbers(shape.s, shape.b, heads, shape.d, seed=1000 + i)
    context = own(shape, name, j, output).flatten(2).clone().requires_grad_()
    slices = exchange.to_slices(context)
    torch.testing.assert_close(slices, output[..., sliced(shape, j)].flatten(2), rtol=0, atol=0)
    gradient = numbers(shape.s, shape.b, heads, shape.d, seed=2000 + i)
    (back,) = torch.autograd.grad(slices, context, gradient[..., sliced(shape, j)].flatten(2))
    torch.testing.assert_close(back, own(shape, name, j, gradient).flatten(2), rtol=0, atol=0)


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (1, 6)])
def test_everything_comes_where_it_belongs_and_its_gradient_back(ranks: Ranks, grid: tuple[int, int]) -> None:
    @FEW
    @given(st.lists(divided_shapes(grid=grid), min_size=10, max_size=10))
    def on_any_shapes(shapes: list[AttentionShape]) -> None:
        ranks.run(6, trade, shapes)

    on_any_shapes()
