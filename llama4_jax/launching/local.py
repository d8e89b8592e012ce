"""Processes on this machine: started together, ended together, and none left behind.

Each runs in a session of its own, so that a Ctrl-C reaches this starter alone, which passes it on once, and so that what a
process started itself (data workers) ends with it.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from llama4_jax import exit_codes
from llama4_jax.errors import UserError
from llama4_jax.launching.job import Job, require_at_least

_POLL_SECONDS = 0.05
_FINAL = (exit_codes.DONE, exit_codes.FAILED, exit_codes.PREEMPTED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalJob(Job):
    """Attributes:
    processes: of one job.
    devices_per_process: virtual CPU devices; 0: whatever JAX finds, for a single process.
    max_restarts: after failures that are worth another try.
    grace_seconds: from SIGTERM to SIGKILL.
    """

    processes: int = 1
    devices_per_process: int = 0
    max_restarts: int = 0
    grace_seconds: int = 60

    def __post_init__(self):
        super().__post_init__()
        require_at_least(1, self, "processes", "grace_seconds")
        require_at_least(0, self, "devices_per_process", "max_restarts")
        if self.processes > 1 and self.devices_per_process == 0:
            raise UserError(f"--processes={self.processes} need --devices_per_process=N: virtual CPU devices for each of them")

    @property
    def devices(self) -> int | None:
        return self.processes * self.devices_per_process or None


def environments(job: LocalJob, port: int | str) -> list[dict[str, str]]:
    """What each process is told, beside the environment that it inherits."""
    told = [
        {
            "LLAMA4_COORDINATOR": f"127.0.0.1:{port}",
            "LLAMA4_PROCESS_COUNT": str(job.processes),
            "LLAMA4_PROCESS_ID": str(index),
        }
        for index in range(job.processes)
    ]
    if job.devices_per_process:
        for environment in told:
            environment["LLAMA4_LOCAL_DEVICES"] = str(job.devices_per_process)
    return told


def run(job: LocalJob, command: Sequence[str]) -> int:
    """Runs `command` in every process, again after a failure while restarts are left, and returns the job's exit status."""
    with _Signals() as signals:
        for restart in itertools.count(1):
            status = _run_once(job, command, signals)
            if status in _FINAL or signals.count or restart > job.max_restarts:
                return status
            _say(f"starting again ({restart} of {job.max_restarts})")


def _run_once(job: LocalJob, command: Sequence[str], signals: "_Signals") -> int:
    processes = []
    try:
        for index, told in enumerate(environments(job, _free_port())):
            processes.append(_Process(command, told, f"[{index}] " if job.processes > 1 else None))
        return _wait(processes, job.grace_seconds, signals)
    finally:
        for process in processes:
            process.kill()


def _wait(processes: "list[_Process]", grace: float, signals: "_Signals") -> int:
    """The job's status, when all have ended: FAILED if any says so, else that of the first that did not end well.

    SIGTERM goes to the others at once when one fails, and after `grace` seconds when one was preempted; SIGKILL `grace`
    seconds after that, or at the second signal to this starter.
    """
    running = dict(enumerate(processes))
    statuses = []
    terminate_at = kill_at = math.inf
    for process in processes:
        process.print_output()
    while running:
        time.sleep(_POLL_SECONDS)
        now = time.monotonic()
        for index, process in list(running.items()):
            if (status := process.status()) is None:
                continue
            del running[index]
            statuses.append(status)
            if status == exit_codes.PREEMPTED:
                terminate_at = min(terminate_at, now + grace)
            elif status != exit_codes.DONE:
                terminate_at = now
                _say(f"process {index} ended with status {status}")
        if signals.count:
            terminate_at = min(terminate_at, now)
        if now >= terminate_at and kill_at == math.inf:
            kill_at = now + grace
            for process in running.values():
                process.terminate()
        if now >= kill_at or signals.count > 1:
            for index, process in running.items():
                _say(f"process {index} has not ended and is killed")
                statuses.append(process.kill())
            break
    if exit_codes.FAILED in statuses:
        return exit_codes.FAILED
    return next((status for status in statuses if status != exit_codes.DONE), exit_codes.DONE)


class _Process:
    """One process with its session."""

    def __init__(self, command: Sequence[str], told: dict[str, str], prefix: str | None):
        """`prefix` goes before each line that it prints; None: it writes to this starter's output itself."""
        output = {} if prefix is None else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self._prefix = prefix
        self._process = subprocess.Popen(
            command,
            env=os.environ | told,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with_parent,
            **output,
        )
        self._printer = threading.Thread(target=self._copy_lines, daemon=True)

    def print_output(self) -> None:
        """Begins to print. (Apart from the start, since a process had better not fork while it has threads.)"""
        if self._prefix is not None:
            self._printer.start()

    def status(self) -> int | None:
        """Its exit status, of a signal as shells write it; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        self._end_session()
        return code if code >= 0 else 128 - code

    def terminate(self) -> None:
        """Asks it to save and to end; what it started itself hears of that from it."""
        self._process.terminate()

    def kill(self) -> int:
        """Ends it with all that it started."""
        if self._process.poll() is None:
            self._end_session()
            self._process.wait()
        return self.status()

    def _end_session(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # PermissionError: macOS, of a group of zombies
            os.killpg(self._process.pid, signal.SIGKILL)
        if self._printer.is_alive():
            self._printer.join(timeout=5)

    def _copy_lines(self) -> None:
        for line in self._process.stdout:
            sys.stdout.buffer.write(self._prefix.encode() + line.rstrip(b"\r\n") + b"\n")  # in one piece
            sys.stdout.buffer.flush()


class _Signals:
    """As a context: counts what would end this starter."""

    def __init__(self):
        self.count = 0
        self._previous = {}

    def __enter__(self) -> "_Signals":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number, frame) -> None:
        self.count += 1
        _say(f"{signal.Signals(number).name}: " + ("asking all to save and end" if self.count == 1 else "ending all"))

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """In the new process: it shall not outlive a starter that was killed. Linux alone knows how."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _say(line: str) -> None:
    print(f"launch: {line}", file=sys.stderr, flush=True)
