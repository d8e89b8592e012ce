"""The benchmark measures what is here, and says of a peer that is not why it was left out."""

import json

from pallas_kernels import bench


def run(capsys, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["bench", "--shape=tiny", "--repeats=1", *arguments])
    return bench.main(), capsys.readouterr()


def test_every_contender_has_a_time_or_a_reason(capsys, monkeypatch):
    status, printed = run(capsys, monkeypatch, "--json")
    record = json.loads(printed.out)
    assert status == 0 and record["peak_flops"] > 0
    assert {row["contender"] for row in record["rows"]} == {"xla", "tokamax", "cudnn", "cudnn, a mask"}
    for row in record["rows"]:
        assert (row["milliseconds"] is None) == (row["share_of_peak"] is None) == (row["refused"] is not None)
        if row["contender"] == "xla":
            assert row["milliseconds"] > 0


def test_the_table_names_the_missing(capsys, monkeypatch):
    _, printed = run(capsys, monkeypatch, "--op=attention")
    assert "cudnn" in printed.out and "cuDNN is not" in printed.out


def test_an_unknown_operation_is_one_line(capsys, monkeypatch):
    status, printed = run(capsys, monkeypatch, "--op=atention")
    assert status == 2 and "no op atention; choose from grouped_matmul" in printed.err
