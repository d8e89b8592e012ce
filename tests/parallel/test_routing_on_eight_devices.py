"""Who is dropped, what noise a token gets and how the bias moves do not depend on the mesh."""

from pathlib import Path

import pytest

from tests.parallel.on_eight_devices import run

SCRIPT = Path(__file__).with_name("routing_on_eight_devices.py")
CASES = ("expert", "context_expert_tensor_zigzag", "data_fsdp")  # the second lays tokens in another order than the row's


@pytest.mark.slow
def test_bias_capacity_and_jitter_give_the_numbers_of_one_device():
    records = run(SCRIPT, *CASES, timeout=600)
    assert [record["case"] for record in records] == list(CASES)
    for record in records:
        assert record["error"] < 1e-5 and 0.1 < record["dropped"][0] < 0.9, record
