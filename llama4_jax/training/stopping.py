"""Stopping between two steps when the operating system or the person at the keyboard asks for it."""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator

from llama4_jax.parallel import processes

_WATCHED = (signal.SIGTERM, signal.SIGINT)
_NOTHING = -1  # the step begun, before any
_requests = itertools.count()


@contextlib.contextmanager
def leaving(leave: Callable[[str], None]) -> Iterator[None]:
    """As a context: SIGTERM and SIGINT call `leave` with the signal's name, from another thread, so that a main one which waits
    for other processes is not waited for. For where nothing is to be saved; a StopRequest inside has the signals to itself."""
    with _heard(leave, lambda number, frame: None):
        yield


@contextlib.contextmanager
def _heard(hear: Callable[[str], None], handle: Callable) -> Iterator[None]:
    """Each watched signal calls `hear` with its name in a thread, at once, and `handle` in the main thread, whenever that runs
    Python again. Outside the main thread, where Python allows no handlers, none is set."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen():
        while byte := os.read(reader, 1):
            if byte[0] in _WATCHED:
                hear(signal.Signals(byte[0]).name)
        os.close(reader)

    threading.Thread(target=listen, name="signals", daemon=True).start()
    previous_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    previous = {number: signal.signal(number, handle) for number in _WATCHED}
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_writer)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(writer)  # which ends `listen`


class StopRequest:
    """As a context: SIGTERM (a cluster takes the machine back) and SIGINT (Ctrl-C) ask for a stop instead of ending the process.

    Of several processes a signal to one is a request to all. They tell one another how many steps each has begun, and stop after
    the most of these. A thread does it, so that a main thread which is compiling, or waiting for a device, is waited for by nobody.
    Further SIGTERMs are the same request; a second Ctrl-C acts as if nothing had caught it. Outside the main thread, where
    Python allows no handlers, none is set. Handlers that were there before come back at the end.

    Attributes:
        name: of the signal, once `reached` has said so.
    """

    def __init__(self, leave: Callable[[str], None] | None = None):
        """`leave` is called with the signal's name, from another thread, when no process has begun a step yet, so that there is
        nothing to save and nothing to wait for; None: also then the next `reached` answers."""
        self.name: str | None = None
        self._leave = leave
        self._key = f"stop/{next(_requests)}"
        self._alone = processes.count() == 1
        self._changed = threading.Condition()
        self._signalled = False  # this process; set by the handler, which may take no lock
        self._begun = _NOTHING
        self._asking = self._over = False
        self._agreed: tuple[str, int] | None = None  # the signal, and the step to stop before
        self._signals = _heard(self._hear, self._handle)

    def __enter__(self) -> "StopRequest":
        if not self._alone:
            self._follower = threading.Thread(target=self._follow, name="stop request", daemon=True)
            self._follower.start()
        self._signals.__enter__()
        return self

    def reached(self, step: int) -> bool:
        """Whether to stop before this step, the same on all processes; ask once before each.

        Args:
            step: the how manieth that is begun. It never goes back, also when the run does.
        """
        with self._changed:
            while (self._signalled or self._asking) and self._agreed is None and not self._over:
                self._changed.wait()
            if self._agreed is not None and step >= self._agreed[1]:
                self.name = self._agreed[0]
                return True
            self._begun = step
            return False

    def _handle(self, number, frame) -> None:
        """In the main thread; `_hear` has heard of the signal already."""
        if self._signalled and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self._signalled = True

    def _hear(self, name: str) -> None:
        if self._alone:
            self._agree(name)
        else:
            processes.post(self._key, name)

    def _follow(self) -> None:
        """Waits for a request of any process."""
        if name := processes.posted(self._key):
            self._agree(name)
        else:  # a process has come to its end, and this one will: too late to stop
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _agree(self, name: str) -> None:
        with self._changed:
            if self._asking:
                return
            self._asking = True  # from here on no step begins before all agree
            begun = self._begun
        steps = [begun] if self._alone else processes.exchange(f"{self._key}/begun", begun)
        if max(steps) == _NOTHING and self._leave is not None:
            self._leave(name)
        with self._changed:
            self._agreed = name, max(steps) + 1
            self._changed.notify_all()

    def __exit__(self, *exception) -> None:
        if not self._alone:
            processes.post(self._key, "")  # which ends `_follow`, if nobody asked
            self._follower.join(5)
        self._signals.__exit__(None, None, None)
