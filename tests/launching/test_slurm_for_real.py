"""sbatch files before a real SLURM, of two nodes on one machine; skipped where Debian's slurm-wlm and munge are not installed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama4_jax.launching.slurm import SlurmJob, submission
from tests.launching import one_host_slurm

REPOSITORY = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(one_host_slurm.missing()), reason=f"not installed: {', '.join(one_host_slurm.missing())}"),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with one_host_slurm.running(tmp_path_factory.mktemp("slurm")) as environment:
        yield Cluster(environment)


class Cluster:
    def __init__(self, environment):
        self.environment = environment

    def ask(self, *command: str, document: str | None = None) -> str:
        ran = subprocess.run(
            command, input=document, env=self.environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=60
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    def submit(self, job: SlurmJob) -> str:
        Path(job.workdir).mkdir(exist_ok=True)
        made = submission(job)
        return self.ask(*made.command, document=made.document)

    def state(self, number: str) -> dict[str, str]:
        words = self.ask("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *states: str, seconds: float = 60) -> dict[str, str]:
        """Until the job is in one of the states. The next turn of a requeued job, two minutes later, is asked for at once."""
        deadline = time.monotonic() + seconds
        while (state := self.state(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"{state['JobState']} ({state['Reason']}) after {seconds} s"
            if state["JobState"] == "PENDING" and state["Reason"] == "BeginTime":
                time.sleep(3)  # slurmd still clears up after the last turn; it would clear the next one's script as well
                self.ask("scontrol", "update", f"JobId={number}", "StartTime=now")
            time.sleep(0.3)
        return state


def fake_python(folder: Path, body: str) -> str:
    """An interpreter that runs `body` in place of the trainer; $turn counts from 0 and $task is the process."""
    script = folder / "python"
    script.write_text(f"#!/bin/bash\nturn=${{SLURM_RESTART_COUNT:-0}} task=$SLURM_PROCID\necho task $task turn $turn\n{body}\n")
    script.chmod(0o755)
    return str(script)


def job(folder: Path, body: str, **fields) -> SlurmJob:
    values = {"config": "c.py", "workdir": str(folder / "run"), "nodes": 2, "grace_seconds": 10} | fields
    return SlurmJob(python=fake_python(folder, body), **values)


def printed(folder: Path) -> str:
    return "".join(path.read_text() for path in (folder / "run").glob("slurm-*.txt"))


ENDS = {
    "done": ("exit 0", "COMPLETED", "0:0", 0),
    "failed for good": ("exit 2", "FAILED", "2:0", 0),
    "one task failed for good": ("[ $task = 0 ] && exit 2; sleep 2", "FAILED", "2:0", 0),
    "preempted once": ("[ $turn = 0 ] && exit 42 || exit 0", "COMPLETED", "0:0", 1),
    "one task is slower to save": ("[ $turn = 1 ] && exit; [ $task = 1 ] && sleep 2; exit 42", "COMPLETED", "0:0", 1),
    "crashed once": ("[ $turn = 0 ] && exit 1; exit 0", "COMPLETED", "0:0", 1),
    "killed once": ("[ $turn = 0 ] && [ $task = 1 ] && kill -KILL $$; exit 0", "COMPLETED", "0:0", 1),
    "preempted twice, which does not count": ("[ $turn -lt 2 ] && exit 42; exit 0", "COMPLETED", "0:0", 2),
    "always crashes": ("exit 7", "FAILED", "7:0", 1),
}


@pytest.mark.parametrize("body, state, code, restarts", ENDS.values(), ids=ENDS)
def test_an_exit_status_has_its_meaning(slurm, tmp_path, body, state, code, restarts):
    number = slurm.submit(job(tmp_path, body, max_restarts=1))
    ended = slurm.wait(number, "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == (state, code, str(restarts)), printed(tmp_path)


def test_a_stuck_process_is_ended_when_another_failed(slurm, tmp_path):
    number = slurm.submit(
        job(tmp_path, "[ $task = 0 ] && exit 3; trap '' TERM; sleep 50; sleep 50", max_restarts=0, grace_seconds=2)
    )
    started = time.monotonic()
    ended = slurm.wait(number, "FAILED", seconds=50)
    assert time.monotonic() - started < 45 and ended["Restarts"] == "0"


WAITS_FOR_TERM = "[ $turn = 1 ] && exit 0; trap 'echo task $task got TERM; exit 42' TERM; while true; do sleep 0.1; done"


@pytest.mark.parametrize("command", ["scancel --signal=TERM", "scontrol requeue", "time limit"])
def test_sigterm_reaches_every_process_and_the_job_takes_another_turn(slurm, tmp_path, command):
    limit = {"time": "00:01:00", "grace_seconds": 55} if command == "time limit" else {}
    number = slurm.submit(job(tmp_path, WAITS_FOR_TERM, **limit))
    slurm.wait(number, "RUNNING")
    while printed(tmp_path).count("turn 0") < 2:
        time.sleep(0.1)
    time.sleep(0.5)  # for the traps
    if command != "time limit":
        slurm.ask(*command.split(), number)
    ended = slurm.wait(number, "COMPLETED", "FAILED", "TIMEOUT", seconds=100)
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == "1"
    assert {line for line in printed(tmp_path).splitlines() if "TERM" in line} == {"task 0 got TERM", "task 1 got TERM"}


def test_training_saves_when_asked_and_its_next_turn_finishes(slurm, tmp_path):
    """The trainer itself, a process and a device on each of two nodes: SIGTERM, status 42, another turn, every step once."""
    steps = 150
    number = slurm.submit(
        SlurmJob(
            config="tests/fixtures/tiny_experiment.py",
            workdir=str(tmp_path / "my run"),
            overrides=(f"--config.steps={steps}", "--config.log_every=1", "--config.evaluations.heldout.every=1000"),
            nodes=2,
            grace_seconds=60,
            python=sys.executable,
        )
    )
    metrics = tmp_path / "my run" / "metrics.jsonl"
    deadline = time.monotonic() + 150
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        assert time.monotonic() < deadline and slurm.state(number)["JobState"] in ("PENDING", "RUNNING")
        time.sleep(0.3)
    slurm.ask("scancel", "--signal=TERM", number)
    slurm.wait(number, "PENDING", seconds=90)
    stopped = len(metrics.read_text().splitlines())
    assert slurm.wait(number, "COMPLETED", "FAILED", seconds=200)["JobState"] == "COMPLETED"
    log = "".join(path.read_text() for path in (tmp_path / "my run").glob("slurm-*.txt"))
    assert log.count("ended with status 42; asking for another turn") == 1 and slurm.state(number)["Restarts"] == "1"
    trained = [record["step"] for line in metrics.read_text().splitlines() if "loss" in (record := json.loads(line))]
    assert trained == list(range(1, steps + 1)) and stopped < steps
