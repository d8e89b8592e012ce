"""Every setting of every experiment as text, so that a default that moves is seen in review.

After a change that is meant: GOLDEN=write ./launch/test.sh tests/experiments
"""

import json
import os
from pathlib import Path

import pytest

from llama4_jax.app import load_experiment
from llama4_jax.training.work_directory import flatten_experiment

EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.py"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_settings_are_those_of_the_golden_file(path):
    settings = flatten_experiment(load_experiment(str(path), {}))
    text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
    golden = Path(__file__).parent / "golden" / f"{path.stem}.txt"
    if os.environ.get("GOLDEN") == "write":
        golden.write_text(text)
    assert golden.is_file(), f"no {golden.name}: write it with GOLDEN=write"
    assert text == golden.read_text()
