r"""One training step of one small Llama 4, by us and by our peers, in the same environment and one after another.

    python experiments/step_benchmark/run.py --maxtext=PYTHON --transformers=PYTHON

PYTHON is the interpreter of an environment where that peer is installed (MaxText 0.2.5 and our jax do not share one). A
peer that is not named is left out, and the table says so. Every contender runs with huge pages for malloc, as
launch/quickstart.sh does: page faults cost XLA:CPU a quarter of its time. README.md beside this file has the results.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import shape as s

FOLDER = pathlib.Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--maxtext", metavar="PYTHON")
    parser.add_argument("--transformers", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=2, help="how often every contender runs; its best round counts")
    arguments = parser.parse_args()
    interpreters = {
        "llama4_jax_step.py": sys.executable,
        "maxtext_step.py": arguments.maxtext,
        "transformers_step.py": arguments.transformers,
    }
    best: dict[str, dict] = {}
    for _ in range(arguments.rounds):  # in turn, so that a busy moment of the machine does not fall on one contender
        for script, interpreter in interpreters.items():
            if interpreter is not None:
                result = run(interpreter, script)
                best[script] = min(best.get(script, result), result, key=lambda r: r["median"])
    floor = arithmetic_floor()
    print(f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{'':14s} {'median s':>9s} {'best s':>8s} {'tokens/s':>9s} {'start-up s':>10s}")
    for result in best.values():
        tokens = s.BATCH * s.LENGTH / result["median"]
        print(
            f"{result['contender']:14s} {result['median']:9.3f} {result['best']:8.3f} {tokens:9,.0f} "
            f"{result['start_up']:10.1f}  {result['versions']}"
        )
    print(
        f"{'arithmetic':14s} {floor:9.3f} {'':8s} {s.BATCH * s.LENGTH / floor:9,.0f}  the model's matmuls at the measured peak"
    )
    for script, interpreter in interpreters.items():
        if interpreter is None:
            name = script.removesuffix("_step.py")
            print(f"{name} was not run; name its interpreter with --{name}=PYTHON")


def run(interpreter: str, script: str) -> dict:
    environment = os.environ | {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(FOLDER.parents[1]),
    }
    if script != "llama4_jax_step.py":
        environment.pop("PYTHONPATH")
    done = subprocess.run([interpreter, FOLDER / script], env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        sys.exit(f"{script} failed:\n{(done.stderr or done.stdout)[-1500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def processor() -> str:
    """The CPU's name as Linux has it, else what Python knows."""
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def arithmetic_floor() -> float:
    """Seconds that the step's matmuls take at the rate of one large float32 matmul on this machine."""
    from llama4_jax_step import MODEL

    from llama4_jax.training.flops import peak_of, training_flops_per_token

    peak = peak_of(jax.devices()[:1], jnp.float32.__name__)
    return s.BATCH * s.LENGTH * training_flops_per_token(MODEL, s.LENGTH) / peak.flops


if __name__ == "__main__":
    main()
