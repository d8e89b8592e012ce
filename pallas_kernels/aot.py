"""Ahead-of-time compilation for TPUs on a machine that has none.

`libtpu` (on PyPI, part of `jax[tpu]`) compiles for a topology that it is only told about. It may end the process where it
finds a fault, and reads its flags once; so every compilation here happens in a child process.

    requests = [Request("my_package.my_kernel:case", {"rows": 4096})]
    for outcome in compile_for("v5p", requests):
        assert outcome.error is None, outcome.error
"""

import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}  # four chips of each


@dataclasses.dataclass(frozen=True)
class Case:
    """What to compile: `function(*arguments)`.

    Attributes:
        function: anything that `jax.jit` takes, or what `jax.jit` returned.
        arguments: pytrees of `jax.ShapeDtypeStruct`; one without a sharding lies on the first device.
        context: makes what is to be entered while tracing; None: a mesh of the first device alone, which says for which TPU
            a kernel is traced.
    """

    function: Callable
    arguments: tuple
    context: Callable[[], AbstractContextManager] | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """A case by name, since it has to be built in the child.

    Attributes:
        builder: "package.module:function"; called as `function(devices, **options)` it returns a Case. `devices` are those of
            the topology.
        options: what JSON can hold.
    """

    builder: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Attributes:
    seconds: that the compilation took.
    temporary_bytes: of HBM on each device.
    error: what the compiler said, or None.
    """

    request: Request
    seconds: float
    temporary_bytes: int
    error: str | None


def available() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def compile_for(tpu: str, requests: Sequence[Request], *, dump: Path | None = None, timeout: float = 900) -> list[Outcome]:
    """Compiles each request for `tpu` in one child process.

    Args:
        tpu: one of TOPOLOGIES, or a topology by libtpu's own name, such as "v5p:2x2x4".
        dump: an existing folder for the compiler's own listings (see `pallas_kernels.schedule`).
        timeout: seconds for all of them.

    Raises:
        ValueError: no such TPU.
        RuntimeError: the child ended without an answer for every request; its last words are in the message.
    """
    if tpu not in TOPOLOGIES and tpu.partition(":")[0] not in TOPOLOGIES:
        raise ValueError(f"no topology {tpu!r}; choose from {', '.join(TOPOLOGIES)}, or name one such as v5p:2x2x4")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # else libtpu waits for a cloud machine's metadata server
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    if dump is not None:
        environment["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
    child = subprocess.run(
        [sys.executable, "-m", "pallas_kernels.aot", tpu],
        input=json.dumps([dataclasses.asdict(request) for request in requests]),
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    answers = [json.loads(line[len(_MARK) :]) for line in child.stdout.splitlines() if line.startswith(_MARK)]
    outcomes = [Outcome(request, **answer) for request, answer in zip(requests, answers, strict=False)]
    if len(outcomes) < len(requests):
        lost = requests[len(outcomes)]
        raise RuntimeError(f"the compiler's process ended at {lost} for {tpu}: {child.stderr[-2000:]}")
    return outcomes


_MARK = "aot: "


def _serve(tpu: str, requests: list[Request]) -> None:
    """The child: one line of JSON for each request."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import Mesh, SingleDeviceSharding

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES.get(tpu, tpu)).devices
    first = SingleDeviceSharding(devices[0])

    def place(argument):
        return argument if argument.sharding else jax.ShapeDtypeStruct(argument.shape, argument.dtype, sharding=first)

    for request in requests:
        start, temporary, error = time.perf_counter(), 0, None
        try:
            module, _, name = request.builder.partition(":")
            builder = functools.reduce(getattr, name.split("."), importlib.import_module(module))
            case = builder(devices, **request.options)
            function = case.function if hasattr(case.function, "lower") else jax.jit(case.function)
            with case.context() if case.context else jax.set_mesh(Mesh(devices[:1], ("chip",))):
                compiled = function.lower(*jax.tree.map(place, case.arguments)).compile()
            temporary = compiled.memory_analysis().temp_size_in_bytes
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        answer = {"seconds": time.perf_counter() - start, "temporary_bytes": temporary, "error": error}
        print(_MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], [Request(**request) for request in json.load(sys.stdin)])
