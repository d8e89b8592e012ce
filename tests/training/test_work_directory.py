import json
import logging
import os

import pytest

from llama4_jax.config import DataConfig, EvaluationConfig, Experiment, ModelConfig, RopeScaling
from llama4_jax.errors import UserError
from llama4_jax.training.work_directory import WorkDirectory, flatten_experiment


def experiment(**changes):
    return Experiment(
        model=ModelConfig(rope_scaling=RopeScaling()),
        data=DataConfig(sources=("a", "b")),
        evaluations={"heldout": EvaluationConfig()},
        **changes,
    )


def test_settings_have_dotted_names_and_survive_json():
    flat = flatten_experiment(experiment())
    assert flat["model.rope_scaling.factor"] == 16.0
    assert flat["evaluations.heldout.every"] == 200
    assert flat["data.sources"] == ["a", "b"]
    assert flat["model.vision"] is None
    assert json.loads(json.dumps(flat)) == flat


def test_another_experiment_is_refused_with_names_and_both_values(tmp_path):
    WorkDirectory(tmp_path, experiment(seed=1))
    other = experiment(seed=2)
    other.model.rope_scaling = RopeScaling(factor=8.0)
    other.data.tokenizer = "x.json"
    with pytest.raises(UserError) as error:
        WorkDirectory(tmp_path, other)
    assert "seed is 1 there and 2 here" in str(error.value)
    assert "model.rope_scaling.factor is 16.0 there and 8.0 here" in str(error.value)
    assert "data.tokenizer is 'bpe' there and 'x.json' here" in str(error.value)
    assert json.loads((tmp_path / "experiment.json").read_text())["seed"] == 1


def test_a_setting_that_is_younger_than_the_folder_counts_as_its_default(tmp_path):
    settings = WorkDirectory(tmp_path, experiment()).settings
    settings.pop("optimizer.weight_decay")
    (tmp_path / "experiment.json").write_text(json.dumps(settings))
    WorkDirectory(tmp_path, experiment())
    (tmp_path / "experiment.json").write_text(json.dumps(settings))
    other = experiment()
    other.optimizer.weight_decay = 0.5
    with pytest.raises(UserError, match=r"weight_decay is 0\.1 there and 0\.5 here"):
        WorkDirectory(tmp_path, other)


def test_changed_data_are_taken_when_that_is_said_and_nothing_else_is(tmp_path):
    WorkDirectory(tmp_path, experiment(seed=1))
    other = experiment(seed=1)
    other.data.sources, other.data.shuffle_seed, other.data.batch_size = ("c",), 3, 64
    with pytest.raises(UserError, match=r"data\.batch_size is 16 there and 64 here; data\.shuffle_seed is 0 .*; data\.sources"):
        WorkDirectory(tmp_path, other)
    other.data.when_changed = "start_over"
    other.seed = 2
    with pytest.raises(UserError, match=r"another experiment: seed is 1 there and 2 here\. Choose"):
        WorkDirectory(tmp_path, other)
    other.seed = 1
    WorkDirectory(tmp_path, other)


def test_when_and_where_may_change(tmp_path):
    WorkDirectory(tmp_path, experiment())
    changed = experiment(steps=5, log_every=3)
    changed.checkpoint.every = 7
    changed.mesh.fsdp = 4
    changed.execution.remat = "layer"
    changed.evaluations = {}
    assert WorkDirectory(tmp_path, changed).settings["steps"] == 5
    assert json.loads((tmp_path / "experiment.json").read_text())["steps"] == 5


def test_lines_after_a_step_are_forgotten_and_so_is_one_cut_short(tmp_path):
    run = WorkDirectory(tmp_path, experiment())
    for step in (1, 2, 2, 3):
        run.append_metrics({"step": step})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 4, "lo')
    run.forget_metrics_after(2)
    assert [record["step"] for record in run.read_metrics()] == [1, 2, 2]
    run.append_metrics({"step": 3})
    assert [record["step"] for record in run.read_metrics()] == [1, 2, 2, 3]


BAD_LINES = {
    "no UTF-8": b'{"step": 2, "a": "\xff\xfe"}',
    "cut": b'{"step": 2, "lo',
    "zeros": bytes(40),
    "no record": b"[1, 2]",
    "no step": b'{"loss": 1.0}',
    "deeply nested": b"[" * 100_000,
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_damaged_line_takes_no_other_with_it(tmp_path, caplog, kind):
    """It is named, and the file as it was stays beside the one that is gone on with."""
    run = WorkDirectory(tmp_path, experiment())
    damaged = b'{"step": 1}\n' + BAD_LINES[kind] + b'\n{"step": 3}\n{"step": 4}\n{"step": 5, "x'
    run.metrics_file.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert [record["step"] for record in run.read_metrics()] == [1, 3, 4]
    assert f"{run.metrics_file}: line 2 cannot be read" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run.forget_metrics_after(3)
    assert "line 2 cannot be read and goes; " in caplog.text and "metrics.jsonl.damaged holds" in caplog.text
    caplog.clear()
    assert [record["step"] for record in run.read_metrics()] == [1, 3] and not caplog.records
    aside = tmp_path / "metrics.jsonl.damaged"
    assert aside.read_bytes() == damaged
    run.metrics_file.write_bytes(b"x\n")
    run.forget_metrics_after(9)
    assert aside.read_bytes() == damaged + b"x\n"  # what was there is not overwritten


def test_what_is_written_whole_is_on_the_disk(tmp_path, monkeypatch):
    """A rename of a file that is not there yet leaves an empty one when the machine stops."""
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.add(os.readlink(f"/proc/self/fd/{file}")) or fsync(file))
    run = WorkDirectory(tmp_path, experiment())
    run.forget_metrics_after(0)
    assert synced == {str(tmp_path / name) for name in ("experiment.json.tmp", "metrics.jsonl.tmp", ".")}


def test_lines_are_on_the_disk_when_that_is_asked(tmp_path, monkeypatch):
    run, synced, fsync = WorkDirectory(tmp_path, experiment()), [], os.fsync
    run.sync_metrics()  # there is nothing yet
    run.append_metrics({"step": 1})
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")) or fsync(file))
    run.sync_metrics()
    assert synced == [str(run.metrics_file)]


def test_metrics_that_cannot_be_cut_are_a_line(tmp_path, monkeypatch):
    run = WorkDirectory(tmp_path, experiment())
    run.append_metrics({"step": 1})
    (tmp_path / "metrics.jsonl.tmp").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: Is a directory"):
        run.forget_metrics_after(0)
    assert [record["step"] for record in run.read_metrics()] == [1]


@pytest.mark.parametrize("prepare", [lambda path: path.write_text("a file"), lambda path: None])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, prepare):
    prepare(tmp_path / "file")
    folder = tmp_path / "file" / "run" if (tmp_path / "file").exists() else "/proc/nowhere/run"
    with pytest.raises(UserError, match="cannot write to work directory"):
        WorkDirectory(folder, experiment())


def test_a_broken_experiment_file_is_not_overwritten(tmp_path):
    (tmp_path / "experiment.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*experiment.json"):
        WorkDirectory(tmp_path, experiment())
    assert (tmp_path / "experiment.json").read_text() == "{"
