import json

import pytest

from llama4_jax.data.sources import Document, read_source
from llama4_jax.errors import UserError


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_a_folder_gives_its_text_files_sorted_with_names_relative_to_it(tmp_path):
    write(
        tmp_path,
        {
            "b.txt": "b", "a/z.py": "z = 1\r\n", "a.md": "# a", "a/records.jsonl": '{"text": "one"}\n\n{"text": "two"}',
            "image.png": b"\xff", ".git/x.txt": "hidden", ".hidden.txt": "hidden",
        },
    )  # fmt: skip
    assert read_source(str(tmp_path)) == [
        Document("a.md", "# a"),
        Document("a/records.jsonl:1", "one"),
        Document("a/records.jsonl:3", "two"),
        Document("a/z.py", "z = 1\r\n"),
        Document("b.txt", "b"),
    ]


def test_names_do_not_depend_on_where_the_source_lies(tmp_path):
    for folder in ("here", "there"):
        write(tmp_path / folder, {"x/a.txt": "a"})
    assert read_source(str(tmp_path / "here")) == read_source(str(tmp_path / "there"))
    assert read_source(str(tmp_path / "here/x/a.txt")) == [Document("a.txt", "a")]


def test_text_is_kept_byte_for_byte(tmp_path):
    content = "\ufeffa\r\nb\rc\u2028d\x00\n".encode()
    write(tmp_path, {"a.txt": content, "b.jsonl": json.dumps({"body": "x\u2028y"}, ensure_ascii=False)})
    first, second = read_source(str(tmp_path), text_field="body")
    assert first.text.encode() == content
    assert second.text == "x\u2028y"


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": ', "line 2 is not JSON"),
        ('{"body": "x"}', "line 2 has no text in the field 'text'"),
        ('{"text": 3}', "line 2 has no text in the field 'text'"),
        ('["text"]', "line 2 has no text in the field 'text'"),
        (b'{"text": "\xe9"}', "line 2 is not UTF-8"),
        (r'{"text": "\ud800"}', "line 2: the field 'text' holds half of a surrogate pair"),
        ("[" * 100_000, "line 2 is not JSON"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    write(tmp_path, {"r.jsonl": b'{"text": "fine"}\n' + line + b"\n"})
    with pytest.raises(UserError, match=message) as error:
        read_source(str(tmp_path))
    assert str(tmp_path / "r.jsonl") in str(error.value)
    assert "\n" not in str(error.value)


def test_an_undecodable_file_is_named(tmp_path):
    write(tmp_path, {"good.txt": "good", "bad.txt": b"caf\xe9"})
    with pytest.raises(UserError, match=r"bad\.txt is not UTF-8: byte 3 is 0xe9"):
        read_source(str(tmp_path))


@pytest.mark.parametrize(
    "files, name, message",
    [
        ({}, "missing.txt", "no data at .*missing.txt"),
        ({"x/a.png": b""}, "x", "holds no file that ends in"),
        ({"a.bin": "text"}, "a.bin", "cannot tell what .*a.bin holds"),
        ({"empty.txt": ""}, "empty.txt", "holds no text"),
        ({"empty.jsonl": "\n\n"}, "empty.jsonl", "holds no text"),
        ({"e/a.txt": "", "e/b.txt": ""}, "e", "holds no text"),
    ],
)
def test_a_missing_or_empty_source_is_refused(tmp_path, files, name, message):
    write(tmp_path, files)
    with pytest.raises(UserError, match=message) as error:
        read_source(str(tmp_path / name))
    assert "\n" not in str(error.value)
