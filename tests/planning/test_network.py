"""Times of exchanges follow from where devices sit."""

import collections
import itertools

import pytest

from llama4_jax.errors import UserError
from llama4_jax.planning.chips import CHIPS, parse_topology
from llama4_jax.planning.network import Network
from llama4_jax.planning.work import Collective

LINK = CHIPS["v5p"].link_bandwidth


def seconds(topology: str, kind: str, group, sent: float = 12e9, slices: int = 1) -> float:
    found = parse_topology(topology, slices)
    network = Network.in_order(found, {"data": found.devices})
    return network.seconds(Collective(kind, sent, tuple(group), False))


def test_a_ring_uses_both_directions_and_two_axes_twice_as_many_links():
    line = seconds("v5p:2x2x8", "all-gather", range(8))
    ring = seconds("v5p:4x4x8", "all-gather", range(8))
    plane = seconds("v5p:4x4x8", "all-gather", range(32))
    assert line == pytest.approx(12e9 / LINK)
    assert ring == pytest.approx(line / 2)
    assert plane == pytest.approx(line / 4)


def test_interleaved_groups_share_their_links():
    assert seconds("v5p:2x2x8", "all-gather", range(0, 8, 2)) == pytest.approx(2 * 12e9 / LINK)


def test_an_all_to_all_is_bound_by_the_middle_of_its_longest_axis():
    """In a ring of 4, a chip sends each other one a quarter: two to neighbours, one two hops away, over two links."""
    held = 4e9
    assert seconds("v5p:4x4x4", "all-to-all", range(4), held * 3 / 4) == pytest.approx(held / 2 / LINK)
    assert seconds("v5p:4x4x8", "all-to-all", range(8), held * 7 / 8) == pytest.approx(held / LINK)


def test_an_all_to_all_over_four_times_eight_chips_counted_hop_by_hop():
    """Of 32 chips that hold 32 pieces each, every link along the eight carries 32 in each direction: Maverick's rows on 128 v5p."""
    sizes, load = (4, 8), collections.Counter()
    for source, target in itertools.permutations(itertools.product(*map(range, sizes)), 2):
        at = list(source)
        for axis, size in enumerate(sizes):
            ahead = (target[axis] - at[axis]) % size
            ways = [(step, hops) for step, hops in ((1, ahead), (-1, size - ahead)) if hops <= size / 2]  # two to the far side
            for step, hops in ways:
                for i in range(hops):
                    place = [*at[:axis], (at[axis] + step * i) % size, *at[axis + 1 :]]
                    load[(*place, axis, step)] += 1 / len(ways)
            at[axis] = target[axis]
    assert {pieces for (*_, axis, _), pieces in load.items() if axis == 1} == {max(load.values())} == {32}
    assert seconds("v5p:4x4x8", "all-to-all", range(32), sent=31e9) == pytest.approx(max(load.values()) * 1e9 / LINK)


def test_a_permutation_takes_as_long_as_its_farthest_pair():
    neighbours = [place for i in range(8) for place in (i, (i + 1) % 8)]
    assert seconds("v5p:4x4x8", "collective-permute", neighbours) == pytest.approx(12e9 / LINK)
    assert seconds("v5p:2x2x8", "collective-permute", neighbours) == pytest.approx(7 * 12e9 / LINK)  # no way round


def test_slices_and_nodes_are_joined_by_the_slow_network():
    assert seconds("v5p:2x2x1", "all-reduce", [0, 4], slices=2) == pytest.approx(12e9 / CHIPS["v5p"].dcn_bandwidth)
    assert seconds("h100:2x8", "all-gather", range(8)) == pytest.approx(12e9 / CHIPS["h100"].link_bandwidth)
    assert seconds("h100:2x8", "all-gather", range(16)) == pytest.approx(12e9 / CHIPS["h100"].dcn_bandwidth)


def test_axes_of_groups_and_pairs():
    network = Network.in_order(parse_topology("v5p:2x2x2"), {"data": 1, "fsdp": 2, "expert": 4})
    axes = lambda kind, *group: network.axes_of(Collective(kind, 1.0, group, False))  # noqa: E731
    assert axes("all-gather", 0, 4) == ("fsdp",)
    assert axes("all-gather", 0, 1, 2, 3) == ("expert",)
    assert axes("all-reduce", *range(8)) == ("fsdp", "expert")
    assert axes("collective-permute", 0, 1, 1, 2, 2, 3, 3, 0) == ("expert",)


@pytest.mark.parametrize(
    "text, slices, word",
    [
        ("v5p", 1, "CHIP:SIZES"),
        ("v9:2x2", 1, "chips are"),
        ("v5p:4x4", 1, "v5p:XxYxZ"),
        ("v5e:4x4x4", 1, "v5e:XxY"),
        ("h100:8", 1, "NODESxGPUS"),
        ("h100:2x8", 2, "no slices"),
        ("v5p:2x2x1", 0, "1 or more"),
    ],
)
def test_topologies_that_are_none(text, slices, word):
    with pytest.raises(UserError, match=word):
        parse_topology(text, slices)


def test_devices_of_topologies():
    assert parse_topology("tpu7x:4x4x4").devices == 128
    assert parse_topology("v5p:4x4x8", 2).devices == 256
    assert parse_topology("h100:16x8").devices == 128
