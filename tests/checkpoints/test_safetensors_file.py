"""Headers from strangers: every claim is checked before it costs anything."""

import json
import random
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llama4_jax.checkpoints.safetensors_file import open_safetensors, safetensors_header
from llama4_jax.errors import UserError

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(5, dtype=np.float16),
    "c": np.arange(8, dtype=np.float32).reshape(2, 2, 2).astype(ml_dtypes.bfloat16),
    "empty": np.zeros((0, 4), np.float32),
}


def read(path):
    with open(path, "rb") as file:
        return {name: tensor.read() for name, tensor in open_safetensors(file, path).items()}


def write(path, header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


def entry(start=0, stop=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def test_what_the_library_writes_is_read_the_same(tmp_path):
    save_file(TENSORS, tmp_path / "file", metadata={"format": "pt"})
    found = read(tmp_path / "file")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)


def test_what_is_written_the_library_reads_the_same(tmp_path):
    head, places, size = safetensors_header({name: (tensor.shape, tensor.dtype) for name, tensor in TENSORS.items()})
    content = bytearray(size)
    content[: len(head)] = head
    for name, tensor in TENSORS.items():
        assert places[name] % tensor.itemsize == 0
        content[places[name] : places[name] + tensor.nbytes] = tensor.tobytes()
    (tmp_path / "file").write_bytes(content)
    found = load_file(tmp_path / "file")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(found[name], tensor)


@pytest.mark.parametrize(
    ("header", "data", "length", "words"),
    [
        (b"", b"", 2**63, "exceeds"),
        (b"{}", b"", 2**40, "exceeds"),
        (b"{}", b"", 100, "exceeds 2"),
        (b"[" * 100_000, b"", None, "header cannot be read"),
        (b'{"a": ', b"", None, "header cannot be read"),
        (b"\xff\xfe\xfd", b"", None, "header cannot be read"),
        (b"[1]", b"", None, "not a JSON object"),
        (b'{"a": {"dtype": 1e999999}}', b"", None, "tensor a is not described"),
        (b'{"a": {"shape": [' + b"9" * 5000 + b"]}}", b"", None, "header cannot be read"),
        (b'{"a": 1, "a": 1}', b"", None, "a name occurs twice"),
        ({"a": 3}, b"", None, "tensor a is not described"),
        ({"a\nb\x1b[2J": 3}, b"", None, r"tensor 'a\nb\x1b[2J' is not described"),
        (rb'{"\ud800": 3}', b"", None, r"tensor '\ud800' is not described"),
        ({"a": entry() | {"shape": "x"}}, b"12345678", None, "tensor a is not described"),
        ({"a": entry() | {"shape": [True, 2]}}, b"12345678", None, "tensor a is not described"),
        ({"a": entry() | {"data_offsets": [0]}}, b"12345678", None, "tensor a is not described"),
        ({"a": entry(shape=(-2,))}, b"12345678", None, "tensor a is not described"),
        ({"a": entry(shape=(2**63,))}, b"12345678", None, "tensor a is not described"),
        ({"a": entry(dtype="F31")}, b"12345678", None, "of an unknown dtype"),
        ({"a": entry(dtype=["F32"])}, b"12345678", None, "of an unknown dtype"),
        ({"a": entry(dtype="F8_E4M3")}, b"12345678", None, "F8_E4M3; only F32, F16, BF16"),
        ({"a": entry(shape=(2**31, 2**31, 2**31))}, b"12345678", None, "needs"),
        ({"a": entry(shape=(1,) * 64 + (2,))}, b"12345678", None, "needs"),
        ({"a": entry(0, 2**62, (2**60,))}, b"12345678", None, "truncated"),
        ({"a": entry(8, 0)}, b"12345678", None, "is said to lie at 8 to 0"),
        ({"a": entry(4, 12)}, b"12345678", None, "is said to lie at 4 to 12 of 8"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, b"123456789012", None, "tensor b begins at byte 4 of the data, but"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, b"12345678", None, "tensor b begins at byte 0 of the data, but"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, b"1" * 20, None, "tensor b begins at byte 12 of the data, but"),
        ({"a": entry(0, 8)}, b"1234567890", None, "its tensors end at byte 8 of 10"),
    ],
)
def test_a_hostile_header_is_refused_at_no_cost(tmp_path, header, data, length, words):
    path = write(tmp_path / "file", header, data, length)
    tracemalloc.start()
    with pytest.raises(UserError) as error:
        read(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert words in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
    assert most < 2**24


@pytest.mark.parametrize("seed", range(2))
def test_any_changed_bytes_give_tensors_or_one_line(tmp_path, seed):
    save_file(TENSORS, tmp_path / "good")
    good, random_ = (tmp_path / "good").read_bytes(), random.Random(seed)
    refused = 0
    tracemalloc.start()
    for _ in range(300):
        content = bytearray(good)
        for _ in range(random_.choice([1, 1, 2, 8])):
            content[random_.randrange(len(content))] = random_.randrange(256)
        if random_.random() < 0.2:
            del content[random_.randrange(len(content)) :]
        (tmp_path / "file").write_bytes(content)
        try:
            assert sum(tensor.nbytes for tensor in read(tmp_path / "file").values()) <= len(content)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 100
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
