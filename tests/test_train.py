"""The app, as a person meets it: overrides, near names, and one line for every bad input."""

import subprocess
import sys
from pathlib import Path

import pytest

from llama4_jax.app import load_experiment, override
from llama4_jax.errors import UserError

FIXTURE = str(Path(__file__).parent / "fixtures/tiny_experiment.py")


@pytest.fixture
def config():
    return load_experiment(FIXTURE, {})


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("steps", "12", 12),
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("model.qk_norm", "false", False),
        ("model.attention_chunk_size", "none", None),
        ("model.attention_chunk_size", "8", 8),
        ("model.moe_layers", "0,1", (0, 1)),
        ("model.moe_layers", "(1,)", (1,)),
        ("model.moe_layers", "none", None),
        ("model.temperature", "none", None),
        ("model.temperature.floor", "16", 16.0),
        ("model.rope_scaling.factor", "8", 8.0),  # a group that is None is made
        ("execution.compute_dtype", "bfloat16", "bfloat16"),
        ("data.sources", "a.txt,b c.jsonl", ("a.txt", "b c.jsonl")),
        ("data.sources", "", ()),
        ("evaluations.heldout.every", "7", 7),
        ("evaluations.heldout.max_batches", "none", None),
    ],
)
def test_a_field_of_every_type_is_read(config, name, text, value):
    override(config, name, text)
    for part in name.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    assert config == value and type(config) is type(value)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("optimizer.lerning_rate", "1", "unknown field --config.optimizer.lerning_rate; did you mean optimizer.learning_rate?"),
        ("learning_rate", "1", "unknown field --config.learning_rate; did you mean optimizer.learning_rate?"),
        ("model.rope_scaling.facter", "1", "did you mean model.rope_scaling.factor"),
        ("evaluations.heldot.every", "1", "did you mean evaluations.heldout.every"),
        ("steps.more", "1", "unknown field --config.steps.more"),
        (
            "zzz",
            "1",
            "unknown field --config.zzz; groups are anomalies, checkpoint, data, evaluations, execution, init_from, log_every",
        ),
        ("optimizer", "1", "--config.optimizer is a group of fields, not a value; its fields are optimizer.rule,"),
        ("model.rope_scaling", "1", "--config.model.rope_scaling is a group of fields"),
        ("evaluations", "1", "--config.evaluations is a group of fields"),
        ("evaluations.heldout", "1", "--config.evaluations.heldout is a group of fields"),
        ("steps", "1.5", "--config.steps=1.5: must be a whole number"),
        ("optimizer.b1", "high", "--config.optimizer.b1=high: must be a number"),
        ("model.qk_norm", "1", "--config.model.qk_norm=1: must be true or false"),
        ("execution.remat", "some", "--config.execution.remat=some: must be one of none, projections, layer"),
        ("model.moe_layers", "0,x", "--config.model.moe_layers=0,x: must be a whole number"),
    ],
)
def test_a_bad_override_is_one_line_that_helps(config, name, text, message):
    with pytest.raises(UserError) as error:
        override(config, name, text)
    assert str(error.value).startswith(message) or message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_value_that_its_dataclass_refuses_is_told():
    with pytest.raises(UserError, match=r"OptimizerConfig\.learning_rate must be positive, got -1"):
        load_experiment(FIXTURE, {"optimizer.learning_rate": "-1"})
    with pytest.raises(UserError, match=r"EvaluationConfig\.every must be positive, got 0"):
        load_experiment(FIXTURE, {"evaluations.heldout.every": "0"})


@pytest.mark.parametrize(
    "text, message",
    [
        ("def get_config(:", "line 1: invalid syntax"),
        ("x = 1", "has no get_config()"),
        ("def get_config(): return 3", "get_config() returned int; it must be one Experiment"),
    ],
)
def test_a_file_that_is_no_experiment_is_told(tmp_path, text, message):
    (tmp_path / "experiment.py").write_text(text)
    with pytest.raises(UserError) as error:
        load_experiment(str(tmp_path / "experiment.py"), {})
    assert message in str(error.value)


def run_app(*arguments):
    command = [sys.executable, "-m", "llama4_jax.train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps by the app."""
    workdir = tmp_path_factory.mktemp("app") / "run"
    return workdir, run_app(f"--config={FIXTURE}", f"--workdir={workdir}", "--config.steps=2", "--config.log_every=2")


def test_the_app_trains_and_says_what_came_of_it(trained):
    workdir, process = trained
    assert process.returncode == 0, process.stderr
    assert "step 2/2: loss 5." in process.stderr and "left" in process.stderr
    assert "bits a byte of held-out text; gzip -9" in process.stdout and "a sample" in process.stdout
    assert (workdir / "checkpoints/2").is_dir() and (workdir / "loss.png").exists()


@pytest.mark.parametrize(
    "arguments, line",
    [
        ("--config=nowhere.py --workdir={new}", "error: --config=nowhere.py: no such file"),
        ("--config={fixture}", "error: --config=FILE and --workdir=DIR are both needed"),
        ("--config={fixture} --wrkdir={new}", "error: unknown argument '--wrkdir={new}'; did you mean --workdir?"),
        ("--config={fixture} --workdir={new} --config.optimizer.learning_rat=1", "error: unknown field --config.optimizer.learning_rat; did you mean optimizer.learning_rate?"),
        ("--config={fixture} --workdir={new} --config.steps=many", "error: --config.steps=many: must be a whole number"),
        ("--config={fixture} --workdir={new} --config.data.sources=/nowhere", "error: "),
        ("--config={fixture} --workdir={trained} --config.seed=3", "error: work directory {trained} belongs to another experiment: seed is 0 there and 3 here. Choose another --workdir"),
        ("--config={fixture} --workdir=/proc/run", "error: cannot write to work directory /proc/run: No such file or directory"),
    ],
)  # fmt: skip
def test_bad_input_ends_with_one_line_and_status_2(trained, tmp_path, arguments, line):
    names = {"fixture": FIXTURE, "new": tmp_path / "run", "trained": trained[0]}
    process = run_app(*arguments.format(**names).split())
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and process.stdout == ""
    assert process.stderr.startswith(line.format(**names))


def test_the_app_run_again_says_that_it_is_done(trained):
    process = run_app(f"--config={FIXTURE}", f"--workdir={trained[0]}", "--config.steps=2")
    assert process.returncode == 0
    assert f"{trained[0]} holds a finished run of 2 steps; nothing to do" in process.stdout
