"""What all targets have in common: the program that every process runs, and what is handed to a cluster."""

import dataclasses
import functools
import re
import shlex
from pathlib import PurePosixPath

from llama4_jax.errors import UserError
from llama4_jax.launching.accelerators import Slice, read_slice

STORAGE = "/storage"  # where containers see the shared file system
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Attributes:
    config, workdir, overrides: of the trainer; an override is --config.FIELD=VALUE.
    """

    config: str
    workdir: str
    overrides: tuple[str, ...] = ()

    def __post_init__(self):
        if "://" in self.workdir:
            raise UserError(f"--workdir={self.workdir}: runs are written to a file system; mount the bucket and name a folder")

    @property
    def program(self) -> tuple[str, ...]:
        """Python's arguments."""
        return ("-m", "llama4_jax.train", f"--config={self.config}", f"--workdir={self.workdir}", *self.overrides)

    @property
    def devices(self) -> int | None:
        """JAX devices of all processes together; None: known only where it runs."""
        raise NotImplementedError

    @property
    def slice_count(self) -> int:
        """Groups of devices that only the slow network joins."""
        return 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnSlices(Job):
    """A job on TPU slices.

    Attributes:
        topology: of each slice, such as v5p:4x4x8.
        slices: joined by the data-centre network.
    """

    topology: str
    slices: int = 1

    def __post_init__(self):
        super().__post_init__()
        require_at_least(1, self, "slices")

    @functools.cached_property
    def slice(self) -> Slice:
        return read_slice(self.topology)

    @property
    def slice_count(self) -> int:
        return self.slices

    @property
    def devices(self) -> int:
        return self.slices * self.slice.devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterJob(Job):
    """A job that a scheduler starts, and starts again.

    Attributes:
        name: as the cluster lists it; made from the folder's name when empty. One name is one run.
        max_restarts: after failures that are worth another try; preemptions do not count.
        grace_seconds: from SIGTERM to SIGKILL, and for the other processes when one has ended.
    """

    name: str = ""
    max_restarts: int = 3
    grace_seconds: int = 300

    def __post_init__(self):
        super().__post_init__()
        if not self.name:
            made = re.sub(r"[^a-z0-9]+", "-", PurePosixPath(self.workdir).name.lower()).strip("-")
            object.__setattr__(self, "name", made)
        if not _NAME.fullmatch(self.name):
            raise UserError(f"--name={self.name}: up to 40 lower-case letters, digits and hyphens, a letter first")
        require_at_least(0, self, "max_restarts")
        require_at_least(1, self, "grace_seconds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContainerJob(ClusterJob):
    """A cluster's job whose program comes in a container image.

    Attributes:
        image: of launch/Containerfile, where the cluster can pull it.
        storage: a shared file system, mounted at /storage; what names it depends on the target.
    """

    image: str
    storage: str

    def __post_init__(self):
        super().__post_init__()
        if PurePosixPath(self.config).is_absolute() or ".." in PurePosixPath(self.config).parts:
            raise UserError(f"--config={self.config}: the image holds this repository; name a file of it, from its top")
        if STORAGE not in map(str, PurePosixPath(self.workdir).parents):
            raise UserError(f"--workdir={self.workdir} would end with its container; name a folder below {STORAGE}/")


@dataclasses.dataclass(frozen=True)
class Submission:
    """A command that hands a job over, and what it reads from its standard input.

    Attributes:
        folder: to be made first; None: none.
        afterwards: commands to watch the job and to end it, each with what it does.
    """

    command: tuple[str, ...]
    document: str
    afterwards: tuple[tuple[str, str], ...]
    folder: str | None = None

    def __str__(self) -> str:
        """For --dry_run: the document, which stays valid with the command as its last comment."""
        return f"{self.document}# To be read by:\n#   {shlex.join(self.command)}\n"


def require_at_least(least: int, job: Job, *names: str) -> None:
    """Raises UserError, with the flag's name, for the first field below `least`."""
    for name in names:
        if getattr(job, name) < least:
            raise UserError(f"--{name}={getattr(job, name)} must be at least {least}")
