import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama4_jax.checkpoints import file_tensor
from llama4_jax.checkpoints.file_tensor import FileTensor, InterleavedRows, Joined
from llama4_jax.errors import UserError


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """A file of the first 5,000 numbers, after a head of 12 bytes."""
    path = tmp_path_factory.mktemp("numbers") / "file"
    path.write_bytes(b"head of file" + np.arange(5000, dtype=np.float32).tobytes())
    with open(path, "rb") as file:
        yield file


def stored(file, *shape):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return FileTensor.contiguous(file, "file: tensor x", 12, shape, np.dtype(np.float32)), array


@st.composite
def parts(draw):
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    ends = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return tuple(shape), tuple(slice(*end) for end in ends)[: draw(st.integers(0, len(shape)))]


@given(parts(), st.sampled_from([4, 60, 2**24]), st.booleans())
def test_a_part_is_numpys_whatever_is_read_at_once(numbers, part, block, transposed):
    shape, index = part
    tensor, array = stored(numbers, *shape)
    if transposed:
        tensor, array, index = tensor.transposed(), array.T, tuple(slice(None) for _ in index)
    original, file_tensor.BLOCK_BYTES = file_tensor.BLOCK_BYTES, block
    try:
        np.testing.assert_array_equal(tensor.read(index), array[index])
        np.testing.assert_array_equal(tensor.part(index).read(), array[index])
    finally:
        file_tensor.BLOCK_BYTES = original


def test_views_split_rows_and_join(numbers):
    tensor, array = stored(numbers, 6, 5)
    np.testing.assert_array_equal(tensor.split_rows(3).read((slice(1, 3),)), array.reshape(3, 2, 5)[1:3])
    wide = Joined((tensor, tensor.part((slice(None), slice(1, 4)))), axis=1)
    expected = np.concatenate([array, array[:, 1:4]], axis=1)
    for start in range(9):
        for stop in range(start, 9):
            np.testing.assert_array_equal(wide.read((slice(2, 5), slice(start, stop))), expected[2:5, start:stop])
    with pytest.raises(UserError, match="does not continue"):
        Joined((tensor, tensor.transposed()), axis=1)


def test_halves_of_rotary_rows_become_pairs(numbers):
    tensor, array = stored(numbers, 8, 3)  # two heads of four rows: pairs (0, 2), (1, 3) and (4, 6), (5, 7)
    rows = InterleavedRows(tensor, heads=2)
    expected = array[[0, 2, 1, 3, 4, 6, 5, 7]]
    for start in range(8):
        for stop in range(start, 9):
            np.testing.assert_array_equal(rows.read((slice(start, stop), slice(1, 3))), expected[start:stop, 1:3])


def test_a_file_that_ends_early_is_an_error_that_names_the_tensor(numbers):
    tensor, _ = stored(numbers, 50, 50)
    with pytest.raises(UserError, match="file: tensor x cannot be read: the file is truncated"):
        dataclasses.replace(tensor, offset=12 + 4 * 2501).read()
