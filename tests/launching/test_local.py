"""Processes on this machine start together, end together, tell what happened by one status, and leave nothing behind."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama4_jax import exit_codes
from llama4_jax.errors import UserError
from llama4_jax.launching import local
from llama4_jax.launching.local import LocalJob

FAKE = """
import os, signal, subprocess, sys, time
index, folder = int(os.environ["LLAMA4_PROCESS_ID"]), sys.argv[1]
attempt = len([name for name in os.listdir(folder) if name.startswith(f"{index}.started")])
open(f"{folder}/{index}.started.{attempt}.{os.getpid()}", "w").close()
def end_by(signals, status):
    for number in signals:
        signal.signal(number, lambda *_: sys.exit(status))
def have_child():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(f"{folder}/{index}.child.{child.pid}", "w").close()
def wait_for(name, other):
    while not any(file.startswith(f"{other}.{name}") for file in os.listdir(folder)):
        time.sleep(0.02)
"""


def job(**fields) -> LocalJob:
    return LocalJob(**{"config": "c.py", "workdir": "w", "processes": 2, "devices_per_process": 1, "grace_seconds": 5} | fields)


def program(folder: Path, body: str) -> tuple[str, ...]:
    return (sys.executable, "-c", FAKE + body, str(folder))


def starter(folder: Path, body: str, **fields) -> subprocess.Popen:
    """`local.run` in a process of its own, which can be signalled; it is up when every process is."""
    code = f"import sys; from llama4_jax.launching import local; sys.exit(local.run(local.{job(**fields)!r}, {program(folder, body)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(list(folder.glob("*.ready"))) == 2)
    return process


def wait_until(happens, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(folder: Path) -> list[str]:
    """What the processes started or are, and still runs."""
    return [file.name for file in folder.iterdir() if file.suffix[1:].isdigit() and is_alive(int(file.suffix[1:]))]


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


READY = "\nopen(f'{folder}/{index}.ready', 'w').close()\n"
STATUSES = {
    "all done": ("", 0),
    "failed for good": ("sys.exit([0, 2][index])", 2),
    "failed for good, after another crashed": (
        "end_by([15], 2) if index else wait_for('started', 1) or time.sleep(0.3) or sys.exit(1)\ntime.sleep(9)",
        2,
    ),
    "preempted": ("sys.exit(42)", 42),
    "preempted, one slower": ("time.sleep(0.3 * index); sys.exit(42)", 42),
    "done, one slower": ("time.sleep(0.3 * index)", 0),
    "crashed": ("sys.exit([7, 0][index])", 7),
    "crashed, and the other saved when asked": (
        "index or (wait_for('ready', 1), sys.exit(9))\nend_by([15], 42)" + READY + "time.sleep(9)",
        9,
    ),
    "ended by a signal": ("index and os.kill(os.getpid(), signal.SIGSEGV)", 128 + signal.SIGSEGV),
}


@pytest.mark.parametrize("body, status", STATUSES.values(), ids=STATUSES)
def test_one_status_for_all(tmp_path, body, status):
    assert local.run(job(), program(tmp_path, body)) == status
    assert alive(tmp_path) == []


def test_every_process_is_told_who_it_is(tmp_path, capfdbinary):
    body = "print(*(os.environ[name] for name in sorted(os.environ) if name.startswith('LLAMA4_')))"
    assert local.run(job(processes=3, devices_per_process=4), program(tmp_path, body)) == 0
    lines = sorted(capfdbinary.readouterr().out.decode().splitlines())
    (port,) = {line.split(":")[1].split()[0] for line in lines}
    assert lines == [f"[{index}] 127.0.0.1:{port} 4 3 {index}" for index in range(3)]


def test_output_stays_in_whole_lines(tmp_path, capfdbinary):
    body = "for i in range(300): sys.stdout.write('x' * 50); sys.stdout.flush(); sys.stdout.write('y' * 50 + chr(10))\nsys.stdout.write('no end')"
    assert local.run(job(), program(tmp_path, body)) == 0
    lines = capfdbinary.readouterr().out.decode().splitlines()
    expected = ["x" * 50 + "y" * 50] * 300 + ["no end"]
    assert [[line[4:] for line in lines if line.startswith(f"[{index}] ")] for index in range(2)] == [expected, expected]
    assert len(lines) == 602


def test_a_failure_ends_the_others_and_what_they_started(tmp_path):
    body = "have_child()\nif index: end_by([15], 42); time.sleep(60)\nwait_for('child', 1); sys.exit(1)"
    started = time.monotonic()
    assert local.run(job(), program(tmp_path, body)) == 1
    assert time.monotonic() - started < 4
    wait_until(lambda: alive(tmp_path) == [], seconds=1)


def test_one_that_ignores_sigterm_is_killed_after_the_grace(tmp_path):
    body = "if index: signal.signal(15, signal.SIG_IGN); have_child(); time.sleep(60)\nwait_for('child', 1); sys.exit(1)"
    started = time.monotonic()
    assert local.run(job(grace_seconds=1), program(tmp_path, body)) == 1
    assert 1 < time.monotonic() - started < 5
    wait_until(lambda: alive(tmp_path) == [], seconds=1)


def test_restarts_follow_failures_alone(tmp_path):
    fails_twice = "sys.exit(3 if attempt < 2 else 0)"
    for restarts, status, attempts in [(2, 0, 3), (1, 3, 2)]:
        folder = tmp_path / str(restarts)
        folder.mkdir()
        assert local.run(job(processes=1, max_restarts=restarts), program(folder, fails_twice)) == status
        assert len(list(folder.glob("0.started.*"))) == attempts
    for status in (exit_codes.DONE, exit_codes.FAILED, exit_codes.PREEMPTED):
        folder = tmp_path / f"status {status}"
        folder.mkdir()
        assert local.run(job(processes=1, max_restarts=5), program(folder, f"sys.exit({status})")) == status
        assert len(list(folder.glob("0.started.*"))) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_every_process_once_as_sigterm(tmp_path, number):
    body = "got = []\nsignal.signal(2, lambda *_: got.append(2))\nsignal.signal(15, lambda *_: got.append(15))" + READY
    body += "while not got: time.sleep(0.02)\ntime.sleep(0.3); print(got, flush=True); sys.exit(42 if got == [15] else 1)"
    process = starter(tmp_path, body, max_restarts=3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 42 and sorted(output.splitlines()) == ["[0] [15]", "[1] [15]"]


def test_a_second_signal_ends_all_at_once(tmp_path):
    process = starter(tmp_path, "have_child()\nsignal.signal(15, signal.SIG_IGN)" + READY + "time.sleep(60)", grace_seconds=50)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGKILL
    wait_until(lambda: alive(tmp_path) == [], seconds=1)
    assert "process 1 has not ended and is killed" in said


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends a process with its parent")
def test_processes_do_not_outlive_a_starter_that_was_killed(tmp_path):
    process = starter(tmp_path, READY + "time.sleep(60)")
    process.kill()
    process.communicate()
    wait_until(lambda: alive(tmp_path) == [], seconds=5)


def test_what_cannot_be_is_one_line():
    for fields, message in [
        ({"processes": 0}, "--processes=0 must be at least 1"),
        ({"devices_per_process": 0}, "--processes=2 need --devices_per_process=N: virtual CPU devices for each of them"),
        ({"max_restarts": -1}, "--max_restarts=-1 must be at least 0"),
        ({"workdir": "gs://bucket/run"}, "--workdir=gs://bucket/run: runs are written to a file system; mount the bucket"),
    ]:
        with pytest.raises(UserError) as error:
            job(**fields)
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
