"""The app: a plan of a program that is compiled, one that is estimated, and one line where neither can be."""

import json
import subprocess
import sys

import pytest

from llama4_jax.errors import UserError
from llama4_jax.planning import plans
from llama4_jax.planning.compiler import Bounds, Job, compile_program
from llama4_jax.planning.compiler_child import needed_bytes
from llama4_jax.planning.report import as_text
from pallas_kernels import aot

CONFIG = """
import llama4_jax as l4

def get_config():
    model = l4.ModelConfig(
        vocab_size=2048, hidden_size=256, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=128, dense_ffn_size=1024,
        moe_interval=0, nope_interval=1,
    )
    return l4.Experiment(
        model=model,
        data=l4.DataConfig(sources=("text",), sequence_length=512, batch_size=16),
        execution=l4.ExecutionConfig(compute_dtype="bfloat16", attention="xla"),
        mesh=l4.MeshConfig(fsdp=4, data=2),
    )
"""
libtpu = pytest.mark.skipif(not aot.available(), reason="libtpu is not installed (pip install libtpu)")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(CONFIG)
    return str(path)


def plan(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "llama4_jax.plan", *flags], capture_output=True, text=True, timeout=900)


@libtpu
def test_a_decoding_program_is_compiled_and_reported_with_the_compilers_effort(config, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_OPTIMIZATION_LEVEL", "O1")
    report, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    done = plan(
        f"--config={config}", "--topology=v5e:2x4", "--program=decode", f"--json={report}", f"--picture={picture}",
        "--tokens=1e9", "--config.data.sequence_length=1024",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "compiled by jax" in done.stdout and ", at JAX_OPTIMIZATION_LEVEL=O1 in" in done.stdout
    assert "decode on v5e:2x4 (8 chips), mesh data=2 x fsdp=4" in done.stdout
    assert picture.read_bytes()[:4] == b"\x89PNG"
    found = json.loads(report.read_text())
    assert found["fits"] and found["tokens"] == 16
    arguments = found["measurement"]["memory"]["arguments"]
    assert arguments["cache"] >= 2 * 2 * 2 * 1024 * 4 * 128 * 2  # layers, keys and values, rows of a device
    assert [loop["turns"] for loop in found["measurement"]["loops"]] == [1]  # one token


OVER_CONTEXT = [
    "--config.mesh.fsdp=1", "--config.mesh.data=1", "--config.mesh.context=4", "--config.mesh.tensor=2",
    "--config.data.batch_size=1", "--config.data.sequence_length=65536", "--config.model.nope_interval=2",
    "--config.execution.context_layout=zigzag",
]  # fmt: skip


@pytest.mark.slow
@libtpu
@pytest.mark.parametrize(
    "program, flags", [("train", []), ("prefill", []), ("prefill", OVER_CONTEXT), ("decode", OVER_CONTEXT)]
)
def test_the_other_programs_compile_too(config, tmp_path, program, flags):
    report = tmp_path / "plan.json"
    done = plan(f"--config={config}", "--topology=v5e:2x4", f"--program={program}", f"--json={report}", *flags)
    assert done.returncode == 0, done.stderr
    assert "compiled by jax" in done.stdout
    if flags:
        cache = json.loads(report.read_text())["measurement"]["memory"]["arguments"]["cache"]
        slots = 65536 / 4 + 8192  # of the layer without RoPE, over context; of the layer with it, one chunk
        assert cache == pytest.approx(slots * 2 * 4 / 2 * 128 * 2, rel=0.02)  # and the slots' positions


@pytest.mark.slow
@libtpu
def test_a_step_that_needs_more_memory_than_there_is_says_how_much(config):
    done = plan(f"--config={config}", "--topology=v5e:2x4", "--config.data.batch_size=8192")
    assert done.returncode == 1, done.stderr
    assert "DOES NOT FIT: the compiler needs" in done.stdout and "ESTIMATED" in done.stdout


@pytest.mark.parametrize(
    "message, needed",
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 39.50G of 15.75G hbm. Exceeded", 39.5 * 2**30),
        ("the total memory required for HLO temporaries (2.57T) exceeds available HBM (15.75G).", 2.57 * 2**40),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 30.93M of 16.00M vmem.", None),
    ],
)
def test_the_compilers_messages_about_memory(message, needed):
    assert needed_bytes(message) == needed


def test_a_gpu_cluster_is_estimated_and_says_so(config):
    found = plans.make(Job(config, "h100:2x4"))
    text = as_text(found)
    assert "ESTIMATED from shapes, not compiled" in text and "NVLink" in text
    assert found.as_json()["method"] == found.method
    assert found.chip_hours == pytest.approx(1e12 / (16 * 512) * found.step_seconds * 8 / 3600)


@pytest.mark.parametrize(
    "topology, settings, message",
    [
        ("v5e:3", {}, "v5e is written v5e:XxY"),
        ("v5e:2x2", {}, r"mesh data=2 x fsdp=4 does not fit 4 device"),
        ("h100:1x8", {"data.batch_size": "12"}, "batch_size=12 is not a multiple"),
    ],
)
def test_bad_input_is_said_before_anything_is_compiled(config, topology, settings, message):
    with pytest.raises(UserError, match=message):
        plans.make(Job(config, topology, settings=settings))


def test_less_memory_than_a_device_has_decides_what_fits(config):
    assert plans.make(Job(config, "h100:2x4")).fits
    tight = plans.make(Job(config, "h100:2x4", hbm_bytes=1e6))
    assert not tight.fits and tight.hbm_bytes == 1e6
    with pytest.raises(UserError, match="--hbm_gb=100: a device of h100 has 8"):
        plans.make(Job(config, "h100:2x4", hbm_bytes=100e9))


def test_a_missing_flag_is_one_line():
    done = plan("--topology=v5e:2x4")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --config=FILE and --topology")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--report=scaling", "--slices=2", "--hbm_gb=78"], "--report=scaling has no use for --hbm_gb, --slices"),
        (
            ["--report=deployment", "--config.model.num_layers=4"],
            "--report=deployment has no use for --config.model.num_layers",
        ),
        (["--json=nowhere/plan.json"], "--json=nowhere/plan.json: there is no folder"),
        (["--picture=plan.txt"], "--picture=plan.txt: the name must end in .png"),
    ],
)
def test_flags_that_a_report_would_ignore_and_files_that_could_not_be_written_are_refused_first(flags, message):
    done = plan(*flags)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


