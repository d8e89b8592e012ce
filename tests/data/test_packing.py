import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.data.packing import PackedRows, TokenizedDocuments, check_windows, plan_packing


def packed(lengths, sequence_length, window):
    """Rows of documents whose tokens are all different, counted from 1."""
    lengths = np.array(lengths, np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    documents = TokenizedDocuments(
        ids=np.arange(1, starts[-1] + 1, dtype=np.uint32), starts=starts, sources=np.arange(len(lengths), dtype=np.int32) % 3
    )
    return PackedRows(documents, plan_packing(lengths, sequence_length, window), sequence_length, window)


layouts = st.sampled_from([(8, None), (8, 8), (8, 16), (8, 4), (8, 2), (8, 1), (12, 3), (12, 4), (16, 4), (1, None)])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(2, 60), max_size=30), layouts)
def test_packing_promises(lengths, layout):
    sequence_length, window = layout
    rows = packed(lengths, sequence_length, window)
    batch = rows.batch(range(len(rows)))
    assert batch.tokens.shape == (len(rows), sequence_length)
    used = batch.segment_ids > 0

    # Every token but each document's first is predicted exactly once, and by the token before it.
    predicted = batch.targets[used]
    begins = rows.documents.ids[rows.documents.starts[:-1]]
    np.testing.assert_array_equal(np.sort(predicted), np.setdiff1d(rows.documents.ids, begins))
    np.testing.assert_array_equal(batch.tokens[used] + 1, predicted)
    np.testing.assert_array_equal(batch.loss_weights, used)
    document = np.searchsorted(rows.documents.starts, predicted - 1, side="right") - 1
    np.testing.assert_array_equal(batch.source_ids[used], rows.documents.sources[document])

    # Segments count from 1 in each row, each in one piece, and positions restart in each.
    for row in range(len(rows)):
        segments = batch.segment_ids[row]
        assert sorted(set(segments) - {0}) == list(range(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            places = np.flatnonzero(segments == segment)
            np.testing.assert_array_equal(places, np.arange(places[0], places[0] + len(places)))
            np.testing.assert_array_equal(batch.positions[row, places], np.arange(len(places)))
            np.testing.assert_array_equal(np.diff(batch.tokens[row, places]), 1)  # one document, in order
            if window is not None and window < sequence_length:
                if len(places) <= window:
                    assert places[0] // window == places[-1] // window
                else:
                    assert places[0] % window == 0
    for array in (batch.tokens, batch.targets, batch.positions, batch.source_ids):
        assert not array[~used].any()
    check_windows(batch.segment_ids, window)

    assert rows.padding_share == pytest.approx(1 - used.mean() if used.size else 1.0)
    if window is None or window >= sequence_length:  # best fit: no two rows would fit into one
        free = np.sort(sequence_length - used.sum(1))
        assert len(free) < 2 or free[-1] + free[-2] < sequence_length


def test_a_document_of_one_row_one_more_and_one_less():
    rows = packed([9, 10, 8], 8, None)
    lengths = sorted(zip(rows.plan.document, rows.plan.start, rows.plan.length, strict=True))
    assert lengths == [(0, 0, 8), (1, 0, 8), (1, 8, 1), (2, 0, 7)]
    assert len(rows) == 3  # the 7 and the 1 share a row


def test_what_a_long_piece_leaves_of_its_last_window_is_used():
    rows = packed([11, 3], 12, 4)  # pieces of 10 and 2
    assert len(rows) == 1
    np.testing.assert_array_equal(rows.batch([0]).segment_ids, [[1] * 10 + [2] * 2])


def test_documents_without_predictions_take_no_place():
    assert len(packed([1, 1], 8, None)) == 0
    assert len(packed([], 8, 4)) == 0


def test_packing_wastes_little():
    lengths = np.random.default_rng(0).integers(2, 300, 2000)
    assert packed(lengths, 512, None).padding_share < 0.005
    assert packed(lengths, 512, 256).padding_share < 0.02


def test_empty_rows_fill_a_batch():
    batch = packed([5, 20], 8, None).batch([1], batch_size=3)
    assert batch.tokens.shape == (3, 8)
    assert batch.segment_ids[0].any()
    for array in (batch.tokens, batch.targets, batch.loss_weights, batch.positions, batch.segment_ids):
        assert not array[1:].any()


def test_a_window_that_does_not_divide_the_row_is_refused():
    with pytest.raises(ValueError, match="must divide"):
        plan_packing(np.array([5]), 8, 3)


@pytest.mark.parametrize(
    "row, message",
    [
        ([1, 1, 1, 2, 2, 0, 0, 0], "segment 2 of 2 tokens starts at 3"),
        ([0, 1, 1, 1, 1, 1, 0, 0], "segment 1 of 5 tokens starts at 1"),
        ([1, 1, 2, 2, 2, 2, 2, 2], "segment 2 of 6 tokens starts at 2"),
    ],
)
def test_a_broken_window_promise_is_found(row, message):
    good = [1, 1, 1, 1, 1, 2, 2, 0]
    check_windows(np.array([good]), 4)
    check_windows(np.array([row]), None)
    with pytest.raises(ValueError, match="row 1: " + message):
        check_windows(np.array([good, row]), 4)


def test_the_same_segment_at_a_rows_end_and_the_next_rows_start_are_two():
    check_windows(np.array([[1, 1, 2, 2], [2, 2, 3, 3]]), 2)
