import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.parallel.expert_parallel import (
    BufferRows,
    buffer_rows,
    choose_exchange,
    exchange_bytes,
    from_slots,
    line_up,
    sum_of_rounds,
    to_slots,
)

SCOUT = {
    "tokens": 8192, "hidden_size": 5120, "experts_per_token": 1, "num_experts": 16, "expert_ffn_size": 8192,
    "expert_shards": 8, "tensor_shards": 1, "itemsize": 2,
}  # fmt: skip


def test_bytes_are_those_of_the_formula():
    """Eight shards, 8,192 tokens: a bucket of 1,120 rows to seven others, there and back, against all 8,192."""
    assert buffer_rows(8192, 8) == BufferRows(first=1120, later=256)
    assert exchange_bytes("all_to_all", **SCOUT) == 4 * 7 * 1120 * 5120 * 2
    assert exchange_bytes("all_gather", **SCOUT) == 4 * 7 * 8192 * 5120 * 2
    assert exchange_bytes("gather_weights", **SCOUT) == 3 * 7 * 2 * 3 * 5120 * 8192 * 2
    assert exchange_bytes("all_to_all", **SCOUT | {"tensor_shards": 4}) == 4 * 7 * 1120 * 1280 * 2
    assert exchange_bytes("gather_weights", **SCOUT | {"tensor_shards": 4}) == 3 * 7 * 2 * 3 * 5120 * 2048 * 2


@pytest.mark.parametrize("rows, shards", [(1, 8), (3, 2), (8, 8), (100, 3)])
def test_buffers_hold_something_and_never_more_than_there_is(rows, shards):
    size = buffer_rows(rows, shards)
    assert 1 <= size.later <= rows and size.first <= rows
    assert size.first * shards >= rows or size.first == rows
    assert size.first <= max(1.1 * rows / shards, rows / shards + 8)


def test_the_cheapest_exchange_is_chosen():
    assert choose_exchange(**SCOUT) == "all_to_all"
    assert choose_exchange(**SCOUT | {"tokens": 1_000_000}) == "gather_weights"
    assert choose_exchange(**SCOUT | {"tokens": 8}) == "all_gather"  # a bucket is a tile at least
    assert choose_exchange(**SCOUT | {"experts_per_token": 8}) == "all_gather"  # as many choices as shards
    assert choose_exchange(**SCOUT | {"expert_shards": 2}) == "all_to_all"


@pytest.mark.parametrize("receivers, size, high", [(3, 2, 4), (3, 5, 1), (1, 8, 2), (1, 8, 1)])
def test_every_pair_with_a_receiver_has_one_slot_in_one_round(receivers, size, high):
    """Spread over everybody and nobody (a receiver past the last), and all to one."""
    tokens, choices = 12, 2
    receiver = np.random.default_rng(0).integers(0, high, (tokens, choices))
    queue = line_up(jnp.asarray(receiver), receivers)
    np.testing.assert_array_equal(queue.lengths, np.bincount(receiver.reshape(-1), minlength=receivers + 1)[:receivers])
    seen = []
    for first in range(0, int(queue.lengths.max()), size):
        slots = queue.slots(first, size)
        for slot, pair in enumerate(np.asarray(slots.pair)):
            if pair < tokens * choices:
                seen.append(pair)
                assert receiver.reshape(-1)[pair] == slot // size
                assert np.asarray(slots.slot).reshape(-1)[pair] == slot
    assert sorted(seen) == np.flatnonzero(receiver.reshape(-1) < receivers).tolist()


def test_moving_rows_to_slots_and_back_are_transposes_of_each_other():
    rng = np.random.default_rng(0)
    slots = line_up(jnp.asarray(rng.integers(0, 4, (10, 2))), 3).slots(0, 4)
    x, y = jnp.asarray(rng.standard_normal((10, 5))), jnp.asarray(rng.standard_normal((12, 5)))
    np.testing.assert_allclose(jnp.vdot(to_slots(x, slots), y), jnp.vdot(x, from_slots(y, slots)), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda x: jnp.vdot(to_slots(x, slots), y))(x), from_slots(y, slots), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda y: jnp.vdot(x, from_slots(y, slots)))(y), to_slots(x, slots), rtol=1e-6)


def test_a_sum_of_rounds_has_the_gradient_of_the_sum():
    """Of lines of 0, 4 and 9 places: rounds of 4 and then 2."""
    one_round = lambda first, size, index, x, w: size * jnp.sin(x * (first + 1) + index) * w  # noqa: E731
    x, w, index = jnp.linspace(0.0, 1.0, 5), jnp.linspace(1.0, 2.0, 5), jnp.arange(5)
    for longest, pieces in ((0, [(0, 4)]), (4, [(0, 4)]), (9, [(0, 4), (4, 2), (6, 2), (8, 2)])):
        plain = lambda x, w: sum(one_round(*piece, index, x, w) for piece in pieces).sum()  # noqa: B023, E731
        looped = lambda x, w: sum_of_rounds(one_round, BufferRows(4, 2), jnp.int32(longest), index, x, w).sum()  # noqa: B023, E731
        for got, want in zip(*(jax.value_and_grad(f, (0, 1))(x, w) for f in (looped, plain)), strict=True):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
