r"""Says before anything is rented whether a run fits a pod, what bounds it, and what it costs.

    python -m llama4_jax.plan --config=experiments/pretrain_scout.py --topology=v5p:4x4x8 --config.mesh.fsdp=16

The program is compiled for TPUs that need not be there (pip install libtpu); for GPUs it is estimated from shapes. See
llama4_jax/planning/README.md for what is counted and how.
"""

import json
import os
from pathlib import Path

from absl import flags

from llama4_jax import app
from llama4_jax.errors import UserError

_CONFIG = flags.DEFINE_string(
    "config", None, "Python file whose get_config() returns an Experiment; override fields by --config.FIELD=VALUE"
)
_TOPOLOGY = flags.DEFINE_string("topology", None, "chips, such as v5p:4x4x8, v6e:16x16, tpu7x:4x4x4, h100:16x8 (nodes x GPUs)")
_SLICES = flags.DEFINE_integer("slices", 1, "slices of that topology, joined by the data-centre network (mesh.dcn_data)")
_PROGRAM = flags.DEFINE_enum(
    "program", "train", ["train", "prefill", "decode"], "what runs: an update, a piece of prompts, a token"
)
_ESTIMATE = flags.DEFINE_bool("estimate", False, "from shapes alone, in a second, without a compiler")
_SEARCH = flags.DEFINE_integer(
    "search", None, "rank all meshes and remat policies by the estimate, and compile that many of the best"
)
_TOKENS = flags.DEFINE_float("tokens", 1e12, "tokens for which chip-hours are told")
_JSON = flags.DEFINE_string("json", None, "file for the report as JSON")
_PICTURE = flags.DEFINE_string("picture", None, "file for the report as a picture (.png, .svg)")
_TIMEOUT = flags.DEFINE_float("timeout", 3600, "seconds after which the compiler is stopped")


def main(overrides: dict[str, str]) -> int:
    if _CONFIG.value is None or _TOPOLOGY.value is None:
        raise UserError("--config=FILE and --topology=CHIP:SIZES are both needed")
    os.environ["JAX_PLATFORMS"] = "cpu"  # a plan needs no device, and takes none
    from llama4_jax.planning import plans  # after the flags: a misspelt one answers at once
    from llama4_jax.planning.compiler import Bounds, Job
    from llama4_jax.planning.report import as_text

    job = Job(_CONFIG.value, _TOPOLOGY.value, _SLICES.value, _PROGRAM.value, overrides)
    options = {"estimated": _ESTIMATE.value, "total_tokens": _TOKENS.value, "bounds": Bounds(_TIMEOUT.value)}
    plan = plans.make(job, **options) if _SEARCH.value is None else plans.search(job, _SEARCH.value, say=print, **options)
    print(as_text(plan))
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(plan.as_json(), indent=1) + "\n")
    if _PICTURE.value:
        from llama4_jax.planning.picture import plan_figure

        plan_figure(plan).savefig(_PICTURE.value)
    return 0 if plan.fits else 1


if __name__ == "__main__":
    app.run(main)
