"""The long form of the fault suite: every fault, many moments, as a table. About 160 starts of some ten seconds each.

python -m tests.faults --out=faults.md            all
python -m tests.faults --only=kill,flip           faults with these words in their names
"""

import argparse
import datetime
import functools
import logging
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from absl import logging as absl_logging
from tqdm import tqdm

from tests.faults import anomalies, damage, data, disks, kills, peers
from tests.faults.harness import Bench
from tests.faults.rows import Row, summary, table


def flips(bench: Bench) -> Iterable[Row]:
    """Of the checkpoints of one process and of two."""
    for seed, processes in ((0, 1), (1, 2)):
        run = bench.run(f"finished-{processes}", processes=processes)
        run.finish()
        yield from damage.flips(bench, run, seed, count=150)


def bad_batches(bench: Bench) -> Iterable[Row]:
    """Alone and in a row, on one process and on one of two, and without an end."""
    for processes in (1, 2):
        yield anomalies.poisoned(bench, "nan", processes=processes)
        yield anomalies.poisoned(bench, "nan", processes=processes, batches=anomalies.IN_A_ROW)
    yield anomalies.poisoned(bench, "spike")
    yield anomalies.poisoned(bench, "nan", batches=anomalies.IN_A_ROW, again=True)


FAULTS: dict[str, Callable[[Bench], Iterable[Row]]] = {
    "kill at random moments": lambda bench: [row for seed in range(3) for row in kills.at_random(bench, seed, kills=7)],
    "kill at each moment of a save": lambda bench: kills.at_moments(bench, kills.MOMENTS),
    "kill at each moment of a restore": lambda bench: kills.at_moments(
        bench, ["before the manifest", *kills.RESTORING, "renamed, not synced", *kills.RESTORING]
    ),
    "kill one of two at random moments": functools.partial(kills.at_random, seed=7, kills=8, processes=2),
    "kill process 0 of two in a save": lambda bench: kills.at_moments(bench, kills.MOMENTS, processes=2, victim=0),
    "kill process 1 of two in a save": lambda bench: kills.at_moments(
        bench, [m for m in kills.MOMENTS if kills.on_every_process(m)], processes=2, victim=1
    ),
    "flip bits of checkpoints": flips,
    "damage checkpoints": lambda bench: damage.of_runs(bench, [*damage.DAMAGE, *damage.STRAYS]),
    "damage all checkpoints": damage.of_all,
    "full disk": lambda bench: [disks.full_at(bench, moment) for moment in disks.FULL],
    "full file system": disks.full_for_real,
    "read-only file system": disks.read_only,
    "vanished folder": disks.gone,
    "slow disk": disks.slow,
    "changed data and settings": data.changed,
    "bad records": data.poisoned,
    "flip bits of shards": functools.partial(data.shards, seed=0, count=300),
    "other processes and meshes": data.places,
    "broken peers": lambda bench: (peers.broken(bench, kind, victim) for kind in peers.PEERS for victim in (0, 1)),
    "late peer and crash loop": lambda bench: [peers.late(bench), peers.crash_loop(bench)],
    "signals to one process": lambda bench: peers.signalled(bench, peers.SIGNALS, processes=1, victim=0),
    "signals to one of two": lambda bench: peers.signalled(bench, peers.SIGNALS, processes=2, victim=1),
    "Ctrl-C": lambda bench: peers.signalled(bench, ["in a step"], processes=1, victim=0, number=signal.SIGINT),
    "batches of NaN and spikes": bad_batches,
    "differing copies": lambda bench: [anomalies.flipped_copy(bench)],
}


def told(name: str, bench: Bench) -> Iterable[Row]:
    """The rows of one kind of fault. One that comes to no end is a row too, and those after it are still made."""
    try:
        yield from FAULTS[name](bench)
    except (AssertionError, TimeoutError) as error:
        yield Row(name, 0, "came to no end", survived="NO", wrong=[str(error)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="words, one of which a fault's name must hold; separated by commas")
    parser.add_argument("--out", type=Path, help="file that receives the tables")
    chosen = parser.parse_args()
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger("llama4_jax").setLevel(logging.ERROR)  # each flip that is noticed is a warning
    names = [name for name in FAULTS if any(word in name for word in chosen.only.split(","))]
    bench, rows, begin = Bench(Path(tempfile.mkdtemp(prefix="faults-")) / "bench"), [], time.monotonic()
    try:
        for name in tqdm(names, unit=" kinds of fault"):
            tqdm.write(f"--- {name}", file=sys.stderr)
            for row in told(name, bench):
                rows.append(row)
                if not row.right:
                    tqdm.write(f"{row}", file=sys.stderr)
    finally:
        bench.close()
        shutil.rmtree(bench.folder.parent, ignore_errors=True)
        text = report(rows, time.monotonic() - begin)
        print(text)
        if chosen.out is not None:
            chosen.out.write_text(f"{text}\n\n{table(rows)}\n")
    return 0 if all(row.right for row in rows) else 1


def report(rows: list[Row], seconds: float) -> str:
    import jax

    wrong = sum(len(row.wrong) for row in rows)
    return (
        f"{len(rows)} faults, {wrong} wrong results. {datetime.date.today()}, jax {jax.__version__}, Python "
        f"{platform.python_version()}, {os.cpu_count()} CPU cores, {seconds / 60:.0f} minutes.\n\n{summary(rows)}"
    )


if __name__ == "__main__":
    sys.exit(main())
