"""Signatures are checked here and only here: every jaxtyping annotation of the packages holds while the tests run."""

import atexit
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import hypothesis
import jaxtyping
import pytest

if "cuda" in os.environ.get("JAX_PLATFORMS", ""):
    # What a GPU runs is tested as it is used, with the precision of its references; several workers share its memory.
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
else:
    # Tests compile much and run little: XLA's cheapest code generation halves the suite's time.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

# And no program is compiled twice, in whichever test, worker or child process it is met again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="llama4-jax-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# How long an example takes says more about what else the machine does than about the example.
hypothesis.settings.register_profile("suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("suite")

_hook = jaxtyping.install_import_hook(["llama4_jax.model", "llama4_jax.inference", "pallas_kernels"], "beartype.beartype")


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory():
    """Compiled programs of one file are of no use to the next; kept, they would come to gigabytes."""
    import jax

    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def start_job(tmp_path_factory):
    """`start_job(count, *arguments, devices=4)`: `count` Python processes of one job on this machine, started.

    Each has .process, .output(), which is what it has printed so far, and .ended(timeout), its status when it has ended.
    """
    folder, started = tmp_path_factory.mktemp("job"), []

    def start(count, *arguments, devices=4):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
        job = []
        for index in range(count):
            together = {"COORDINATOR": coordinator, "PROCESS_COUNT": count, "PROCESS_ID": index} if count > 1 else {}
            environment = {f"LLAMA4_{name}": str(value) for name, value in (together | {"LOCAL_DEVICES": devices}).items()}
            log = folder / f"{len(started)}.txt"
            with log.open("w") as file:
                process = subprocess.Popen(
                    [sys.executable, *map(str, arguments)],
                    env=os.environ | environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            started.append(process)
            job.append(SimpleNamespace(process=process, output=log.read_text, ended=process.wait))
        return job

    yield start
    for process in started:
        process.kill()
        process.wait()


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--run-slow"):
        skip = pytest.mark.skip(reason="slow: ./launch/test.sh --run-slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)
