"""`python -m llama4_jax.launch` many times for the price of one start: what it needs is imported once, then each runs in a fork."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ran:
    status: int
    output: str
    errors: str


def run_all(commands: list[list[str]], **environment: str) -> list[Ran]:
    """Each list of flags, run from the repository's top."""
    ran = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(commands),
        env=os.environ | environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    return [Ran(**one) for one in json.loads(ran.stdout)]


def main() -> None:
    sys.path.insert(0, str(REPOSITORY))
    import llama4_jax.launch
    import llama4_jax.launching.check  # jax with it

    for experiment in ("quickstart", "pretrain_scout"):  # and what it imports
        llama4_jax.launch.app.load_experiment(f"experiments/{experiment}.py", {})
    results = []
    for flags in json.load(sys.stdin):
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            child = os.fork()
            if child == 0:
                os.dup2(output.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                sys.argv = ["llama4_jax.launch", *flags]
                try:
                    llama4_jax.launch.app.run(llama4_jax.launch.main)
                except SystemExit as ended:
                    sys.stdout.flush()
                    os._exit(ended.code)  # without what jax does at exit
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = {}
            for name, file in (("output", output), ("errors", errors)):
                file.seek(0)
                texts[name] = file.read()
        results.append({"status": status, **texts})
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
