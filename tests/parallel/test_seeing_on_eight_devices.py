"""Images and generated text do not depend on the mesh."""

from pathlib import Path

import pytest

from tests.parallel.on_eight_devices import run

SCRIPT = Path(__file__).with_name("seeing_on_eight_devices.py")
CASES = ("fsdp_context_expert", "data_expert_tensor", "context_expert_tensor_zigzag")


@pytest.mark.slow
def test_images_and_generated_text_are_those_of_one_device():
    records = run(SCRIPT, *CASES, timeout=600)
    assert [record["case"] for record in records] == list(CASES)
    for record in records:
        assert record["error"] < 1e-5 and record["same_text"], record
