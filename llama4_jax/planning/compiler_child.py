"""The child of compiler.py: `python -m llama4_jax.planning.compiler_child`, a Job as JSON on stdin, an Outcome's fields on stdout."""

import ctypes
import dataclasses
import importlib.util
import json
import re
import signal
import sys
import warnings
from importlib.metadata import version
from typing import Any

import jax
from jax.experimental import topologies

from llama4_jax import app
from llama4_jax.errors import UserError
from llama4_jax.parallel.mesh import make_mesh
from llama4_jax.planning import programs
from llama4_jax.planning.chips import Topology, parse_topology
from llama4_jax.planning.compiler import MARK, Job
from llama4_jax.planning.measure import measure
from llama4_jax.planning.memory import arguments_by_kind

# The compiler's two ways to refuse a program for want of HBM.
_NEEDED = re.compile(
    r"(Used |required for HLO temporaries \()(?P<number>[\d.]+)(?P<unit>[KMGT])(?= of [\d.]+[KMGT] hbm|\) exceeds)"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def main() -> None:
    _end_with_parent()

    def say(**answer) -> None:
        print(MARK + json.dumps(answer), flush=True)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # kernels refuse the tiny shapes with which parameters are made, and say so
            _compile(Job(**json.load(sys.stdin)), say)
    except UserError as error:
        say(user_error=str(error))
    except Exception as error:
        text = " ".join(str(error).split())
        say(error=f"{type(error).__name__}: {text[:400]}", needed_bytes=needed_bytes(text))


def needed_bytes(message: str) -> float | None:
    """Of HBM, in a message that refuses a program for want of it; None in any other."""
    found = _NEEDED.search(message)
    return float(found["number"]) * _UNITS[found["unit"]] if found else None


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its child: on Linux the kernel does."""
    if sys.platform == "linux":
        pdeathsig = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(pdeathsig, signal.SIGKILL)


def _compile(job: Job, say) -> None:
    topology = parse_topology(job.topology, job.slices, job.hbm_bytes)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs libtpu: pip install libtpu")
    experiment = app.load_experiment(job.config, job.settings)
    say(versions=_versions())
    devices = _devices(topology)
    case = programs.PROGRAMS[job.program](experiment, devices)
    say(arguments=arguments_by_kind(case.arguments))
    with case.context():
        compiled = case.function.lower(*case.arguments).compile(_limits(job))
    measurement = measure(compiled, case.arguments, topology, make_mesh(experiment.mesh, devices))
    say(measurement=dataclasses.asdict(measurement))


def _versions() -> str:
    """Of what compiles, and how hard it tries where that is not its default."""
    level = jax.config.jax_optimization_level
    effort = "" if level == "UNKNOWN" else f", at JAX_OPTIMIZATION_LEVEL={level}"
    return f"jax {jax.__version__}, libtpu {version('libtpu')}{effort}"


def _limits(job: Job) -> dict[str, int]:
    return {} if job.hbm_bytes is None else {"xla_tpu_max_hbm_size_mib": int(job.hbm_bytes / 2**20)}


def _devices(topology: Topology) -> list[jax.Device]:
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip
    if topology.name == "v5e:1x1":
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices
    except Exception as error:
        raise UserError(f"the compiler refuses topology {topology}: {' '.join(str(error).split())[:200]}") from error


if __name__ == "__main__":
    main()