def test_a_search_without_a_compiler_says_that_it_estimates(config):
    said = []
    found = plans.search(Job(config, "v5p:2x2x1"), 3, say=said.append, estimated=True)
    assert "ESTIMATED" in found.method and len(said) == 1 and "compiled:" not in said[0]


@libtpu
def test_the_compilers_process_is_bounded_in_time_and_memory(config):
    job = Job(config, "v5e:2x4")
    late = compile_program(job, Bounds(seconds=0.4), lambda seconds, size: None)
    assert (late.measurement is None and "stopped after 0 s" in late.error) or "stopped after 1 s" in late.error
    seen = []
    large = compile_program(job, Bounds(bytes=5e7), lambda seconds, size: seen.append(size))
    assert "GB of this machine's memory" in large.error and max(seen) == large.compiler_bytes > 5e7


@pytest.mark.slow
@libtpu
def test_a_topology_that_the_compiler_refuses_is_one_line(config):
    done = plan(f"--config={config}", "--topology=v6e:3x5", "--config.mesh.fsdp=1", "--config.mesh.data=15")
    assert done.returncode == 2
    assert "refuses topology v6e:3x5" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@libtpu
def test_search_compiles_the_best_of_the_ranking(config):
    done = plan(f"--config={config}", "--topology=v5e:2x2", "--search=1", "--config.mesh.fsdp=2")
    assert done.returncode == 0, done.stderr
    assert "should fit" in done.stdout and "compiled:" in done.stdout and "not compiled:" in done.stdout
    assert "compiled by jax" in done.stdout
