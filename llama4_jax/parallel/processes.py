"""How the processes of a job find one another, and what they do together beside computing.

A job is one process or many, each with devices of its own, all running one program. What differs between them is this module's
matter: `find` reads the launcher's environment (nothing else in the package does), `start` joins, `from_first` does a thing
once for all, and `end` takes all of them down together.
"""

import atexit
import collections
import contextlib
import dataclasses
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from llama4_jax import exit_codes
from llama4_jax.errors import UserError

T = TypeVar("T")

HEARTBEAT_SECONDS = 15  # a process that died silently, by kill -9 or with its machine, takes the others down after these
SHUTDOWN_SECONDS = 15  # that a process which has finished waits for the others
JOIN_SECONDS = 300  # that processes wait for one another at the start

_EXPLICITLY = "LLAMA4_*"


@dataclasses.dataclass(frozen=True)
class Job:
    """This process among those of its job.

    Attributes:
        told_by: what said so, for messages.
        coordinator: host:port of process 0, where all meet; None for a lone process.
        count: processes.
        index: of this one, from 0.
        local_devices: ids of the GPUs of this machine that are this process's; None: all that it sees.
    """

    told_by: str = "nothing"
    coordinator: str | None = None
    count: int = 1
    index: int = 0
    local_devices: tuple[int, ...] | None = None

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise UserError(
                f"{self.told_by}: process {self.index} of {self.count} does not exist; they count from 0 to {self.count - 1}"
            )
        if self.count > 1 and not re.fullmatch(r".+:\d+", self.coordinator or ""):
            raise UserError(f"{self.told_by}: the coordinator must be host:port of process 0, got {self.coordinator!r}")


# ------------------------------------------------------------------------------------------------------------------------
# Finding


def find(environment: Mapping[str, str] = os.environ) -> Job:
    """This process's job, by the first that answers: LLAMA4_*, srun, Cloud TPU and GKE; else a job of one process.

    Raises:
        UserError: variables that contradict one another or lack a part.
    """
    return _told_explicitly(environment) or _told_by_srun(environment) or _told_by_cloud_tpu() or Job()


def _told_explicitly(environment: Mapping[str, str]) -> Job | None:
    names = ("LLAMA4_COORDINATOR", "LLAMA4_PROCESS_COUNT", "LLAMA4_PROCESS_ID")
    missing = [name for name in names if not environment.get(name)]
    if len(missing) == len(names):
        return None
    if missing:
        raise UserError(f"{' and '.join(missing)} must be set too: a process needs all of {', '.join(names)}")
    count, index = (_number(environment, name) for name in names[1:])
    return Job(_EXPLICITLY, environment["LLAMA4_COORDINATOR"], count, index)


def _told_by_srun(environment: Mapping[str, str]) -> Job | None:
    """Of the step that this process belongs to; a batch script itself is in none."""
    if not environment.get("SLURM_STEP_NODELIST") or not environment.get("SLURM_STEP_NUM_TASKS"):
        return None
    count, index = _number(environment, "SLURM_STEP_NUM_TASKS"), _number(environment, "SLURM_PROCID")
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    restarts = _number({"SLURM_RESTART_COUNT": "0"} | environment, "SLURM_RESTART_COUNT")  # the ids of a requeued job stay
    # Below the ports that Linux gives to outgoing connections. JAX's own choice is the same for all steps of a job.
    port = 20_480 + (31 * job + step + 997 * restarts) % 12_288
    coordinator = f"{_first_host(environment['SLURM_STEP_NODELIST'])}:{port}"
    return Job("SLURM", coordinator, count, index, _gpus_of_task(environment))


def _first_host(nodes: str) -> str:
    """Of a list such as gpu[007-015,020]-a,login."""
    prefix, first, suffix = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes).groups("")
    return prefix + first + suffix


def _gpus_of_task(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """One each, where several tasks of a machine see the same GPUs; all that a task sees, where it is alone or bound to its own."""
    alone = environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0] == "1"
    bound = "," not in environment.get("CUDA_VISIBLE_DEVICES", ",")
    return None if alone or bound else (_number(environment, "SLURM_LOCALID"),)


def _told_by_cloud_tpu() -> Job | None:
    """By the variables that GKE sets, or by the metadata server of a TPU VM; both know of several slices."""
    import jax
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster, GkeTpuCluster  # nothing public asks without joining

    if "tpu" not in (jax.config.jax_platforms or "tpu"):
        return None
    for name, cluster in (("GKE", GkeTpuCluster), ("the metadata server", GceTpuCluster)):
        if cluster.is_env_present():
            count = cluster.get_process_count()
            coordinator = cluster.get_coordinator_address(JOIN_SECONDS, None) if count > 1 else None
            return Job(name, coordinator, count, cluster.get_process_id())
    return None


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise UserError(f"{name} must be a whole number, got {text!r}")
    return int(text)


