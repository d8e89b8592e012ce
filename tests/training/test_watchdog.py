"""A process that stands still ends, and says where; one that is only slow does not."""

import signal
import statistics
import subprocess
import sys
import time

import hypothesis.strategies as st
import pytest
from hypothesis import given

from llama4_jax import exit_codes
from llama4_jax.config import WatchConfig
from llama4_jax.training.recorder import read_events
from llama4_jax.training.watchdog import step_limit

SCRIPT = """
import sys, time
from pathlib import Path
from llama4_jax.config import WatchConfig
from llama4_jax.training import watchdog
from llama4_jax.training.recorder import FlightRecorder

watchdog._POLL_SECONDS, watchdog._TELL_SECONDS, watchdog._LOCK_MARGIN_SECONDS = 0.1, 1, 2
folder = Path(sys.argv[1])
recorder = FlightRecorder(folder)
recorder.record("start")

def a_read_that_never_returns():
    time.sleep(60)

def hold_the_lock():
    sum(range(10**12))  # never lets another thread run

config = WatchConfig(step_seconds=1, compile_seconds=1)
with watchdog.Watchdog(config, folder, recorder) as dog:
    print("begin", flush=True)
    {body}
time.sleep(2)  # with the dog gone nobody minds
print("done")
"""


def start(folder, body):
    script = SCRIPT.replace("{body}", body)
    command = [sys.executable, "-c", script, folder]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_stuck_process_ends_for_another_try_and_says_where_it_stood(tmp_path):
    process = start(tmp_path, "dog.expect_step(6); dog.expect_step(7); a_read_that_never_returns()")
    _, said = process.communicate(timeout=60)
    assert process.returncode == exit_codes.RETRY
    line = "process 0 of 1 has stood still in step 7 for 1 s and ends with status 1, for another try"
    assert line in said and "a_read_that_never_returns" in said
    stacks = (tmp_path / "stacks-0.txt").read_text()
    assert line in stacks and "a_read_that_never_returns" in stacks
    assert [(event["event"], event.get("what")) for event in read_events(tmp_path)] == [("start", None), ("fault", line)]


def test_a_disk_that_hangs_does_not_keep_it_alive(tmp_path):
    """Telling takes for ever as well."""
    body = "recorder.record_here = lambda *a, **k: time.sleep(60); dog.expect('save', 1); a_read_that_never_returns()"
    process = start(tmp_path, body)
    _, said = process.communicate(timeout=60)
    assert process.returncode == exit_codes.RETRY and "stood still in save" in said


def test_a_thread_that_keeps_python_to_itself_is_ended_too(tmp_path):
    process = start(tmp_path, "dog.expect_step(7); time.sleep(0.5); hold_the_lock()")
    _, said = process.communicate(timeout=60)
    assert process.returncode == exit_codes.RETRY and "hold_the_lock" in said


def test_what_is_slow_within_its_limit_goes_on(tmp_path):
    """Phases one after another that take longer in all than any may; and nothing is watched before the first or after the last."""
    body = "time.sleep(1.5)\n    for i in range(4): dog.expect(f'phase {i}', 2); time.sleep(1)"
    process = start(tmp_path, body)
    out, said = process.communicate(timeout=60)
    assert process.returncode == 0 and out.endswith("done\n"), said


def test_a_process_that_was_stopped_for_long_is_given_its_time_again(tmp_path):
    """Ctrl-Z, or a machine that slept."""
    process = start(tmp_path, "dog.expect('save', 1.5); time.sleep(0.5)\n    for _ in range(50): time.sleep(0.01)")
    assert process.stdout.readline() == "begin\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    process.send_signal(signal.SIGCONT)
    out, said = process.communicate(timeout=60)
    assert process.returncode == 0 and out.endswith("done\n"), said


@given(st.lists(st.floats(0.001, 1e4), max_size=64), st.floats(1, 1e4), st.floats(1, 100))
def test_the_limit_of_a_step_is_never_below_its_floor_and_grows_with_the_median(seconds, floor, factor):
    config = WatchConfig(step_seconds=floor, step_factor=factor, compile_seconds=7)
    limit = step_limit(seconds, config)
    assert limit >= floor
    if not seconds:
        assert limit == max(floor, 7), "how long a step takes is not known yet"
    else:
        assert limit == max(floor, factor * statistics.median(seconds))


def test_a_limit_may_be_infinite(tmp_path):
    process = start(tmp_path, "dog.expect('save', float('inf')); time.sleep(1)")
    out, said = process.communicate(timeout=60)
    assert process.returncode == 0 and out.endswith("done\n"), said


@pytest.mark.parametrize("name", ["step_seconds", "compile_seconds", "replicas_every"])
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match=f"WatchConfig.{name} must be positive, got 0"):
        WatchConfig(**{name: 0})
