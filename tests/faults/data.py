"""Data that change, break or cannot be read, and settings that change, between two starts of a run; and other meshes."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tests.faults.disks import finished, stopped
from tests.faults.harness import SLOWLY, Bench, Run
from tests.faults.rows import Row

# What is done to the folder of texts, and what the next start must name.
CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a text cut": (lambda data: (data / "03.txt").write_text((data / "03.txt").read_text()[:500]), "sources held"),
    "a text emptied": (lambda data: (data / "03.txt").write_text(""), "sources held"),
    "a text deleted": (lambda data: (data / "03.txt").unlink(), "sources held"),
    "a letter changed": (lambda data: (data / "03.txt").write_text((data / "03.txt").read_text()[:-1] + "!"), "sources held"),
    "a text that is no UTF-8": (lambda data: (data / "03.txt").write_bytes(b"\xff\xfe"), "03.txt is not UTF-8"),
    "all gone": (lambda data: shutil.rmtree(data), "no data at"),
}
# The same of what training prepared from them.
PREPARED: dict[str, tuple[Callable[[Path], object], str]] = {
    "prepared ids flipped": (lambda corpus: _flip(corpus / "train_ids.npy", 400), "train_ids.npy is damaged"),
    "prepared order cut": (lambda corpus: (corpus / "train_plan.npy").write_bytes(b"x"), "train_plan.npy is damaged"),
    "its manifest flipped": (lambda corpus: _flip(corpus / "corpus.json", 200), "are damaged"),
    "tokenizer deleted": (lambda corpus: (corpus / "tokenizer.json").unlink(), "cannot read"),
}
SETTINGS: dict[str, dict[str, object]] = {
    "data.batch_size": {"data__batch_size": 4},
    "data.shuffle_seed": {"data__shuffle_seed": 9},
    "data.heldout_fraction": {"data__heldout_fraction": 0.3},
    "seed": {"seed": 5},
    "model.hidden_size": {"model__hidden_size": 16},
    "optimizer.learning_rate": {"optimizer__learning_rate": 1e-3},
}


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def stopped_run(bench: Bench, name: str, **settings) -> Run:
    """A run that was killed when it had a checkpoint and was beyond it."""
    run = bench.run(name, **settings)
    job = run.start([SLOWLY])
    assert job.wait_until(lambda: bool(run.whole_steps()) and run.step() > run.whole_steps()[-1]), job.outputs()
    job.kill()
    job.ended()
    return run


def changed(bench: Bench) -> Iterator[Row]:
    """The data, what was prepared of them, or a setting changes: refused by name. Undone, the run goes on to the same bits."""
    data = bench.folder / "changing"
    shutil.copytree(bench.data, data)
    run = stopped_run(bench, "changed", data__sources=str(data))
    rows = []
    for moment, (change, words) in CHANGES.items():
        change(data)
        rows.append(stopped(run, run.start(), Row("data changed", 0, moment, "refused"), words))
        shutil.rmtree(data, ignore_errors=True)
        shutil.copytree(bench.data, data)
    corpus, good = run.workdir / "corpus", run.workdir / "corpus.good"
    shutil.copytree(corpus, good)
    for moment, (change, words) in PREPARED.items():
        change(corpus)
        rows.append(stopped(run, run.start(), Row("prepared data damaged", 0, moment, "refused"), words))
        shutil.rmtree(corpus)
        shutil.copytree(good, corpus)
    for moment, settings in SETTINGS.items():
        rows.append(stopped(run, run.start(**settings), Row("setting changed", 0, moment, "refused"), f"{moment} is"))
    finished(run, rows[-1])
    return iter(rows)


def poisoned(bench: Bench) -> Iterator[Row]:
    """Records that cannot be read: within the budget a run is what it would be without them; one more stops it."""
    numbers, source = np.random.default_rng(1), bench.folder / "lines"
    source.mkdir()
    with open(source / "r.jsonl", "wb") as file:
        for _ in range(40):
            file.write(json.dumps({"text": " ".join(f"word{word}" for word in numbers.integers(0, 400, 100))}).encode() + b"\n")
    clean = bench.run("clean", data__sources=str(source))
    clean.finish()
    with open(source / "r.jsonl", "ab") as file:
        file.writelines([b'{"text": "cut\n', b'{"text": "\xe9"}\n', b'{"body": "no text"}\n'])
    run = bench.run("poisoned", data__sources=str(source))
    row = Row("three bad records", 0, "two may be left out", "refused")
    yield stopped(run, run.start(data__max_bad_records=2), row, f"{source / 'r.jsonl'}, line 43 has no text")
    row = Row("three bad records", 0, "three may be left out; killed between")
    job = run.start([SLOWLY], data__max_bad_records=3)
    assert job.wait_until(lambda: bool(run.whole_steps())), job.outputs()
    job.kill()
    job.ended()
    run.finish(data__max_bad_records=3)
    if any(f"line {line} " not in run.jobs[-1].output() for line in (41, 42, 43)):
        row.wrong.append("one was not named")
    row.wrong += run.compare(clean).wrong
    yield row


def shards(bench: Bench, seed: int, *, count: int) -> Iterator[Row]:
    """A random bit of a random file of prepared shards: never other tokens."""
    from llama4_jax.config import DataConfig
    from llama4_jax.data.pipeline import prepare_corpus, train_batches
    from llama4_jax.data.shard_writer import prepare_shards
    from llama4_jax.errors import UserError

    chance, folder = random.Random(seed), bench.folder / f"shards-{seed}"
    config = DataConfig(sources=(str(bench.data),), sequence_length=32, batch_size=8, heldout_fraction=0.2)
    prepare_shards(config, folder, vocab_size=320, progress=False)
    config.sources, config.prepared = (), str(folder)

    def read():
        corpus = prepare_corpus(config, vocab_size=320, document_window=None, cache_dir=bench.folder / "none", progress=False)
        batches = train_batches(corpus, config)
        rows = [next(batches).tokens.tobytes() for _ in range(2 * len(list(bench.data.iterdir())))]
        return rows, [text.tokens.tobytes() for text in (corpus.heldout.batch(range(len(corpus.heldout))),)]

    right = read()
    for _ in range(count):
        path = chance.choice(sorted(folder.iterdir()))
        place, bit = chance.randrange(path.stat().st_size), chance.randrange(8)
        row = Row("a bit of a shard flipped", seed, f"{path.name}, byte {place}, bit {bit}", "refused")
        content = path.read_bytes()
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        try:
            row.survived = "yes"
            if read() != right:
                row.wrong.append("other tokens, and nothing said so")
        except UserError:
            row.survived = "refused"
        path.write_bytes(content)
        yield row


LOSS_TOLERANCE, PARAMS_TOLERANCE = 2e-3, 1e-3  # the parameters of four places, after 48 steps, differed by 3e-5
# Starts of one run: processes, devices of each, mesh. All hold two rows of each batch or more on a device.
PLACES = [
    (1, 2, {}),
    (2, 1, {}),
    (1, 2, {"mesh__data": 1, "mesh__fsdp": 2}),
    (2, 1, {"mesh__data": 1, "mesh__fsdp": 2}),
    (1, 1, {}),
    (4, 1, {}),
    (2, 2, {}),
    (1, 4, {"mesh__data": 2, "mesh__expert": 2}),
]


def places(bench: Bench, starts: list[tuple[int, int, dict]] = PLACES) -> Iterator[Row]:
    """Killed and started on another number of processes, or another mesh: the same batches, the losses and parameters of one process.

    The numbers differ from those of one process by the order of float32 sums; the batches do not. So losses are compared to
    LOSS_TOLERANCE of their value, and each array of the last parameters to PARAMS_TOLERANCE of its norm.
    """
    run = bench.run("places", steps=12 * len(starts))
    rows = []
    for count, devices, mesh in starts:
        run.processes, run.devices = count, devices
        job, step = run.start([SLOWLY], **mesh), run.step() + 5
        assert job.wait_until(lambda step=step: run.step() >= step and bool(run.whole_steps())), job.outputs()
        job.end()
        sizes = ", ".join(f"{name.removeprefix('mesh__')}={size}" for name, size in mesh.items()) or "data"
        rows.append(Row("other processes or mesh", 0, f"{count} x {devices} devices, {sizes}"))
    run.processes, run.devices = 1, 2
    run.finish()
    for row, job in zip(rows, run.jobs[1:], strict=True):
        come_to, resumed = run.went_on(job)
        row.steps_lost = come_to - resumed
    straight = bench.unbroken(run)
    for one, two in zip(run.records(), straight.records(), strict=True):
        if (one["step"], one.get("epochs")) != (two["step"], two.get("epochs")):
            rows[-1].wrong.append(f"step {two['step']}: other batches")
        name = "loss" if "loss" in two else "bits_per_byte"
        if abs(one[name] - two[name]) > LOSS_TOLERANCE * two[name]:
            rows[-1].wrong.append(f"step {two['step']}: {name} {one[name]} instead of {two[name]}")
    rows[-1].wrong += other_parameters(run.final_state(), straight.final_state())
    return iter(rows)


def other_parameters(mine: dict[str, np.ndarray], its: dict[str, np.ndarray]) -> list[str]:
    """A line of each array of the parameters that differs by more than PARAMS_TOLERANCE of its norm."""
    wrong, names = [], [name for name in its if "params" in name]
    assert names and mine.keys() == its.keys()
    for name in names:
        one, two = mine[name].astype(np.float64), its[name].astype(np.float64)
        if not np.linalg.norm(one - two) <= PARAMS_TOLERANCE * np.linalg.norm(two):
            wrong.append(f"{name} differs by {np.linalg.norm(one - two) / np.linalg.norm(two):.1e} of its norm")
    return wrong
