r"""Turns a checkpoint of any format into another, tensor by tensor.

    python -m llama4_jax.convert --from=Llama-4-Scout-17B-16E --to=scout --dtype=bfloat16
    python -m llama4_jax.convert --from=RUN --to=model.gguf --dtype=q8_0
    python -m llama4_jax.convert --from=smollm2 --to=mixture --upcycle=experts:8
    python -m llama4_jax.convert --verify=scout

Read are Hugging Face folders and hub names, Meta's consolidated files, GGUF, and training runs and weights of this project.
Killed and started again, it goes on with the files that were not finished. Exit status: 0 finished, 42 stopped by Ctrl-C (start
again to go on), 2 bad input.
"""

import sys
from pathlib import Path

from absl import flags

from llama4_jax import app, exit_codes
from llama4_jax.errors import UserError

_FROM = flags.DEFINE_string("from", None, "checkpoint to read: a folder, a file, or a name on Hugging Face's hub")
_TO = flags.DEFINE_string("to", None, "new folder, or new file for a GGUF; an interrupted conversion goes on there")
_FORMAT = flags.DEFINE_enum(
    "format", None, ["hf", "orbax", "gguf"], "of what is written; default: gguf for *.gguf, otherwise hf"
)
_DTYPE = flags.DEFINE_string("dtype", None, "float32, float16, bfloat16, or for a GGUF a quantised type; default: as it is")
_TEXT_ONLY = flags.DEFINE_bool("text_only", False, "leave the vision tower out")
_UPCYCLE = flags.DEFINE_string(
    "upcycle", None, "makes a mixture of experts of a dense model: experts:N, and of choice top_k:K, every:N and seed:S"
)
_CONFIG_NAME = flags.DEFINE_string("config_name", None, "named configuration of consolidated files without params.json")
_ALLOW_NONFINITE = flags.DEFINE_bool("allow_nonfinite", False, "take tensors with NaN or infinity as they are")
_VERIFY = flags.DEFINE_string("verify", None, "compare a converted checkpoint with its SHA256SUMS, and do nothing else")


def main(overrides: dict[str, str]) -> int:
    if overrides:
        raise UserError(f"--config.{next(iter(overrides))}: a conversion has no experiment")
    if (_VERIFY.value is None) == (_FROM.value is None or _TO.value is None):
        raise UserError("--from=PATH and --to=PATH are both needed, or --verify=PATH alone")
    if _VERIFY.value is not None:
        from llama4_jax.checkpoints.partial_folder import verify

        print(f"{_VERIFY.value}: {verify(Path(_VERIFY.value))} files are what was written")
        return 0
    from llama4_jax.checkpoints.conversion import convert  # after the flags: a misspelt one answers at once

    try:
        converted = convert(
            _FROM.value,
            _TO.value,
            format=_FORMAT.value,
            dtype=_DTYPE.value,
            text_only=_TEXT_ONLY.value,
            upcycle=_UPCYCLE.value,
            config_name=_CONFIG_NAME.value,
            allow_nonfinite=_ALLOW_NONFINITE.value,
        )
    except KeyboardInterrupt:
        print("stopped: finished files are kept; run again to go on", file=sys.stderr)
        return exit_codes.PREEMPTED
    kept = f", {converted.kept} of them from before the interruption" if converted.kept else ""
    print(f"{converted.path}: {converted.tensors:,} tensors of {converted.nbytes:,} bytes{kept}")
    return exit_codes.DONE


if __name__ == "__main__":
    app.run(main)
