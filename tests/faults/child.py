"""`python -m llama4_jax.train` with faults built in: child.py FAULTS ARGUMENTS..., where FAULTS is harness.Fault objects as JSON."""

import functools
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time


def fail_full(*_):
    raise OSError(28, "No space left on device")


def bound_files(size):
    """No file may become larger, as on a disk that is full: for what Orbax writes by itself. What is printed does not count."""
    log = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    for stream in (1, 2):
        os.dup2(log.stdin.fileno(), stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def fail(*_):
    raise RuntimeError("a fault that a test made")


# Each is called with the argument that the fault names, before (or after) the call that it is set at.
ACTIONS = {
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "freeze": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": time.sleep,
    "raise": fail,
    "full": fail_full,
    "bound": bound_files,
}


def build_in(action: str, target: str, call: int | None, after: bool, argument) -> None:
    """Wraps the function `module:name.name`: at its `call`-th call, or each, `action` happens; `skip` stands in its place."""
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, importlib.import_module(module))
    original, calls = getattr(owner, name), 0

    @functools.wraps(original)
    def faulty(*args, **kwargs):
        nonlocal calls
        calls += 1
        due = call is None or calls == call
        if due and action == "skip":
            return argument
        if due and not after:
            ACTIONS[action](argument)
        result = original(*args, **kwargs)
        if due and after:
            ACTIONS[action](argument)
        return result

    setattr(owner, name, faulty)


if __name__ == "__main__":
    faults = json.loads(sys.argv.pop(1))
    from llama4_jax import app
    from llama4_jax.train import main

    for fault in faults:
        build_in(**fault)
    app.run(main)
