from llama4_jax.data import python_corpus
from llama4_jax.data.python_corpus import help_topics, python_documents, standard_library


def test_this_python_carries_megabytes_of_source_without_tests_or_tables():
    documents = dict(python_documents())
    assert "json/decoder.py" in documents
    folders = {part for name in documents for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
    assert sum(map(len, documents.values())) > 3_000_000  # a slim Python still has that


def test_order_is_that_of_names_and_encodings_are_the_declared_ones(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "b/a.py").write_text("a = 1\n")
    (tmp_path / "z.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'é'\n".encode("latin-1"))
    (tmp_path / "a.py").write_text("'中'\n", encoding="utf-8")
    (tmp_path / "tests/t.py").write_text("assert True\n")
    (tmp_path / "broken.py").write_bytes(b"'\xe9'\n")
    (tmp_path / "unknown.py").write_bytes(b"# coding: no-such-codec\n")
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere.py")
    assert list(standard_library(tmp_path)) == [
        ("a.py", "'中'\n"),
        ("z.py", "# -*- coding: latin-1 -*-\nname = 'é'\n"),
        ("b/a.py", "a = 1\n"),
    ]


def test_a_python_without_help_topics_gives_none(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(python_corpus.importlib, "import_module", missing)
    assert list(help_topics()) == []
