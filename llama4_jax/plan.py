r"""Says before anything is rented whether a run fits a pod, what bounds it, and what it costs.

    python -m llama4_jax.plan --config=experiments/pretrain_scout.py --topology=v5p:4x4x8 --config.mesh.fsdp=16

The program is compiled for TPUs that need not be there (pip install libtpu); for GPUs it is estimated from shapes. See
llama4_jax/planning/README.md for what is counted and how.
"""

import dataclasses
import json
from pathlib import Path

import jax
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
_HBM = flags.DEFINE_float("hbm_gb", None, "1e9 bytes of a device's memory that the program may use; all by default")
_ESTIMATE = flags.DEFINE_bool("estimate", False, "from shapes alone, in a second, without a compiler")
_SEARCH = flags.DEFINE_integer(
    "search", None, "rank all meshes and remat policies by the estimate, and compile that many of the best"
)
_REPORT = flags.DEFINE_enum(
    "report",
    "plan",
    ["plan", "scaling", "calibration", "deployment"],
    "scaling: the experiment from one chip to thousands, --topology being the pod that its batch is for; calibration: the "
    "estimate beside published runs; deployment: claims about running models on little hardware",
)
_TOKENS = flags.DEFINE_float("tokens", 1e12, "tokens for which chip-hours are told")
_JSON = flags.DEFINE_string("json", None, "file for the report as JSON")
_PICTURE = flags.DEFINE_string("picture", None, "file for the report as a picture (.png, .svg)")
_TIMEOUT = flags.DEFINE_float("timeout", 3600, "seconds after which the compiler is stopped")


# What each report has a use for, beside --report.
_USED = {
    "plan": {"config", "topology", "slices", "program", "hbm_gb", "estimate", "search", "tokens", "json", "picture", "timeout"},
    "scaling": {"config", "topology", "json", "picture"},
    "calibration": set(),
    "deployment": set(),
}
_PICTURES = (".png", ".svg", ".pdf")


def main(overrides: dict[str, str]) -> int:
    _check(overrides)
    jax.config.update("jax_platforms", "cpu")  # a plan needs no device, and takes none
    return {"plan": plan, "scaling": scaling, "calibration": calibration, "deployment": deployment}[_REPORT.value](overrides)


def _check(overrides: dict[str, str]) -> None:
    """Before minutes of work. Raises UserError for a flag that the report would ignore, and a file that could not be written."""
    used = _USED[_REPORT.value]
    given = [name for name in sorted(_USED["plan"]) if flags.FLAGS[name].present]
    unused = [f"--{name}" for name in given if name not in used] + [
        f"--config.{name}" for name in overrides if "config" not in used
    ]
    if unused:
        raise UserError(f"--report={_REPORT.value} has no use for {', '.join(unused)}")
    for name, path in (("json", _JSON.value), ("picture", _PICTURE.value)):
        if path and not Path(path).absolute().parent.is_dir():
            raise UserError(f"--{name}={path}: there is no folder {Path(path).absolute().parent}")
    if _PICTURE.value and not _PICTURE.value.endswith(_PICTURES):
        raise UserError(f"--picture={_PICTURE.value}: the name must end in {', '.join(_PICTURES)}")


def plan(overrides: dict[str, str]) -> int:
    from llama4_jax.planning import plans  # after the flags: a misspelt one answers at once
    from llama4_jax.planning.compiler import Bounds
    from llama4_jax.planning.picture import plan_figure
    from llama4_jax.planning.report import as_text

    job = _job(overrides)
    options = {"estimated": _ESTIMATE.value, "total_tokens": _TOKENS.value, "bounds": Bounds(_TIMEOUT.value)}
    found = plans.make(job, **options) if _SEARCH.value is None else plans.search(job, _SEARCH.value, say=print, **options)
    _write(as_text(found), found.as_json(), lambda: plan_figure(found))
    return 0 if found.fits else 1


def scaling(overrides: dict[str, str]) -> int:
    from llama4_jax.planning import scaling
    from llama4_jax.planning.chips import parse_topology

    job = _job(overrides)
    experiment, home = app.load_experiment(job.config, job.settings), parse_topology(job.topology)
    points = [point for kind in ("weak", "strong") for point in scaling.scale(experiment, kind, home)]
    figure = lambda: scaling.scaling_figure(points, f"{job.config}: estimated")  # noqa: E731
    _write(scaling.as_text(points), [dataclasses.asdict(point) for point in points], figure)
    return 0


def calibration(overrides: dict[str, str]) -> int:
    from llama4_jax.planning import calibration

    print(calibration.as_text(calibration.compare()))
    return 0


def deployment(overrides: dict[str, str]) -> int:
    from llama4_jax.planning import deployment

    print(deployment.as_text())
    return 0


def _job(overrides: dict[str, str]):
    from llama4_jax.planning.compiler import Job

    if _CONFIG.value is None or _TOPOLOGY.value is None:
        raise UserError("--config=FILE and --topology=CHIP:SIZES are both needed")
    hbm_bytes = None if _HBM.value is None else 1e9 * _HBM.value
    return Job(_CONFIG.value, _TOPOLOGY.value, _SLICES.value, _PROGRAM.value, hbm_bytes, overrides)


def _write(text: str, fields, figure) -> None:
    """On the terminal, and where flags say."""
    print(text)
    try:
        if _JSON.value:
            Path(_JSON.value).write_text(json.dumps(fields, indent=1) + "\n")
        if _PICTURE.value:
            figure().savefig(_PICTURE.value)
    except OSError as error:
        raise UserError(f"the report could not be written: {error}") from None


if __name__ == "__main__":
    app.run(main)
