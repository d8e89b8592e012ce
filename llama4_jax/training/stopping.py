"""Stopping between two steps when the operating system or the person at the keyboard asks for it."""

import signal
import threading


class StopRequest:
    """As a context: SIGTERM (a cluster takes the machine back) and SIGINT (Ctrl-C) set `name` instead of ending the process.

    A second signal acts as if nothing had caught it. Outside the main thread, where Python allows no handlers, none is set.
    """

    def __init__(self):
        self.name: str | None = None
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number, frame) -> None:
        self.name = signal.Signals(number).name
        self._restore()

    def __exit__(self, *exception) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())
