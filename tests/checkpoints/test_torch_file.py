"""Files of torch.save from strangers: nothing in them runs, and no claim costs more than the file is large."""

import os
import pickle
import random
import tracemalloc
import zipfile

import numpy as np
import pytest

from llama4_jax.checkpoints.torch_file import open_torch
from llama4_jax.checkpoints.torch_pickle import MAX_OPCODES, read_pickle
from llama4_jax.errors import UserError

NUMBERS = np.arange(12, dtype=np.float32)
CONTENT = NUMBERS.tobytes()


# The instructions of a pickle, written by hand: what torch.save writes, and what it would never


def glob(name):
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def text(value):
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def number(value):
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def tup(*parts):
    return b"(" + b"".join(parts) + b"t"


def storage(key="0", numel=12, kind="torch.FloatStorage"):
    return tup(text("storage"), glob(kind), text(key), text("cpu"), number(numel)) + b"Q"


def tensor(shape=(3, 4), strides=(4, 1), offset=0, of=None, maker="torch._utils._rebuild_tensor_v2"):
    numbers = tup(*map(number, shape)), tup(*map(number, strides))
    hooks = glob("collections.OrderedDict") + b")R"
    return glob(maker) + tup(of or storage(), number(offset), *numbers, b"\x89", hooks) + b"R"


def saved(**values):
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in values.items()) + b"u."


def archive(path, program, numbers=CONTENT, compression=zipfile.ZIP_STORED, **entries):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("model/data.pkl", program)
        for name, content in {"data/0": numbers, "version": b"3\n"}.items() | entries.items():
            if content is not None:
                file.writestr(f"model/{name}", content)
    return path


def read(path):
    with open(path, "rb") as file:
        return {name: tensor.read() for name, tensor in open_torch(file, path).items()}


def refused(path, *words):
    tracemalloc.start()
    with pytest.raises(UserError) as error:
        read(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**26
    message = str(error.value)
    assert str(path) in message and "\n" not in message and all(word in message for word in words), message


def test_tensors_are_read_by_shape_strides_and_offset(tmp_path):
    views = {
        "whole": tensor(),
        "transposed": tensor((4, 3), (1, 4)),
        "corner": tensor((2, 2), (4, 1), offset=6),
        "column": tensor((3,), (4,), offset=1),
        "empty": tensor((0, 4), (4, 1)),
        "scalar": tensor((), (), offset=5),
    }
    path = archive(tmp_path / "file", saved(**views))
    whole = NUMBERS.reshape(3, 4)
    expected = {
        "whole": whole, "transposed": whole.T, "corner": whole[1:, 2:], "column": whole[:, 1], "empty": whole[:0],
        "scalar": np.float32(5),
    }  # fmt: skip
    found = read(path)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    with open(path, "rb") as file:
        part = open_torch(file, path)["transposed"].read((slice(1, 3), slice(1, 2)))
    np.testing.assert_array_equal(part, whole.T[1:3, 1:2])


def test_torch_reads_the_handmade_files_the_same(tmp_path):
    """So the tests above and below speak of what torch means."""
    torch = pytest.importorskip("torch")
    path = archive(tmp_path / "file", saved(a=tensor(), b=tensor((4, 3), (1, 4))), byteorder=b"little")
    for name, value in torch.load(path, weights_only=True).items():
        np.testing.assert_array_equal(read(path)[name], value)


# Programs


class Runs:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


class Evaluates:
    def __reduce__(self):
        return eval, ("__import__('os').getpid()",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(("value", "name"), [(Runs(), "system"), (Evaluates(), "eval")])
def test_a_program_in_the_pickle_is_not_run(tmp_path, monkeypatch, protocol, value, name):
    path = archive(tmp_path / "file", pickle.dumps({"a": value}, protocol=protocol))
    monkeypatch.chdir(tmp_path)
    refused(path, "data.pkl")
    assert not (tmp_path / "it_ran").exists()
    if protocol == 2:
        refused(path, f".{name}'", "nothing of it was run")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (saved(a=glob("os.system") + tup(text("true")) + b"R"), "names 'os.system'"),
        (saved(a=b"\x8c\x02os\x8c\x06system\x93" + tup(text("true")) + b"R"), "names 'os.system'"),
        (saved(a=glob("torch._utils._rebuild_tensor") + b")R"), "names 'torch._utils._rebuild_tensor'"),
        (saved(a=glob("torch.hub.loadStorage") + b")R"), "names 'torch.hub.loadStorage'"),
        (saved(a=glob("torch.FloatStorage") + b")R"), "calls torch.FloatStorage in a way"),
        (saved(a=b"(S'x'\nios\nsystem\n"), "instruction"),
        (saved(a=text("x") + b"\x85R"), "calls something that is no function"),
        (saved(a=b"]" + text("x") + b"b"), "sets attributes of something"),
        (saved(a=b")" + text("x") + text("y") + b"s"), "sets items of something"),
        (saved(a=text("x") + b"Q"), "is damaged"),
        (saved(a=tup(*[text("x")] * 5) + b"Q"), "refers to something other than a storage"),
        (b"\x80\x02}", "is damaged"),
        (b"\x80\x02.", "is damaged"),
        (b"\x80\x02h\x07.", "is damaged"),
        (b"\x80\x02t.", "is damaged"),
        (b"\x80\x02]}s.", "is damaged"),
        (b"\x80\x02}(]u.", "is damaged"),
        (b"\x80\x02}(]]u.", "is damaged"),
        (b"\x80\x02X\xff\xff\xff\x7f.", "is damaged"),
        (b"\x80\x02\x8d" + b"\xff" * 8 + b".", "is damaged"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "is damaged"),
        (b"\x80\x02" + b"(" * 10 + b"\xfe.", "is damaged"),
        (b"\x80\x02(i\n.", "is damaged"),
        (b"\x80\x02]q\x00.", "holds no dictionary"),
        (b"", "is damaged"),
        (b"\x80\x02" + b"}" * (MAX_OPCODES + 1) + b".", "instructions"),
        (b"\x80\x02]" + b"\x85" * 100_000 + b".", "holds no dictionary"),  # nested without end; no recursion follows it
    ],
)  # fmt: skip
def test_other_programs_are_refused_in_one_line(tmp_path, program, words):
    refused(archive(tmp_path / "file", program), "data.pkl" if "dictionary" not in words else "", words)


