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


def not_a_number(batch):
    """Loss and gradient of the batch are NaN."""
    return batch.replace(loss_weights=batch.loss_weights * float("nan"))


def far_too_large(batch):
    """Weights that nearly cancel make loss and gradient a thousand times too large."""
    return batch.replace(loss_weights=batch.loss_weights * (2.0 * (batch.positions % 2) - 0.998))


# Of training batches; `argument` numbers those that come out so, counted over the whole run.
POISONS = {"nan": not_a_number, "spike": far_too_large}


def flip_a_copy(sitting) -> None:
    """One bit, in what the last device of this process holds of a parameter that all hold."""
    import jax
    import numpy as np

    scale = sitting.state.params["final_norm"]["scale"]
    copies = [np.array(shard.data) for shard in scale.addressable_shards]
    copies[-1].view(np.uint32)[3] ^= 1 << 20
    put = [jax.device_put(copy, shard.device) for copy, shard in zip(copies, scale.addressable_shards, strict=True)]
    sitting.state.params["final_norm"]["scale"] = jax.make_array_from_single_device_arrays(scale.shape, scale.sharding, put)


def told(action: str, call: int | None) -> None:
    if call is not None:
        print(f"fault: {action} at {time.time():.3f}", file=sys.stderr, flush=True)


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
        if due and action == "flip":
            flip_a_copy(args[0])
        if due and not after and action in ACTIONS:
            told(action, call)
            ACTIONS[action](argument)
        result = original(*args, **kwargs)
        if action in POISONS:
            return POISONS[action](result) if args[0].step in argument else result
        if due and after:
            told(action, call)
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
