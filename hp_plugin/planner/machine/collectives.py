"""How long a collective takes on a group of ranks, from measured curves and the links' bandwidths.

Sizes are those of nccl-tests: all_reduce the buffer, all_gather the gathered result, reduce_scatter and all_to_all
one rank's whole input, send_recv the message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log2

from hp_plugin.planner.machine.curve import TimeCurve
from hp_plugin.planner.machine.placement import Placement

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")


@dataclass(frozen=True)
class Links:
    """What connects the ranks; bytes per second and seconds.

    Args:
        domain: ranks that share one fast-link (NVLink) domain.
        nic_bytes_per_s: network bandwidth of one rank.
        step_s, network_step_s: latency that one more rank adds to a ring, within a domain and across.
        tree_step_s: latency that a doubling of the domains adds to a tree.
        many_domains_bytes_per_s: bus bandwidth of an all-reduce over more than two full domains.
    """

    domain: int
    nic_bytes_per_s: float
    step_s: float
    network_step_s: float
    tree_step_s: float
    many_domains_bytes_per_s: float


def wire_factor(kind: str, ranks: int) -> float:
    """Bytes that a rank must receive per byte of collective size (the bus factor of nccl-tests)."""
    if kind == "send_recv":
        return 1.0
    return (2.0 if kind == "all_reduce" else 1.0) * (ranks - 1) / ranks


class Collectives:
    """Times of collectives on one machine.

    Args:
        curves: measured curves by (kind, ranks, domains).
        links: what to extrapolate with where nothing was measured.

    Raises:
        ValueError: a kind has no curve at all, or is unknown.
    """

    def __init__(self, curves: Mapping[tuple[str, int, int], TimeCurve], links: Links) -> None:
        unknown = sorted({kind for kind, _, _ in curves} - set(KINDS))
        if unknown:
            raise ValueError(f"unknown collectives {', '.join(unknown)}: choose from {', '.join(KINDS)}")
        for kind in KINDS:
            if not any(known == kind for known, _, _ in curves):
                raise ValueError(f"no measured curve for {kind}: a machine needs one for each of {', '.join(KINDS)}")
        self._curves = dict(curves)
        self.links = links

    def replaced(self, curves: Mapping[tuple[str, int, int], TimeCurve]) -> Collectives:
        """The same machine with some curves of the user's own."""
        return Collectives({**self._curves, **curves}, self.links)

    def seconds(self, kind: str, size: float, group: Placement) -> float:
        """Seconds of one collective of `size` bytes; nothing moves in a group of one rank or without bytes."""
        if group.size == 1 or size == 0:
            return 0.0
        if kind == "send_recv":
            return self._point_to_point(size, group)
        if group.domains == 1:
            return self._within(kind, size, group.size)
        across = self._across(kind, size, group)
        # Sources differ: no group over several domains is faster than as many ranks in one would be.
        return max(across, self._within(kind, size, group.size)) if self._measured_within(kind) else across

    def _point_to_point(self, size: float, group: Placement) -> float:
        domains = 1 if group.domains == 1 else 2
        curve = self._curves.get(("send_recv", 2, domains))
        if curve is not None:
            return curve.seconds(size)
        near = self._curves[self._nearest("send_recv", 2, domains)].seconds(size)
        return near if domains == 1 else max(near, self.links.network_step_s + size / self.links.nic_bytes_per_s)

    def _nearest(self, kind: str, ranks: int, domains: int) -> tuple[str, int, int]:
        known = [key for key in self._curves if key[0] == kind]
        return min(known, key=lambda key: (abs(log2(key[2] / domains)), abs(log2(key[1] / ranks)), key[1]))

    def _measured_within(self, kind: str) -> list[int]:
        """Group sizes measured within one domain, smallest first."""
        return sorted(ranks for known, ranks, domains in self._curves if known == kind and domains == 1)

    def _within(self, kind: str, size: float, ranks: int) -> float:
        exact = self._curves.get((kind, ranks, 1))
        if exact is not None:
            return exact.seconds(size)
        measured = self._measured_within(kind)
        if not measured:
            return self._curves[self._nearest(kind, ranks, 1)].seconds(size)
        below = [known for known in measured if known < ranks]
        above = [known for known in measured if known > ranks]
        if below and above:
            low, high = below[-1], above[0]
            share = log2(ranks / low) / log2(high / low)
            near, far = (self._curves[kind, known, 1].seconds(size) for known in (low, high))
            return float(near ** (1 - share) * far**share)
        base = (below or above)[-1 if below else 0]
        curve = self._curves[kind, base, 1]
        more_wire = size * (wire_factor(kind, ranks) - wire_factor(kind, base)) / _bus_peak(kind, base, curve)
        return max(0.0, more_wire + self.links.step_s * (ranks - base)) + curve.seconds(size)

    def _across(self, kind: str, size: float, group: Placement) -> float:
        """A group over several domains: the nearest measured one, plus what its links cost more.

        Two parts are added: wire time of the slower bottleneck (fewer NICs, more of the data across the network) and
        the latency of more steps. Neither can make a group faster than the measured one.
        """
        exact = self._curves.get((kind, group.size, group.domains))
        if exact is not None and group.size == group.per_domain * group.domains:
            return exact.seconds(size)
        key = self._nearest(kind, group.size, group.domains)
        curve = self._curves[key]
        reference = Placement(key[1], key[2], key[1] // key[2])
        wire = wire_factor(kind, group.size) / self._bus_bandwidth(kind, group, curve, reference)
        known_wire = wire_factor(kind, reference.size) / _bus_peak(kind, reference.size, curve)
        latency = self._latency(kind, group) - self._latency(kind, reference)
        return curve.seconds(size) + max(0.0, size * (wire - known_wire)) + max(0.0, latency)

    def _bus_bandwidth(self, kind: str, group: Placement, curve: TimeCurve, reference: Placement) -> float:
        """Bus bandwidth of large messages: what the NICs of a domain allow, never above the measured group's."""
        measured = _bus_peak(kind, reference.size, curve)
        nics = min(group.per_domain, self.links.domain) * self.links.nic_bytes_per_s
        if kind == "all_to_all":
            outside = (group.size - group.per_domain) / group.size
            return min(wire_factor(kind, group.size) * self.links.nic_bytes_per_s / outside, self._fast(kind))
        if kind == "all_reduce":
            if group.domains == 2:
                # A tree sends every byte across once, whatever the ring factor says.
                return min(measured, wire_factor(kind, group.size) * nics)
            return min(measured, self.links.many_domains_bytes_per_s * group.per_domain / self.links.domain)
        return min(measured, nics)

    def _fast(self, kind: str) -> float:
        """Bus bandwidth within a domain, of the largest measured group."""
        known = self._measured_within(kind)
        if not known:
            return float("inf")
        return _bus_peak(kind, max(known), self._curves[kind, max(known), 1])

    def _latency(self, kind: str, group: Placement) -> float:
        if kind == "all_reduce":
            return self.links.tree_step_s * log2(max(group.domains, 1))
        return self.links.step_s * (group.size - group.domains) + self.links.network_step_s * group.domains


def _bus_peak(kind: str, ranks: int, curve: TimeCurve) -> float:
    return wire_factor(kind, ranks) * curve.peak_bytes_per_s
