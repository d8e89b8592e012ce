"""The flight recorder: every event once, in order, whatever became of the line before."""

import json
import os
import signal
import subprocess
import sys

import pytest

from llama4_jax.training import recorder
from llama4_jax.training.recorder import FlightRecorder, read_events


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes only when it is told to."""
    now = [1000.0]
    monkeypatch.setattr(recorder.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(recorder.time, "time", lambda: now[0] + 5e8)
    return now


def names_and_steps(folder):
    return [(event["event"], event.get("step")) for event in read_events(folder)]


def test_steps_are_one_line_for_many_and_carry_the_time_of_the_last(tmp_path, clock):
    flight = FlightRecorder(tmp_path)
    flight.record("start")
    for step in range(1, 101):
        clock[0] += 1
        flight.step(step, skipped=step in (7, 8))
    clock[0] += 500  # a long evaluation is announced late
    flight.record("evaluate", step=100)
    flight.close()
    assert names_and_steps(tmp_path) == [
        ("start", None),
        ("step", 30),
        ("step", 60),
        ("step", 90),
        ("step", 100),
        ("evaluate", 100),
    ]
    events = read_events(tmp_path)
    assert [event["monotonic"] for event in events] == [1000, 1030, 1060, 1090, 1100, 1600]
    assert [event.get("skipped") for event in events] == [None, 2, None, None, None, None]


def test_a_day_of_short_steps_is_a_small_file(tmp_path, clock):
    flight = FlightRecorder(tmp_path)
    flight.record("start")
    for step in range(20_000):
        clock[0] += 86_400 / 20_000
        flight.step(step)
    flight.close()
    assert (tmp_path / "events.jsonl").stat().st_size < 450_000


@pytest.mark.parametrize("tail", [b'{"event": "st', b'{"event": "st\xff\n', b"[1]\n", b"\n\n"])
def test_a_line_that_was_cut_short_costs_only_itself(tmp_path, tail):
    FlightRecorder(tmp_path).record("start", why="first")
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(tail)
    FlightRecorder(tmp_path).record("start", why="second")
    assert [event["why"] for event in read_events(tmp_path)] == ["first", "second"]


KILLED = """
import os, signal, sys
from pathlib import Path
from llama4_jax.training.recorder import FlightRecorder
flight = FlightRecorder(Path(sys.argv[1]))
flight.record("start")
for step in range(1000):
    flight.record("save", step=step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_loses_no_line(tmp_path):
    dead = subprocess.run([sys.executable, "-c", KILLED, tmp_path], timeout=60)
    assert dead.returncode == -signal.SIGKILL
    assert [event["step"] for event in read_events(tmp_path)[1:]] == list(range(1000))


def test_a_disk_that_refuses_is_told_once_and_stops_nothing(tmp_path, caplog):
    flight = FlightRecorder(tmp_path / "nowhere")
    for _ in range(3):
        flight.record("start")
    flight.step(3)
    flight.close()
    assert len(caplog.records) == 1 and "cannot write" in caplog.text and "training goes on" in caplog.text


def test_nothing_is_written_before_the_start(tmp_path):
    """A finished run that is started again is left alone."""
    flight = FlightRecorder(tmp_path)
    flight.record("stop")
    flight.record_here("fault")
    flight.close()
    assert not os.listdir(tmp_path)


def test_an_exception_is_recorded_on_its_way(tmp_path):
    flight = FlightRecorder(tmp_path)
    flight.record("start", age=100.0)
    with pytest.raises(ValueError), flight.faults():
        raise ValueError("two\nlines")
    start, fault = read_events(tmp_path)
    assert fault["what"] == "ValueError: two lines"
    assert 99.5 < fault["monotonic"] - start["monotonic"] < 110 and 99.5 < fault["time"] - start["time"] < 110


def test_another_process_writes_only_what_is_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder.jax, "process_index", lambda: 3)
    flight = FlightRecorder(tmp_path)
    flight.record("start")
    flight.step(1)
    assert not os.listdir(tmp_path)
    flight.record_here("fault", what="stuck")
    (event,) = recorder.read_events_of_others(tmp_path)
    assert (event["process"], event["what"]) == (3, "stuck") and json.dumps(event)
