"""The flight recorder: events.jsonl of a work directory, which tells of every sitting of a run what it did, and when.

A line is an event: its name, the wall clock, a clock that never jumps, process and host, and the updates done (`step`) where they
are known. Most events begin something that lasts until the next line (`llama4_jax.training.goodput` reads them so): start, restore,
compile, step (training goes on; updates up to `step` are done), evaluate, save, finish, stop. A fault begins nothing.
"""

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

logger = logging.getLogger(__name__)

STEP_SECONDS = 30.0  # between two lines about steps alone: 0.3 MB a day


class FlightRecorder:
    """Appends events of this process. A line is on its way to the disk when `record` returns, so that kill -9 loses none. Steps
    are told together: those of up to the last half minute may not be in a line yet, and kill -9 loses these.

    The first process writes events.jsonl; another one writes only what happens to it alone, to events-<process>.jsonl. A disk
    that refuses is told once and stops nothing.
    """

    def __init__(self, folder: Path):
        process = jax.process_index()
        self._own = {"process": process, "host": socket.gethostname()}
        self._path = folder / ("events.jsonl" if process == 0 else f"events-{process}.jsonl")
        self._file: int | None = None
        self._refused = self._started = False
        self._steps: dict[str, Any] | None = None  # done, and not written yet
        self._written_at = 0.0

    def record(self, event: str, *, age: float = 0.0, **details: Any) -> None:
        """An event of all processes, `age` seconds ago, written by the first. The first of them is start."""
        self._started |= event == "start"
        if self._own["process"] == 0:
            self.record_here(event, age=age, **details)

    def record_here(self, event: str, *, age: float = 0.0, **details: Any) -> None:
        """An event of this process alone. Nothing is written before start: a finished run that is started leaves no trace."""
        if self._started:
            self._write_steps()
            self._write({"event": event} | _clocks(age) | self._own | details)

    @contextlib.contextmanager
    def faults(self) -> Iterator[None]:
        """Records what is raised inside."""
        try:
            yield
        except BaseException as error:
            self.record_here("fault", what=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
            raise

    def step(self, step: int, *, skipped: bool = False) -> None:
        """An update is done, or left out as `skipped`. Written as one line for many, with the time of the last."""
        if self._own["process"] == 0:
            left_out = (self._steps or {}).get("skipped", 0) + skipped
            steps = {"event": "step"} | _clocks() | self._own | {"step": step}
            self._steps = steps | ({"skipped": left_out} if left_out else {})
            if steps["monotonic"] - self._written_at >= STEP_SECONDS:
                self._write_steps()

    def _write_steps(self) -> None:
        if self._steps is not None:
            steps, self._steps = self._steps, None
            self._write(steps)

    def _write(self, event: dict[str, Any]) -> None:
        self._written_at = event["monotonic"]
        line = json.dumps(event).encode() + b"\n"
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
                if _ends_within_a_line(self._file):
                    line = b"\n" + line
            os.write(self._file, line)  # in one piece, without a buffer of Python's
        except OSError as error:
            if not self._refused:
                logger.warning("cannot write %s: %s; training goes on without it", self._path, error.strerror)
            self._refused = True

    def close(self) -> None:
        """Writes what is left about steps."""
        self._write_steps()
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _clocks(age: float = 0.0) -> dict[str, float]:
    return {"time": round(time.time() - age, 3), "monotonic": round(time.monotonic() - age, 3)}


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The lines of events.jsonl in their order. What is no whole line, where a machine died, is left out."""
    return _read(folder / "events.jsonl")


def read_events_of_others(folder: Path) -> list[dict[str, Any]]:
    """What happened to single processes beside the first, by wall clock."""
    events = [event for path in folder.glob("events-*.jsonl") for event in _read(path)]
    return sorted(events, key=lambda event: event["time"])


def _read(path: Path) -> list[dict[str, Any]]:
    events = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and {"event", "time", "monotonic"} <= event.keys():
            events.append(event)
    return events


def _ends_within_a_line(file: int) -> bool:
    size = os.fstat(file).st_size
    return size > 0 and os.pread(file, 1, size - 1) != b"\n"