# ------------------------------------------------------------------------------------------------------------------------
# Joining


def start(*, limit_seconds: int = JOIN_SECONDS) -> Job:
    """Joins the other processes of this job; call it before anything asks jax for a device. A lone process has nothing to join.

    From here on an uncaught exception of one process ends all of them, and says why on each.

    Raises:
        UserError: the environment contradicts itself, or names a port that is taken. (A derived port that is taken, and a
            process that does not come, are no fault of the input: this one ends with the status RETRY, the latter after
            `limit_seconds`.)
    """
    import jax

    job = find()
    if os.environ.get("LLAMA4_LOCAL_DEVICES"):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", _number(os.environ, "LLAMA4_LOCAL_DEVICES"))
    if job.count == 1:
        return job
    host = job.coordinator.rpartition(":")[0]
    if job.index == 0:
        _require_free_port(job)
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM to itself: see training/stopping.py
    with _limit(job, limit_seconds):
        jax.distributed.initialize(
            job.coordinator,
            job.count,
            job.index,
            local_device_ids=job.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=limit_seconds + 60,  # for `_limit` to speak first: jax aborts
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            coordinator_bind_address=job.coordinator if host in ("localhost", "127.0.0.1") else None,
        )
    _fall_together(job)
    return job


def _require_free_port(job: Job) -> None:
    """jax would share a port with another job's coordinator, and both jobs would break. One that nobody chose is worth a retry."""
    port = int(job.coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the last job's closed connections do not count
        try:
            probe.bind(("", port))
        except OSError as error:
            line = f"{job.told_by}: process 0 cannot listen at {job.coordinator}: {error.strerror}"
            if job.told_by == _EXPLICITLY:
                raise UserError(f"{line}; choose another port") from None
            _say(line)
            end(exit_codes.RETRY, line)


@contextlib.contextmanager
def _limit(job: Job, seconds: int):
    """Ends this process with one line when the others have not come in time."""

    def give_up():
        host, _, port = job.coordinator.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            reason = "others have not come"
        except OSError as error:
            reason = f"process 0 does not answer: {error.strerror or error}"
        _say(f"process {job.index} of {job.count} waited {seconds} s at {job.coordinator} ({job.told_by}), but {reason}")
        os._exit(exit_codes.RETRY)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# ------------------------------------------------------------------------------------------------------------------------
# Together


def count() -> int:
    """Processes of this job."""
    import jax

    return jax.process_count()


def is_first() -> bool:
    """Whether this is process 0, which writes what is written once: files, pictures, lines on the terminal."""
    import jax

    return jax.process_index() == 0


_calls: dict[str, itertools.count] = collections.defaultdict(itertools.count)


def _key(kind: str, what: str) -> str:
    """The same on all processes, and of no other call. Threads of one name call in one order, each name in its own."""
    thread = threading.current_thread().name
    return f"llama4_jax/{kind}/{thread}/{next(_calls[thread])}/{what}"


def from_first(what: str, make: Callable[[], T], *, limit_seconds: int = 600) -> T:
    """What `make` returns, made by process 0 alone and given to all, as JSON holds it. All processes call this in one order.

    Args:
        what: is made, for messages.
        make: only called on process 0.
        limit_seconds: that the others wait.

    Raises:
        UserError: on all processes when `make` raises it.
        TimeoutError: process 0 has not come so far.
    """
    import jax

    if jax.process_count() == 1:
        return make()
    key = _key("from_first", what)
    if is_first():
        try:
            answer = {"made": make()}
        except UserError as error:
            answer = {"error": str(error)}
        _client().key_value_set(key, json.dumps(answer))
    else:
        try:
            answer = json.loads(_client().blocking_key_value_get(key, limit_seconds * 1000))
        except jax.errors.JaxRuntimeError as error:
            raise TimeoutError(f"process 0 has not finished {what} in {limit_seconds} s") from error
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["made"]


def first_then_others(what: str, make: Callable[[], T], *, limit_seconds: int = 600) -> T:
    """What `make` returns on this process. Process 0 goes first; the others find on disk what it left there.

    Args and Raises: as `from_first`.
    """
    made: list[T] = []
    from_first(what, lambda: made.append(make()), limit_seconds=limit_seconds)
    return made[0] if made else make()


def to_first(what: str, make: Callable[[], T], *, limit_seconds: int = 3600) -> list[T] | None:
    """What `make` returns on each process, by index, as JSON holds it: on process 0; None on the others, which do not wait.

    Args: as `from_first`, but that `make` is called on every process.

    Raises:
        UserError: on process 0 when `make` raised it on any, and on that one.
        TimeoutError: a process has not come so far.
    """
    import jax

    if jax.process_count() == 1:
        return [make()]
    key = _key("to_first", what)
    try:
        answer = {"made": make()}
    except UserError as error:
        answer = {"error": str(error)}
    if not is_first():
        _client().key_value_set(f"{key}/{jax.process_index()}", json.dumps(answer))
    answers = [answer]
    for index in range(1, jax.process_count()) if is_first() else ():
        try:
            answers.append(json.loads(_client().blocking_key_value_get(f"{key}/{index}", limit_seconds * 1000)))
        except jax.errors.JaxRuntimeError as error:
            raise TimeoutError(f"process {index} has not finished {what} in {limit_seconds} s") from error
        _client().key_value_delete(f"{key}/{index}")
    for each in answers:
        if "error" in each:
            raise UserError(each["error"])
    return [each["made"] for each in answers] if is_first() else None


def meet(what: str, *, limit_seconds: int = 3600) -> None:
    """Returns when all processes have come to this call. Raises TimeoutError that counts and names the missing."""
    import jax

    if jax.process_count() == 1:
        return
    try:
        _client().wait_at_barrier(_key("meet", what), limit_seconds * 1000)
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(f"not all processes came to {what} in {limit_seconds} s: {error}") from error


def post(key: str, text: str) -> None:
    """Leaves a text for all processes. Of several under one key the first stays."""
    with contextlib.suppress(Exception):  # another was first, or the service is gone
        _client().key_value_set(f"llama4_jax/{key}", text)


def posted(key: str) -> str | None:
    """Waits for what any process posts; None when the job ends first. For a thread of its own."""
    try:
        return _client().blocking_key_value_get(f"llama4_jax/{key}", _FOREVER_MS)
    except Exception:  # the job is over
        return None


def exchange(key: str, number: int) -> list[int]:
    """The number of every process, by index. For a thread of its own: it waits for all, and a dead one ends the job meanwhile."""
    import jax

    post(f"{key}/{jax.process_index()}", str(number))
    return [int(posted(f"{key}/{index}") or number) for index in range(jax.process_count())]


def _client() -> Any:
    from jax._src import distributed  # nothing public has the service's keys and values

    return distributed.global_state.client


# ------------------------------------------------------------------------------------------------------------------------
# Ending

_FAILURE = "failure"
_FOREVER_MS = 10 * 365 * 86_400 * 1000
_joined: Job | None = None


def end(status: int, reason: str) -> NoReturn:
    """Ends this process with `status`, and the others of its job with the same, who print the `reason`.

    At once: an ordinary exit would wait at its end for processes that are waiting for this one. From another thread than the
    main one a lone process ends at once too.
    """
    if _joined is None:
        if threading.current_thread() is threading.main_thread():
            sys.exit(status)
        sys.stdout.flush()
        os._exit(status)
    post(_FAILURE, json.dumps({"index": _joined.index, "status": status, "reason": reason}))
    _leave_last(_joined, status)


def _leave_last(job: Job, status: int) -> NoReturn:
    """The first process runs the service by which all hear of the end; jax aborts whoever is still there when it is gone."""
    if job.index == 0:
        time.sleep(1)
    sys.stdout.flush()
    os._exit(status)


def _fall_together(job: Job) -> None:
    import jax

    global _joined
    _joined = job

    def end_all(kind, error, traceback):
        if ending.is_set():
            watch.join()  # which ends this process; what another's end has made of its work is no news
        _say(f"process {job.index} of {job.count} failed:")
        sys.__excepthook__(kind, error, traceback)
        end(exit_codes.RETRY, f"{kind.__name__}: {error}")

    def end_with_others():
        if (told := posted(_FAILURE)) is None:
            return
        failure = json.loads(told)
        if failure["index"] != job.index:
            ending.set()
            how = "was stopped" if failure["status"] == exit_codes.PREEMPTED else "failed"
            _say(f"process {job.index} of {job.count} ends, for process {failure['index']} {how}: {failure['reason']}")
            _leave_last(job, failure["status"])

    ending, watch = threading.Event(), threading.Thread(target=end_with_others, daemon=True)

    def leave():
        jax.distributed.shutdown()  # which ends the watch; a thread that still waited would crash the end of Python
        watch.join()

    sys.excepthook = end_all
    watch.start()
    atexit.register(leave)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
