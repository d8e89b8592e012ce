"""What a run shows beside its progress line: TensorBoard, a profiler trace, the memory of a device."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.stages import Compiled

from llama4_jax.config import ProfileConfig
from llama4_jax.parallel import processes

logger = logging.getLogger(__name__)


def scalars_of(record: dict[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl as scalars by TensorBoard tag.

    Lists of a value for each layer become `name/layer_i`; the load of a layer's experts becomes that of its busiest one, as
    a multiple of an even share.
    """
    if "evaluation" in record:
        return {f"{record['evaluation']}/{k}": v for k, v in record.items() if k not in ("step", "evaluation")}
    scalars = {}
    for name, value in record.items():
        if isinstance(value, dict):
            scalars |= {f"{name}/{key}": inner for key, inner in value.items()}
        elif isinstance(value, list):
            values = np.array(value)
            if values.ndim == 2:  # [layers, E]
                name, values = f"busiest_{name}", values.max(axis=1) * values.shape[1]
            scalars |= {f"{name}/layer_{i}": float(v) for i, v in enumerate(values)}
        elif name != "step":
            scalars[name] = value
    return scalars


class TensorBoard:
    """Event files of a run; those of steps that are run again are hidden. A disk that refuses them is told, and stops nothing."""

    def __init__(self, folder: Path, first_step: int):
        from tensorboardX import SummaryWriter  # here, since it takes half a second

        options = {"purge_step": first_step, "flush_secs": 30, "write_to_disk": processes.is_first()}
        self._folder, self._writer = folder, SummaryWriter(str(folder), **options)

    def write(self, record: dict[str, Any]) -> None:
        """`record` is a line of metrics.jsonl."""
        with self._told():
            for tag, value in scalars_of(record).items() if self._writer else ():
                self._writer.add_scalar(tag, value, record["step"])

    def close(self) -> None:
        with self._told():
            if self._writer:
                self._writer.close()

    @contextlib.contextmanager
    def _told(self):
        try:
            yield
        except (OSError, ValueError) as error:  # of a closed file or queue: its thread had met the first error
            logger.warning("TensorBoard's files in %s are not written any more: %s", self._folder, error)
            self._writer = None


class TraceWindow:
    """A trace of some steps, on the devices of the first process, for xprof (`xprof --logdir=DIR`) or Perfetto."""

    def __init__(self, config: ProfileConfig, folder: Path):
        self._folder, self._first = folder, config.start
        self._end = None if config.start is None else config.start + config.steps
        self._open = False

    def before(self, step: int) -> None:
        """Before step `step`, counted from 1, is dispatched; the step before it has ended where a window opens or closes."""
        if step == self._first and processes.is_first():
            jax.profiler.start_trace(str(self._folder))
            self._open = True
        elif step == self._end:
            self.close()

    def at_edge(self, step: int) -> bool:
        """Whether the window opens or closes before this step."""
        return step in (self._first, self._end)

    def close(self) -> None:
        if self._open:
            self._open = False
            jax.profiler.stop_trace()


def memory_summary(compiled: Compiled, device: jax.Device) -> str:
    """What one device holds during a compiled step, in words."""
    memory = compiled.memory_analysis()
    parts = f"{_giga(memory.argument_size_in_bytes)} of state and batch, {_giga(memory.temp_size_in_bytes)} of temporaries"
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return f"memory of a device: {parts}" + (f", of {_giga(limit)}" if limit else "")


def _giga(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
