"""The time that collectives take on the links of a slice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jax.sharding import Mesh

from internvl_jax.aot.hlo import Collective
from internvl_jax.aot.topology import DIE_TO_DIE, HOP_SECONDS, Link, Topology

# Bytes that each of `size` chips sends in a bandwidth-optimal ring, over the bytes of the result.
_SENT = {
    "all-reduce": lambda size: 2 * (size - 1) / size,
    "all-gather": lambda size: (size - 1) / size,
    "reduce-scatter": lambda size: size - 1,
    "all-to-all": lambda size: (size - 1) / size,
    "collective-permute": lambda size: 1,
}


@dataclass(frozen=True)
class Transfer:
    """One execution of a collective.

    Attributes:
        seconds: Time on the wire.
        latency_seconds: The part of it that more bandwidth would not save.
        links: Links that it uses; empty for all.
    """

    seconds: float
    latency_seconds: float = 0.0
    links: frozenset[Link] = frozenset()


class Network:
    """The links between the devices of a mesh.

    Attributes:
        topology: Slice.
        coords: Coordinates of the chip of each device, in the order of the mesh.
    """

    def __init__(self, topology: Topology, mesh: Mesh):
        self.topology = topology
        self.coords = [tuple(device.coords) for device in mesh.devices.flat]

    def lower_bound(self, collective: Collective) -> float:
        """Return a lower bound on the seconds that all executions of a collective take, without latency.

        It is the bytes that a chip sends over the bandwidth of its links within the group.
        """
        return collective.count * self._ring_seconds(collective)

    def transfer(self, collective: Collective) -> Transfer:
        """Return the time of one execution of a collective, with latency.

        Every hop takes at least `HOP_SECONDS`. There are as many as the two farthest chips of the group are apart, for
        an all-reduce twice: it is a reduce-scatter and an all-gather.
        """
        if collective.pairs:
            return self._permute(collective)
        hops = self.topology.hops(self._chips(collective)) * (2 if collective.kind == "all-reduce" else 1)
        return _transfer(self._ring_seconds(collective), hops)

    def _permute(self, collective: Collective) -> Transfer:
        """A permute: routes of several pairs may share a link."""
        routes = [self.topology.route(self.coords[a], self.coords[b]) for a, b in collective.pairs]
        loads = Counter(link for route in routes for link in route)
        seconds = max(loads.values(), default=1 / DIE_TO_DIE) * collective.bytes / self.topology.chip.link_bandwidth
        return _transfer(seconds, max(map(len, routes)), frozenset(loads))

    def _chips(self, collective: Collective) -> Sequence[tuple[int, ...]]:
        return [self.coords[index] for index in collective.group] if collective.group else self.coords

    def _ring_seconds(self, collective: Collective) -> float:
        chips = self._chips(collective)
        on_one_chip = len(set(chips)) == 1
        size = len(chips) if on_one_chip else len(set(chips))
        if size == 1:
            return 0.0
        links = DIE_TO_DIE if on_one_chip else self.topology.links(chips)
        return _SENT[collective.kind](size) * collective.bytes / (links * self.topology.chip.link_bandwidth)


def _transfer(seconds: float, hops: int, links: frozenset[Link] = frozenset()) -> Transfer:
    latency = max(hops * HOP_SECONDS - seconds, 0.0)
    return Transfer(seconds + latency, latency, links)
