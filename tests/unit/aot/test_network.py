"""The time of collectives on the links of a slice, against times by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from internvl_jax.aot import hlo
from internvl_jax.aot.network import Network
from internvl_jax.aot.topology import Link, parse_topology


def network(name, coords):
    """Devices at these coordinates, in the order of the mesh."""
    devices = [SimpleNamespace(coords=(*at, *[0] * (3 - len(at)))) for at in coords]
    return Network(parse_topology(name), SimpleNamespace(devices=np.array(devices, object)))


def collective(kind, size, group=(), pairs=(), count=1):
    return hlo.Collective(kind, size, count, None, None, group, pairs)


SQUARE = [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_time_is_bytes_over_the_links_of_the_group():
    net = network("v5e-4", SQUARE)
    # 2x2 chips: each sends 2 * 3/4 of the sum over its two links of 50 GB/s.
    sums = collective("all-reduce", 10**7, count=3)
    assert net.lower_bound(sums) == pytest.approx(3 * 1.5e7 / (2 * 50e9))
    assert net.transfer(sums).seconds == pytest.approx(1.5e7 / (2 * 50e9))
    assert net.transfer(sums).latency_seconds == 0
    # Two chips side by side: half of the result over one link.
    assert net.transfer(collective("all-gather", 10**7, (0, 1))).seconds == pytest.approx(5e6 / 50e9)
    assert net.transfer(collective("all-reduce", 10**7, (2,))).seconds == 0


def test_a_hop_takes_a_microsecond_at_least():
    net = network("v5e-8", [(x, y) for x in range(2) for y in range(4)])
    sums = net.transfer(collective("all-reduce", 80))  # the farthest chips are 1 + 3 hops apart, there and back
    assert sums.seconds == pytest.approx(8e-6)
    assert sums.latency_seconds == pytest.approx(8e-6 - 2 * 7 / 8 * 80 / (2 * 50e9))
    assert net.transfer(collective("all-gather", 80, (0, 1))).seconds == pytest.approx(1e-6)
    assert net.transfer(collective("all-gather", 80, (0, 3))).seconds == pytest.approx(3e-6)


def test_permutes_take_the_routes_of_their_pairs():
    line = network("v5e-16", [(0, y) for y in range(4)])
    up = line.transfer(collective("collective-permute", 10**6, pairs=((0, 1), (1, 2), (2, 3), (3, 0))))
    down = line.transfer(collective("collective-permute", 10**6, pairs=((1, 0), (2, 1), (3, 2))))
    assert up.seconds == down.seconds == pytest.approx(1e6 / 50e9)
    assert {link.sign for link in down.links} == {-1}
    assert down.links < up.links  # what goes around goes down the whole line
    # Two steps at once: the pairs 0 to 2 and 1 to 3 share the link from 1 to 2.
    two = line.transfer(collective("collective-permute", 10**6, pairs=((0, 2), (1, 3))))
    assert two.seconds == pytest.approx(2e6 / 50e9)
    assert line.transfer(collective("collective-permute", 8, pairs=((0, 3),))).seconds == pytest.approx(3e-6)


def test_two_devices_of_a_chip():
    """TPU7x: six times a link between them, and one link for both to another chip."""
    net = network("tpu7x", [(0, 0, 0), (0, 0, 0), (1, 0, 0), (1, 0, 0)])
    assert net.transfer(collective("all-gather", 10**7, (0, 1))).seconds == pytest.approx(5e6 / 600e9)
    assert net.transfer(collective("collective-permute", 10**7, pairs=((0, 1),))).seconds == pytest.approx(1e7 / 600e9)
    across = net.transfer(collective("collective-permute", 10**7, pairs=((0, 2), (1, 3))))
    assert across.seconds == pytest.approx(2e7 / 100e9)
    assert across.links == {Link((0, 0, 0), 0, 1)}


CORNER, ROW = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)], [(0, y, 0) for y in range(16)]


@pytest.mark.parametrize(
    ("name", "group", "links", "hops"),
    [
        ("v5e-4", CORNER, 2, 2),
        ("v5e-256", ROW, 2, 8),  # closed to a ring
        ("v5e-256", ROW[:8], 1, 7),
        ("v5e-256", ROW[::2], 1, 8),  # a ring, whose links are shared with the chips between
        ("v5e-64", ROW[:8], 1, 7),
        ("v5e-64", ROW[:8:2], 1 / 2, 6),
        ("v5p:4x4x4", [(0, 0, z) for z in range(4)], 2, 2),
        ("v5p:2x2x4", [(0, 0, z) for z in range(4)], 1, 3),  # below a cube of 4x4x4 nothing is closed
        ("v5e-8", [(1, 2, 0)], 0, 0),
    ],
)
def test_links_of_a_group(name, group, links, hops):
    topology = parse_topology(name)
    assert (topology.links(group), topology.hops(group)) == (links, hops)


def test_a_route_goes_the_shorter_way():
    ring, line = parse_topology("v5e-256"), parse_topology("v5e-64")
    assert ring.route((0, 15, 0), (0, 0, 0)) == [Link((0, 15, 0), 1, 1)]
    assert ring.route((0, 1, 0), (0, 14, 0)) == [Link((0, y, 0), 1, -1) for y in (1, 0, 15)]
    assert line.route((0, 1, 0), (1, 3, 0)) == [Link((0, 1, 0), 0, 1), Link((1, 1, 0), 1, 1), Link((1, 2, 0), 1, 1)]
    assert line.route((2, 2, 0), (2, 2, 0)) == []
