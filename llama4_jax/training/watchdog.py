"""Ends a process that stands still, and says where it stood.

A dead process is missed by its heartbeat. One that is alive but stuck, in a read that never returns, a collective whose peer does
not come, or a device that hangs, is missed by nobody: the others wait for it for ever.
"""

import faulthandler
import math
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Collection
from pathlib import Path

import jax

from llama4_jax import exit_codes
from llama4_jax.config import WatchConfig
from llama4_jax.training.recorder import FlightRecorder

_POLL_SECONDS = 1.0
_TELL_SECONDS = 5.0  # for telling where it stood, and for the watchdogs of other processes to do the same
_LOCK_MARGIN_SECONDS = 30.0


class Watchdog:
    """A thread that knows what should happen next, and by when. As a context it ends with the run.

    When it is late the stacks of all threads go to stderr and to stacks-<process>.txt in the folder, the flight recorder gets
    the fault, and the process ends with the status RETRY. It counts the time that it was itself awake: a process that was
    stopped, or whose machine slept, is given its full time again.

    A thread that holds Python's lock for ever stops this thread too; then faulthandler, which needs no lock, does the same
    half a minute later, on stderr alone.
    """

    def __init__(self, config: WatchConfig, folder: Path, recorder: FlightRecorder):
        self._config, self._recorder = config, recorder
        self._stacks = folder / f"stacks-{jax.process_index()}.txt"
        self._lock = threading.Lock()
        self._what, self._limit, self._stood = "", math.inf, 0.0
        self._steps: deque[float] = deque(maxlen=64)  # seconds of the last ones
        self._last_step: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def expect(self, what: str, seconds: float) -> None:
        """`what` begins now, and the next call must come within so many seconds."""
        self._last_step = None
        self._expect(what, seconds)

    def expect_step(self, step: int) -> None:
        """Step `step` must be done within its limit; called again when the one before it is done."""
        now = time.monotonic()
        if self._last_step is not None:
            self._steps.append(now - self._last_step)
        self._last_step = now
        self._expect(f"step {step}", step_limit(self._steps, self._config))

    def _expect(self, what: str, seconds: float) -> None:
        with self._lock:
            self._what, self._limit, self._stood = what, seconds, 0.0

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(_POLL_SECONDS):
            now = time.monotonic()
            with self._lock:
                self._stood += min(now - last, 2 * _POLL_SECONDS)
                what, left = self._what, self._limit - self._stood
            last = now
            self._arm_faulthandler(left + _LOCK_MARGIN_SECONDS)
            if left < 0:
                threading.Thread(target=self._tell, args=(what,), daemon=True).start()  # a disk may be what hangs
                time.sleep(_TELL_SECONDS)
                os._exit(exit_codes.RETRY)

    def _arm_faulthandler(self, seconds: float) -> None:
        if seconds < threading.TIMEOUT_MAX and (stderr := _stderr()):
            faulthandler.dump_traceback_later(seconds, exit=True, file=stderr)
        else:
            faulthandler.cancel_dump_traceback_later()

    def _tell(self, what: str) -> None:
        line = (
            f"process {jax.process_index()} of {jax.process_count()} has stood still in {what} for {self._stood:.0f} s and ends "
            f"with status {exit_codes.RETRY}, for another try"
        )
        if stderr := _stderr():
            print(f"{line}; its threads:", file=stderr, flush=True)
            faulthandler.dump_traceback(stderr)
        self._recorder.record_here("fault", what=line)
        with self._stacks.open("a") as file:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}:", file=file, flush=True)
            faulthandler.dump_traceback(file)

    def __exit__(self, *exception) -> None:
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()


def step_limit(seconds: Collection[float], config: WatchConfig) -> float:
    """How long the next step may take, after steps of so many seconds; before there are any, as long as a compilation."""
    usual = config.step_factor * statistics.median(seconds) if seconds else config.compile_seconds
    return max(config.step_seconds, usual)


def _stderr():
    """The process's own, whatever stands in for it; None where it has none."""
    try:
        sys.__stderr__.fileno()
    except (AttributeError, ValueError, OSError):
        return None
    return sys.__stderr__
