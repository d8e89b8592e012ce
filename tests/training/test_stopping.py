"""A signal to any process, at any moment, stops all before one step; before the first, at once."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llama4_jax import exit_codes
from llama4_jax.training.recorder import read_events
from llama4_jax.training.stopping import StopRequest, leaving

FIXTURE = Path(__file__).parents[1] / "fixtures/tiny_experiment.py"


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_a_signal_stops_before_the_next_step_and_handlers_come_back():
    before = handlers()
    with StopRequest() as stop:
        assert not stop.reached(1) and not stop.reached(2)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # clusters do so
        assert stop.reached(3) and stop.reached(4) and stop.name == "SIGTERM"
    assert handlers() == before


def test_a_second_ctrl_c_acts_as_if_nothing_had_caught_it():
    with StopRequest() as stop:
        assert not stop.reached(1)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert stop.name is None, "nobody asked"


@pytest.mark.parametrize("leave", [True, False])
def test_before_the_first_step_there_is_nothing_to_wait_for(leave):
    left = []
    with StopRequest(left.append if leave else None) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reached(7) and stop.name == "SIGTERM"
    assert left == ["SIGTERM"] * leave


def test_after_the_first_step_nobody_leaves():
    left = []
    with StopRequest(left.append) as stop:
        assert not stop.reached(7)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reached(8)
    assert left == []


def test_a_stop_request_has_the_signals_to_itself_and_gives_them_back():
    before, left = handlers(), []
    with leaving(left.append):
        with StopRequest() as stop:
            assert not stop.reached(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.reached(2) and left == []
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 10
        while not left:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert left == ["SIGINT"] and handlers() == before


def test_outside_of_the_main_thread_there_are_no_handlers_and_no_stop():
    answers, before = [], handlers()

    def run():
        with StopRequest() as stop:
            answers.append((stop.reached(1), handlers() == before))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert answers == [(False, True)]


TOGETHER = """
import os, random, signal, sys, time
from llama4_jax.parallel import processes
from llama4_jax.training.stopping import StopRequest

job = processes.start()
for number in range(30):
    plan, own = random.Random(number), random.Random(f"{number} {job.index}")
    by, at, times = plan.choice([(0,), (1,), (0, 1), ()]), plan.randint(1, 40), plan.randint(1, 3)
    with StopRequest() as stop:
        step = 0
        while step < 40 and not stop.reached(step + 1):
            step += 1
            if job.index in by and step == at:
                for _ in range(times):
                    os.kill(os.getpid(), plan.choice([signal.SIGTERM, signal.SIGINT]) if times == 1 else signal.SIGTERM)
            time.sleep(own.choice([0, 0.001, 0.01]))
    assert step == 40 or stop.name in ("SIGTERM", "SIGINT")
    assert by or step == 40, "nobody asked"
    assert not by or at <= step, "somebody asked"
    print(number, step, stop.name, flush=True)
"""


def test_two_processes_agree_on_the_step_whoever_is_signalled_and_however_often(start_job):
    """Thirty runs, of processes that drift apart."""
    job = start_job(2, "-c", TOGETHER, devices=1)
    assert [process.ended(60) for process in job] == [0, 0], [process.output()[-2000:] for process in job]
    one, two = ([line for line in process.output().splitlines() if line[0].isdigit()] for process in job)
    assert one == two and len(one) == 30
    assert len({line.split()[1] for line in one}) > 10, "stopped at many steps"


JOINING = """
import sys
import jax
from llama4_jax import app
from llama4_jax.train import main

initialize = jax.distributed.initialize

def join(*arguments, **options):
    print("joining", file=sys.stderr, flush=True)
    initialize(*arguments, **options)

jax.distributed.initialize = join
app.run(main)
"""


@pytest.mark.parametrize("index, number", [(0, signal.SIGTERM), (1, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_signal_ends_a_process_that_waits_for_one_that_never_comes(start_job, monkeypatch, tmp_path, index, number):
    """Its main thread is in jax's C++, where no handler of Python's runs; the limit of that wait is 300 s."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("LLAMA4_COORDINATOR", f"127.0.0.1:{probe.getsockname()[1]}")
    monkeypatch.setenv("LLAMA4_PROCESS_COUNT", "2")
    monkeypatch.setenv("LLAMA4_PROCESS_ID", str(index))
    (lone,) = start_job(1, "-c", JOINING, f"--config={FIXTURE}", f"--workdir={tmp_path}", devices=1)
    deadline = time.monotonic() + 60
    while "joining" not in lone.output():
        assert time.monotonic() < deadline and lone.process.poll() is None, lone.output()
        time.sleep(0.05)
    time.sleep(1)  # until it waits
    lone.process.send_signal(number)
    assert lone.ended(10) == exit_codes.PREEMPTED, lone.output()
    name = signal.Signals(number).name
    assert f"{name}: stopped outside of the training loop, with nothing to save; run again to go on" in lone.output()


IN_A_COMPILATION = """
import sys, time
from llama4_jax import app
from llama4_jax.train import main
from llama4_jax.training.trainer import Trainer

def compile(*_):
    print("compiling", file=sys.stderr, flush=True)
    time.sleep(100)

Trainer.compile = compile
app.run(main)
"""


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_long_compilation_ends_all_at_once_with_their_status(start_job, tmp_path, count, number):
    """The last one is signalled. There is nothing to save, and the next start begins where this one did."""
    arguments = [f"--config={FIXTURE}", f"--workdir={tmp_path}", "--config.data.batch_size=8"]
    job = start_job(count, "-c", IN_A_COMPILATION, *arguments, devices=1)
    deadline = time.monotonic() + 120
    while not all("compiling" in process.output() for process in job):
        assert time.monotonic() < deadline, [process.output()[-2000:] for process in job]
        time.sleep(0.05)
    job[-1].process.send_signal(number)
    assert [process.ended(10) for process in job] == [exit_codes.PREEMPTED] * count, [p.output()[-2000:] for p in job]
    assert "stopped before the first step, with nothing to save; run again to go on" in job[0].output()
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "restore", "compile", "stop"]


def test_the_default_of_python_is_back_after_a_run_that_failed():
    script = "import signal; from llama4_jax.training.stopping import StopRequest\ntry:\n  with StopRequest(): 1 / 0\nexcept ZeroDivisionError: pass\nsignal.raise_signal(signal.SIGTERM)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == -signal.SIGTERM
