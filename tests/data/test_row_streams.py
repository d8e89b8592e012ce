import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.data import row_streams
from llama4_jax.data.packing import TokenizedDocuments, check_windows, read_rows
from llama4_jax.data.row_streams import RowStream, StreamedPool, StreamedRows


def documents_of(lengths):
    """Documents whose tokens are all different, counted from 1."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenizedDocuments(np.arange(1, starts[-1] + 1, dtype=np.uint32), starts, np.arange(len(lengths)) % 3)


def rows_of_epoch(rows, pool, epoch):
    """All rows of an epoch, window by window, each window's rows in their order."""
    stream = RowStream(pool)
    stream.set_state({"epoch": epoch, "window": 0, "row": 0})
    plans = []
    while True:
        state = stream.get_state()
        plan = stream.next()
        if stream.get_state()["epoch"] > epoch:
            return plans, state
        plans.append(plan)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(2, 90), min_size=1, max_size=120), st.sampled_from([(8, None), (16, 4), (16, 16)]), st.integers(0, 9)
)
def test_every_epoch_predicts_every_token_once_and_keeps_the_window_promise(lengths, layout, seed):
    sequence_length, window = layout
    rows = StreamedRows(documents_of(np.array(lengths)), sequence_length, window)
    for members in (range(len(lengths)), np.arange(0, len(lengths), 2)):
        pool = StreamedPool(rows, members, seed)
        pool.per_epoch = min(3, len(members))  # as many windows as a large corpus would have
        expected = np.concatenate(
            [rows.documents.ids[rows.documents.starts[i] + 1 : rows.documents.starts[i + 1]] for i in members]
        )
        for epoch in (0, 1, 5):
            plans, _ = rows_of_epoch(rows, pool, epoch)
            batch = read_rows(rows.documents, plans, sequence_length, window)
            check_windows(batch.segment_ids, window)
            np.testing.assert_array_equal(np.sort(batch.targets[batch.segment_ids > 0]), np.sort(expected))


def big_pool(monkeypatch, seed=0, documents=3000):
    monkeypatch.setattr(row_streams, "_WINDOW_TOKENS", 64 * 128)
    lengths = np.random.default_rng(0).integers(2, 100, documents)
    rows = StreamedRows(documents_of(lengths), 128, 64)
    return rows, StreamedPool(rows, range(documents), seed)


def test_windows_bring_together_documents_from_everywhere_and_others_in_each_epoch(monkeypatch):
    _, pool = big_pool(monkeypatch)
    assert pool.per_epoch > 10
    seen = []
    for epoch in (0, 1):
        documents = np.concatenate([pool.window(epoch, number)[0].plan.document for number in range(pool.per_epoch)])
        assert set(documents) == set(range(3000))
        seen.append(set(pool.window(epoch, 0)[0].plan.document))
        quarters = np.bincount(np.array(list(seen[-1])) // 750, minlength=4)
        assert quarters.min() > 0.6 * quarters.mean()
    assert len(seen[0] & seen[1]) < len(seen[0]) / 2
    other = big_pool(monkeypatch, seed=1)[1]
    assert set(other.window(0, 0)[0].plan.document) != seen[0]


def test_rows_of_a_window_do_not_come_longest_document_first(monkeypatch):
    _, pool = big_pool(monkeypatch)
    stream = RowStream(pool)
    size = len(pool.window(0, 0)[0])
    longest = [stream.next().length.max() for _ in range(size)]
    assert abs(np.corrcoef(longest, np.arange(size))[0, 1]) < 0.5


def test_bounded_windows_waste_under_two_percent():
    lengths = np.minimum(np.random.default_rng(0).lognormal(6, 1, 20_000), 50_000).astype(np.int64) + 2
    for sequence_length, window in ((512, 256), (2048, None), (8192, 8192)):
        rows = StreamedRows(documents_of(lengths), sequence_length, window)
        pool = StreamedPool(rows, range(len(lengths)), 0)
        packed = [pool.window(0, number)[0] for number in range(pool.per_epoch)]
        used = sum(int(p.plan.length.sum()) for p in packed)
        assert 1 - used / (sum(map(len, packed)) * sequence_length) < 0.02, (sequence_length, window)


def test_a_stream_goes_on_from_its_state_across_windows_and_epochs(monkeypatch):
    _, pool = big_pool(monkeypatch, documents=700)
    unbroken = RowStream(pool)
    for _ in range(150):
        unbroken.next()
    for _ in range(400):  # over an epoch of some 280 rows
        state = json.loads(json.dumps(unbroken.get_state()))
        expected = unbroken.next()
        if state["row"] % 17 == 0:
            resumed = RowStream(pool)
            resumed.set_state(state)
            np.testing.assert_array_equal(resumed.next().document, expected.document)
            assert resumed.epochs == unbroken.epochs


def test_epochs_count_up_evenly(monkeypatch):
    _, pool = big_pool(monkeypatch, documents=700)
    stream = RowStream(pool)
    epochs = [stream.epochs]
    while stream.epochs < 2:
        stream.next()
        epochs.append(stream.epochs)
    assert epochs[0] == 0 and epochs[-1] == 2 and 1 in epochs
    assert np.all(np.diff(epochs) > 0) and max(np.diff(epochs)) < 3 * min(np.diff(epochs))


def test_a_pool_of_one_document_repeats_it():
    rows = StreamedRows(documents_of(np.array([5])), 8)
    stream = RowStream(StreamedPool(rows, range(1), 0))
    assert [stream.next().length.tolist() for _ in range(3)] == [[4]] * 3
    assert stream.epochs == 3
