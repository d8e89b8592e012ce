"""The folder of one run: experiment.json, metrics.jsonl, checkpoints/, and what is drawn from them."""

import contextlib
import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

from llama4_jax.checkpoints.partial_folder import write_durably
from llama4_jax.config import DataConfig, Experiment, ModelConfig
from llama4_jax.errors import UserError
from llama4_jax.parallel import processes

logger = logging.getLogger(__name__)

# Fields that may differ between two sittings of one run. They change when things happen or where, not what is trained.
# (Another number of steps moves the end of the learning rate's decay.)
# A prepared folder may move, since the checkpoint knows its content.
# (What counts as a spike may have to change for a run to go on.)
CHANGEABLE = ("steps", "log_every", "checkpoint", "evaluations", "mesh", "execution", "profile", "anomalies", "watch")
CHANGEABLE += ("data.prepared", "data.max_bad_records", "data.when_changed")


def flatten_experiment(experiment: Experiment) -> dict[str, Any]:
    """Every setting by its dotted name, such as optimizer.learning_rate; tuples become lists, as JSON has them."""
    flat = {}

    def visit(prefix, value):
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                visit(f"{prefix}.{name}" if prefix else name, inner)
        else:
            flat[prefix] = list(value) if isinstance(value, tuple) else value

    visit("", dataclasses.asdict(experiment))
    return flat


def fixed_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that make a run the run it is."""
    return {name: value for name, value in settings.items() if not {name, name.split(".")[0]}.intersection(CHANGEABLE)}


class WorkDirectory:
    """A run's folder, made or taken up again. Of several processes the first writes, and all read."""

    def __init__(self, folder: str | Path, experiment: Experiment, *, read_only: bool = False):
        """Compares experiment.json, and writes it, with the changed settings that may be, unless `read_only`.

        Raises:
            UserError: the folder cannot be written, or belongs to another experiment.
        """
        self._read_only = read_only
        self.folder = Path(folder).absolute()
        self.checkpoints = self.folder / "checkpoints"
        self.metrics_file = self.folder / "metrics.jsonl"
        self.settings = flatten_experiment(experiment)
        processes.first_then_others("the work directory", self._take)

    def _take(self) -> None:
        saved = self._read_settings()
        if saved is not None:
            require_same_experiment(saved, self.settings, self.folder)
        if not processes.is_first():
            if saved is None:
                raise UserError(
                    f"work directory {self.folder} must be storage that all processes share: this one does not see it"
                )
            return
        if self._read_only:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / "experiment.json", json.dumps(self.settings, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write to work directory {self.folder}: {error.strerror}") from error

    def _read_settings(self) -> dict[str, Any] | None:
        path = self.folder / "experiment.json"
        try:
            return json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}; choose another --workdir") from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl. A last line that was cut short is left out, and so is, with a warning, any that is damaged."""
        records, damaged = _decoded(self._metrics())
        if damaged and processes.is_first():
            logger.warning("%s: %s cannot be read and is left out", self.metrics_file, _lines(damaged))
        return records

    def forget_metrics_after(self, step: int) -> None:
        """Drops the lines of steps that will be run again. Where a line is damaged, all of it stays in metrics.jsonl.damaged.

        Raises UserError when the disk refuses it.
        """
        if not processes.is_first():
            return
        content = self._metrics()
        records, damaged = _decoded(content)
        try:
            if damaged:
                aside = self.metrics_file.with_name(f"{self.metrics_file.name}.damaged")
                write_durably(aside, (aside.read_bytes() if aside.exists() else b"") + content)
                logger.warning(
                    "%s: %s cannot be read and goes; %s holds the file as it was", self.metrics_file, _lines(damaged), aside
                )
            kept = [record for record in records if record["step"] <= step]
            write_whole(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))
        except OSError as error:
            raise UserError(f"cannot write {self.metrics_file}: {error.strerror}") from error

    def _metrics(self) -> bytes:
        try:
            return self.metrics_file.read_bytes()
        except FileNotFoundError:
            return b""

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Adds a line. Raises UserError when the disk refuses it."""
        if not processes.is_first():
            return
        try:
            with self.metrics_file.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.metrics_file}: {error.strerror}") from error

    def sync_metrics(self) -> None:
        """What was appended survives the machine's stop from here on. Raises OSError."""
        with contextlib.suppress(FileNotFoundError), self.metrics_file.open("rb") as file:
            os.fsync(file.fileno())


def require_same_experiment(saved: dict[str, Any], settings: dict[str, Any], folder: Path) -> None:
    """Raises UserError that names the settings that differ, and both values.

    A setting that was not known when the folder was made counts as its default, since it did not exist to be changed. With
    data.when_changed=start_over those of the data may differ: what becomes of them is told when they are read.
    """
    missing = object()
    may_change_data = settings.get("data.when_changed") == "start_over"
    defaults = flatten_experiment(Experiment(ModelConfig(), DataConfig()))
    younger = {name: defaults[name] for name in settings.keys() & defaults.keys() - saved.keys()}
    saved, settings = fixed_settings(younger | saved), fixed_settings(settings)
    differences = [
        f"{name} is {saved.get(name, 'absent')!r} there and {settings.get(name, 'absent')!r} here"
        for name in sorted(saved.keys() | settings.keys())
        if saved.get(name, missing) != settings.get(name, missing) and not (may_change_data and name.startswith("data."))
    ]
    if differences:
        shown = "; ".join(differences[:4]) + (f"; and {len(differences) - 4} more" if len(differences) > 4 else "")
        raise UserError(f"work directory {folder} belongs to another experiment: {shown}. Choose another --workdir")


def _decoded(content: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    """The records, and the numbers of the lines that are none."""
    lines, records, damaged = content.split(b"\n"), [], []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line.decode())
            records.append(record | {"step": int(record["step"])})
        except (ValueError, TypeError, KeyError, RecursionError):
            if number < len(lines):  # the last is empty, or was being written when the machine stopped
                damaged.append(number)
    return records, damaged


def _lines(numbers: list[int]) -> str:
    return f"line {', '.join(map(str, numbers[:10]))}{' and others' if len(numbers) > 10 else ''}"


def write_whole(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never a part, also after the machine has stopped."""
    write_durably(path, text.encode())
