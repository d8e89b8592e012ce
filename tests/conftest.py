"""Signatures are checked here and only here: every jaxtyping annotation of the packages holds while the tests run."""

import os

import jaxtyping
import pytest

# Tests compile much and run little: XLA's cheapest code generation halves the suite's time.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

_hook = jaxtyping.install_import_hook(["llama4_jax.model", "llama4_jax.inference", "pallas_kernels"], "beartype.beartype")


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory():
    """Compiled programs of one file are of no use to the next; kept, they would come to gigabytes."""
    import jax

    yield
    jax.clear_caches()


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--run-slow"):
        skip = pytest.mark.skip(reason="slow: ./launch/test.sh --run-slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)
