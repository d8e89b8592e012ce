"""Compiles a run's program for a topology that is not here, in a child process that can neither hang nor eat the machine.

    outcome = compile_program(Job("experiments/pretrain_scout.py", "v5p:4x4x8"), Bounds(), tick)

libtpu ends its process where it finds some faults, so nothing of it runs in the caller's.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, Literal

from llama4_jax.errors import UserError

ProgramName = Literal["train", "prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class Job:
    """Attributes:
    config, settings: of the experiment, as `app.load_experiment` takes them.
    topology, slices: as `parse_topology` takes them.
    program: train: one update; prefill: reading a piece of prompts; decode: one token more of each row.
    hbm_bytes: what the compiler may use of a device's; None: all.
    """

    config: str
    topology: str
    slices: int = 1
    program: ProgramName = "train"
    hbm_bytes: float | None = None
    settings: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Of the compiler's process: seconds, and bytes of memory, by default four fifths of this machine's."""

    seconds: float = 3600.0
    bytes: float = 0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Attributes:
    measurement: a `Measurement` as JSON has it; None when the program was not compiled.
    error: one line, or None.
    needed_bytes: of HBM, where the compiler refused the program because it needs more than there is.
    arguments: bytes on a device by kind; known before compiling.
    seconds: that the compilation took, tracing included.
    compiler_bytes: of this machine's memory at its peak.
    versions: of jax and libtpu, and their effort where it is not the default.
    """

    measurement: dict[str, Any] | None = None
    error: str | None = None
    needed_bytes: float | None = None
    arguments: dict[str, float] | None = None
    seconds: float = 0.0
    compiler_bytes: float = 0.0
    versions: str = ""


Tick = Callable[[float, float], None]  # called with the seconds so far and the child's bytes


def compile_program(job: Job, bounds: Bounds, tick: Tick) -> Outcome:
    """Compiles and measures. A fault of the compiler is an Outcome with an error.

    Raises:
        UserError: libtpu is not installed, or the experiment does not fit the topology.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # else libtpu waits for a cloud machine's metadata server
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    start, peak = time.monotonic(), 0.0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        command = [sys.executable, "-m", "llama4_jax.planning.compiler_child"]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=err, env=environment, text=True)
        try:
            child.stdin.write(json.dumps(dataclasses.asdict(job)))
            child.stdin.close()
            stopped = None
            while child.poll() is None and stopped is None:
                time.sleep(0.2)
                seconds, size = time.monotonic() - start, _resident_bytes(child.pid)
                peak = max(peak, size)
                tick(seconds, size)
                if seconds > bounds.seconds:
                    stopped = f"the compiler was stopped after {bounds.seconds:.0f} s"
                elif size > bounds.bytes:
                    stopped = f"the compiler was stopped when it had {size / 1e9:.0f} GB of this machine's memory"
        finally:
            child.kill()
            child.wait()
        seconds = time.monotonic() - start
        out.seek(0)
        err.seek(0)
        answer = _answer(out.read())
        last_words = err.read()
    if "user_error" in answer:
        raise UserError(answer["user_error"])
    if stopped is None and "measurement" not in answer and "error" not in answer:
        stopped = _ending(child.returncode, last_words)
    if stopped:
        answer["error"] = stopped
    return Outcome(**answer, seconds=seconds, compiler_bytes=peak)


MARK = "plan: "  # before each line of JSON that the child writes


def _answer(text: str) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for line in text.splitlines():
        if line.startswith(MARK):
            answer |= json.loads(line[len(MARK) :])
    return answer


def _resident_bytes(process: int) -> float:
    try:
        with open(f"/proc/{process}/statm") as file:
            return float(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):  # it has just ended, or this is no Linux
        return 0.0


def _ending(status: int, last_words: str) -> str:
    lines = [line for line in last_words.splitlines() if re.search(r"Check failed|INTERNAL|Error|error|F\d{4}", line)]
    word = f"signal {-status}" if status < 0 else f"status {status}"
    return f"the compiler's process ended with {word}: {(lines or last_words.splitlines() or ['no message'])[-1].strip()[:300]}"
