"""The short form of the fault suite: real runs, broken, end with the bits of unbroken ones. The long: python -m tests.faults"""

import numpy as np
import pytest

from llama4_jax.checkpoints import manifest
from tests.faults import anomalies, damage, data, disks, kills, peers
from tests.faults.harness import Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("faults") / "bench")
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def killed(bench):
    """Rows of a run that was killed three times, and the unbroken one beside it."""
    rows = list(kills.at_moments(bench, ["before the manifest", "an old one renamed, not deleted", "verifying"]))
    return rows, bench.unbroken(bench.runs[-1])


def assert_right(rows, count):
    rows = list(rows)
    assert len(rows) == count and all(row.right for row in rows), [row for row in rows if not row.right]


def test_kill_9_in_a_step_in_a_save_and_in_a_deletion(killed):
    assert_right(killed[0], 3)


def test_no_flipped_bit_of_a_checkpoint_comes_back_as_a_number(bench, killed):
    assert_right(damage.flips(bench, killed[1], 0, count=40), 40)


def test_without_verification_the_flips_are_reported_as_wrong_results(bench, killed, monkeypatch):
    """So the suite can fail."""
    monkeypatch.setattr(manifest, "require_whole", lambda *_, **__: None)
    rows = list(damage.flips(bench, killed[1], 0, count=40, among="state/**/d/*"))
    assert any(row.wrong for row in rows)  # of 40 some 4 to 15, by which files they hit


def test_no_flipped_bit_of_a_shard_becomes_another_token(bench):
    assert_right(data.shards(bench, 0, count=40), 40)


def test_other_parameters_than_those_of_one_process_are_reported():
    """Those that differ by the order of sums are not."""
    its = {"['params/a']": np.linspace(1, 2, 50, dtype=np.float32), "['opt_state/a']": np.ones(3)}
    assert not data.other_parameters(its | {"['params/a']": its["['params/a']"] * np.float32(1 + 1e-5)}, its)
    for factor in (1.002, np.nan):
        (line,) = data.other_parameters(its | {"['params/a']": its["['params/a']"] * factor}, its)
        assert "params/a" in line


@pytest.mark.slow
def test_kill_9_at_random_moments_of_one_process_and_of_either_of_two(bench):
    assert_right(kills.at_random(bench, 3, kills=3), 3)
    assert_right(kills.at_random(bench, 4, kills=2, processes=2), 2)


@pytest.mark.slow
def test_damaged_checkpoints_and_strays(bench):
    assert_right(damage.of_runs(bench, ["a bit of its largest file flipped", "its manifest deleted", "a half-copied 902"]), 3)
    assert_right(damage.of_all(bench), 2)


@pytest.mark.slow
def test_a_full_disk_stops_with_a_line_and_the_run_goes_on_when_there_is_room(bench):
    assert_right(disks.full_for_real(bench), 2)


@pytest.mark.slow
def test_bad_records_and_changed_settings(bench):
    assert_right(data.poisoned(bench), 2)


@pytest.mark.slow
def test_other_processes_and_meshes_go_on_with_the_same_batches(bench):
    assert_right(data.places(bench, data.PLACES[:4]), 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind, victim", [("stuck", 1), ("raising", 0)])
def test_a_process_that_sticks_or_raises_ends_the_job_in_time(bench, kind, victim):
    assert_right([peers.broken(bench, kind, victim)], 1)


@pytest.mark.slow
def test_a_signal_to_one_of_two_loses_no_step(bench):
    assert_right(peers.signalled(bench, ["in a step", "in a save, written behind"], processes=2, victim=1), 2)


@pytest.mark.slow
def test_bad_batches_of_one_process_take_both_back_alike(bench):
    assert_right([anomalies.poisoned(bench, "nan", processes=2, batches=anomalies.IN_A_ROW)], 1)


@pytest.mark.slow
def test_a_copy_that_differs_is_not_saved(bench):
    assert_right([anomalies.flipped_copy(bench)], 1)
