"""Rotary embedding of head slices: each channel needs its pair partner, which may live on another rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor


@dataclass(frozen=True)
class PartnerPlan:
    """Who sends which of its channels to whom, so that rank j of n has the partners of its own rotated channels.

    Args:
        own: this rank's rotated channels, as indices into its slice (always its first ones).
        send: per rank, channels of this rank's slice to send there.
        receive: per rank, how many channels come from there.
        order: where the partner of each own channel stands in (this rank's slice, received channels).
        signs: -1 where the partner is the upper half of the pair, else 1.
    """

    own: int
    send: tuple[tuple[int, ...], ...]
    receive: tuple[int, ...]
    order: tuple[int, ...]
    signs: tuple[int, ...]


@cache
def partner_plan(width: int, n: int, j: int, rotary: int) -> PartnerPlan:
    """The plan of rank j for rotate-half pairs (c, c + rotary/2) cut into slices of `width` channels."""
    half = rotary // 2

    def rotated(rank: int) -> range:
        return range(min(rank * width, rotary), min((rank + 1) * width, rotary))

    def partner(channel: int) -> int:
        return channel + half if channel < half else channel - half

    def wanted(of: int, by: int) -> list[int]:
        """Channels of rank `of` that are partners of channels of rank `by`, in the order of the latter."""
        return [partner(c) for c in rotated(by) if partner(c) // width == of and of != by]

    received = [channel for rank in range(n) for channel in wanted(rank, j)]
    order = tuple(
        partner(c) - j * width if partner(c) // width == j else width + received.index(partner(c)) for c in rotated(j)
    )
    return PartnerPlan(
        own=len(rotated(j)),
        send=tuple(tuple(channel - j * width for channel in wanted(j, rank)) for rank in range(n)),
        receive=tuple(len(wanted(rank, j)) for rank in range(n)),
        order=order,
        signs=tuple(-1 if c < half else 1 for c in rotated(j)),
    )


def rotate_slices(
    query: Tensor,
    key: Tensor,
    angles: tuple[Tensor | None, Tensor | None],
    *,
    group: dist.ProcessGroup,
    interleaved: bool,
    mscale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Rotates slices `[s, b, heads, d/n]` of queries and keys by the angles `[s, 1 or b, 1, rotary]` of whole heads.

    Interleaved pairs lie within a slice. For rotate-half pairs one all-to-all over the dim axis brings the missing
    partners of queries and keys together: (h + g) · s · b · d/P elements when all channels rotate.
    """
    query_angles, key_angles = angles
    if query_angles is None or key_angles is None:
        assert query_angles is key_angles, "queries and keys rotate together"
        return query, key
    width, rank = query.shape[-1], group.rank()
    rotary = query_angles.shape[-1]
    start, stop = (min(edge, rotary) for edge in (rank * width, (rank + 1) * width))
    heads = [query.shape[2], key.shape[2]]
    both = torch.cat((query, key), dim=2)
    partners = (
        _interleaved_partners(both[..., : stop - start])
        if interleaved
        else _half_partners(both, partner_plan(width, group.size(), rank, rotary), group)
    )
    rotated = []
    for states, partner, angle in zip(
        (query, key), partners.split(heads, dim=2), (query_angles, key_angles), strict=True
    ):
        own = angle[..., start:stop]
        cos, sin = (torch.cos(own) * mscale).to(states.dtype), (torch.sin(own) * mscale).to(states.dtype)
        turned = states[..., : stop - start] * cos + partner * sin
        rotated.append(torch.cat((turned, states[..., stop - start :]), dim=-1))
    return rotated[0], rotated[1]


def _interleaved_partners(states: Tensor) -> Tensor:
    pairs = states.unflatten(-1, (-1, 2))
    return torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)


def _half_partners(states: Tensor, plan: PartnerPlan, group: dist.ProcessGroup) -> Tensor:
    """Signed partners `[s, b, heads, own]` of this rank's rotated channels."""
    channels = states.movedim(-1, 0)  # [d/n, s, b, heads]
    sent = [channel for rank in plan.send for channel in rank]
    outgoing = channels.index_select(0, _index(tuple(sent), states.device))
    incoming = all_to_all(group, outgoing, list(plan.receive), [len(rank) for rank in plan.send])
    partners = torch.cat((channels, incoming)).index_select(0, _index(plan.order, states.device))
    return partners.movedim(0, -1) * _index(plan.signs, states.device)


@cache
def _index(values: tuple[int, ...], device: torch.device) -> Tensor:
    # Kept on the device: building it anew would copy from the host in every layer.
    return torch.tensor(values, dtype=torch.long, device=device)
