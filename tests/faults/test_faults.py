"""The short form of the fault suite: real runs, broken, end with the bits of an unbroken one. The long form: python -m tests.faults."""

import pytest

from tests.faults.harness import SLOWLY, Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("faults") / "bench")
    yield bench
    bench.close()


def test_a_run_that_is_killed_goes_on_to_the_same_bits(bench):
    run = bench.run("killed")
    job = run.start([SLOWLY])
    assert job.wait_until(lambda: run.step() >= 10)
    job.kill()
    job.ended()
    run.finish()
    assert run.lost and run.lost[0] <= 8
    assert run.compare().wrong == []
