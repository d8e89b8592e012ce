import json
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.data.mixture import Interleave

weights = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8)


def counts_after_each_row(weights, rows):
    mixture = Interleave(weights)
    for _ in range(rows):
        mixture.next()
        yield list(mixture.counts)


@settings(max_examples=200, deadline=None)
@given(weights, st.integers(1, 200))
def test_no_source_is_ever_a_whole_row_from_its_share(weights, rows):
    """In exact arithmetic, after every number of rows, within Tijdeman's bound."""
    shares = [Fraction(repr(weight)) / sum(Fraction(repr(w)) for w in weights) for weight in weights]
    bound = 1 - Fraction(1, max(2 * len(weights) - 2, 2))
    for n, counts in enumerate(counts_after_each_row(weights, rows), start=1):
        assert sum(counts) == n
        assert all(abs(n * share - count) <= bound < 1 for share, count in zip(shares, counts, strict=True))


@settings(max_examples=50, deadline=None)
@given(weights, st.integers(0, 100), st.integers(1, 50))
def test_any_window_holds_each_share_to_within_two_rows(weights, first, size):
    history = [[0] * len(weights), *counts_after_each_row(weights, first + size)]
    for i, weight in enumerate(weights):
        assert abs(history[first + size][i] - history[first][i] - size * weight / sum(weights)) < 2


def test_shares_that_divide_come_out_exactly_and_spread_evenly():
    assert [counts[0] for counts in counts_after_each_row([1, 3], 8)][3::4] == [1, 2]
    assert list(counts_after_each_row([0.7, 0.2, 0.1], 1000))[-1] == [700, 200, 100]
    assert list(counts_after_each_row([2.5], 3))[-1] == [3]


@given(weights, st.integers(0, 60))
def test_it_goes_on_from_its_counts(weights, rows):
    unbroken = Interleave(weights)
    for _ in range(rows):
        unbroken.next()
    resumed = Interleave(weights)
    resumed.counts = json.loads(json.dumps(unbroken.counts))
    assert [resumed.next() for _ in range(30)] == [unbroken.next() for _ in range(30)]
