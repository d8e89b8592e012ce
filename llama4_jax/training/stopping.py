"""Stopping between two steps when the operating system or the person at the keyboard asks for it."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """As a context: SIGTERM (a cluster takes the machine back) and SIGINT (Ctrl-C) ask for a stop instead of ending the process.

    A second signal acts as if nothing had caught it. Outside the main thread, where Python allows no handlers, none is set.

    Of several processes a signal to one is a request to all. jax's preemption service then catches SIGTERM, tells the others,
    and finds a step that none of them has gone beyond; Ctrl-C is made a SIGTERM.

    Attributes:
        name: of the signal, once `reached` has said so.
    """

    def __init__(self):
        self.name: str | None = None
        self._received: str | None = None
        self._previous = {}
        self._alone = jax.process_count() == 1

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT) if self._alone else (signal.SIGINT,):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def reached(self, step: int) -> bool:
        """Whether to stop before this step, the same on all processes; ask once before each."""
        if self._alone:
            self.name = self._received
        elif self.name is None and multihost_utils.reached_preemption_sync_point(step):
            self.name = "SIGTERM"
        return self.name is not None

    def _handle(self, number, frame) -> None:
        self._received = signal.Signals(number).name
        self._restore()
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *exception) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())