def test_tuples_of_tuples_cost_nothing():
    """Each of forty holds the one before it twice: a billion leaves, if anything counted them."""
    program = b"\x80\x02)q\x00" + b"".join(b"h%c" % i * 2 + b"\x86q%c" % (i + 1) for i in range(40)) + b"."
    assert len(read_pickle(program, "here")) == 2


# Claims about sizes


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (tensor((3, 5), (5, 1)), "reaches beyond its storage of 12"),
        (tensor((3, 4), (4, 1), offset=1), "reaches beyond its storage"),
        (tensor((2**40,), (0,)), "reaches beyond its storage"),
        (tensor((2**62, 2**62), (2**62, 1)), "reaches beyond its storage"),
        (tensor((3, 4), (4,)), "shape, strides and offset are not"),
        (tensor((-3, 4), (4, 1)), "shape, strides and offset are not"),
        (tensor((3, 4), (-4, 1), offset=8), "shape, strides and offset are not"),
        (tensor((2**70,), (1,)), "shape, strides and offset are not"),
        (tensor((1,) * 9, (1,) * 9), "shape, strides and offset are not"),
        (tensor(of=storage(numel=13)), "13 numbers does not match its 48 bytes"),
        (tensor(of=storage(numel=2**60)), "does not match its 48 bytes"),
        (tensor(of=storage(key="7")), "entry data/7, are missing"),
        (tensor(of=storage(key="../version")), "are missing"),
        (tensor(of=storage(kind="torch.LongStorage")), "has a LongStorage"),
        (tensor(of=storage(kind="torch.NoSuchStorage")), "has a NoSuchStorage"),
    ],
)
def test_a_tensor_that_its_storage_does_not_hold_is_named(tmp_path, made, words):
    refused(archive(tmp_path / "file", saved(weight=made)), "tensor weight", words)


# Archives


def test_tricks_with_the_archive_are_refused(tmp_path):
    good = saved(a=tensor())
    refused(archive(tmp_path / "deflated", good, compression=zipfile.ZIP_DEFLATED), "is compressed or encrypted")
    bomb = archive(tmp_path / "bomb", good, numbers=bytes(10**7), compression=zipfile.ZIP_DEFLATED)
    refused(bomb, "is compressed or encrypted")
    refused(archive(tmp_path / "missing", good, numbers=None), "entry data/0, are missing")
    refused(archive(tmp_path / "big-endian", good, byteorder=b"big"), "big-endian")
    refused(archive(tmp_path / "large", good + bytes(2**24)), "exceeds")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "twice", "w") as file:
        for _ in range(2):
            file.writestr("model/data.pkl", good)
    refused(tmp_path / "twice", "occurs twice")
    with zipfile.ZipFile(tmp_path / "two", "w") as file:
        file.writestr("model/data.pkl", good)
        file.writestr("other/data.pkl", good)
    refused(tmp_path / "two", "without the one data.pkl")
    for name, content in {"empty": b"", "text": b"hello" * 100, "legacy": pickle.dumps({"a": 1}, protocol=2)}.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "not a file of torch.save")


def test_a_truncated_or_shifted_archive_is_refused(tmp_path):
    path = archive(tmp_path / "file", saved(a=tensor()))
    content = path.read_bytes()
    for keep in (10, len(content) // 2, len(content) - 30, len(content) - 1):
        path.write_bytes(content[:keep])
        refused(path, "truncated or not a file of torch.save")
    changed = bytearray(content)
    changed[content.rindex(b"PK\x01\x02") + 42] ^= 0xFF  # where the last entry is said to begin
    path.write_bytes(changed)
    refused(path, "")


@pytest.mark.parametrize("seed", range(2))
def test_any_changed_bytes_give_tensors_or_one_line(tmp_path, seed):
    good = archive(tmp_path / "good", saved(a=tensor(), b=tensor((4, 3), (1, 4)))).read_bytes()
    random_, refusals = random.Random(seed), 0
    tracemalloc.start()
    for _ in range(300):
        content = bytearray(good)
        for _ in range(random_.choice([1, 1, 2, 8])):
            content[random_.randrange(len(content))] = random_.randrange(256)
        if random_.random() < 0.1:
            del content[random_.randrange(len(content)) :]
        (tmp_path / "file").write_bytes(content)
        try:
            assert all(value.nbytes <= NUMBERS.nbytes for value in read(tmp_path / "file").values())
        except UserError as error:
            assert "\n" not in str(error)
            refusals += 1
    assert refusals > 100
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
