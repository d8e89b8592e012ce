"""Every setting of every experiment as text, so that a default that moves is seen in review.

After a change that is meant: GOLDEN=write ./launch/test.sh tests/experiments
"""

import json
import os
from pathlib import Path

import pytest

from llama4_jax.app import load_experiment
from llama4_jax.sweep import load_sweep
from llama4_jax.training.work_directory import flatten_experiment

EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.py"))


def settings_of_experiment(path) -> str:
    return as_lines(flatten_experiment(load_experiment(str(path), {})))


def settings_of_sweep(path) -> str:
    """All settings of the first run, then of each other one those in which it differs."""
    first, text = {}, ""
    for run in load_sweep(str(path), {}).runs:
        settings = flatten_experiment(run.experiment)
        text += f"[{run.folder}]\n" + as_lines({k: v for k, v in settings.items() if k not in first or first[k] != v})
        first = first or settings
    return text


def as_lines(settings: dict) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_settings_are_those_of_the_golden_file(path):
    text = settings_of_sweep(path) if "def get_sweep" in path.read_text() else settings_of_experiment(path)
    golden = Path(__file__).parent / "golden" / f"{path.stem}.txt"
    if os.environ.get("GOLDEN") == "write":
        golden.write_text(text)
    assert golden.is_file(), f"no {golden.name}: write it with GOLDEN=write"
    assert text == golden.read_text()
