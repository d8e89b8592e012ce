"""The roofline applied to runs whose speed was published: how far below it real programs run.

    python -m llama4_jax.plan --report=calibration

What is printed is the estimate's error, in the open. None of these programs is this project's: they are MaxText's, of the
shapes and meshes that its recipes tell; where a recipe does not tell, all chips are on fsdp, a chip has 16,384 tokens, and
layers are recomputed ("assumed" in the table).
"""

import dataclasses
import statistics

from llama4_jax.config import DataConfig, ExecutionConfig, Experiment, MeshConfig, ModelConfig
from llama4_jax.named_configs import named_config
from llama4_jax.planning.analytic import estimate
from llama4_jax.planning.chips import parse_topology
from llama4_jax.planning.report import Plan, make_plan, table


@dataclasses.dataclass(frozen=True)
class Run:
    """A published one.

    Attributes:
        rows: of each chip.
        speed: tokens a second and chip, as published.
        assumed: whether mesh and rows were not told.
    """

    name: str
    model: ModelConfig
    topology: str
    mesh: MeshConfig
    length: int
    rows: int
    speed: float
    source: str
    assumed: bool = True


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Attributes:
    predicted: tokens a second and chip at the roofline.
    share: of it that was published.
    error: of the prediction scaled by the median share of all runs: 0.1 is 10% too fast.
    """

    run: Run
    plan: Plan
    predicted: float
    share: float
    error: float


def compare(runs: list[Run] | None = None) -> list[Comparison]:
    """Every published run beside the roofline."""
    runs = published_runs() if runs is None else runs
    plans = [_plan(run) for run in runs]
    speeds = [plan.tokens / plan.step_seconds / plan.chips for plan in plans]
    shares = [run.speed / speed for run, speed in zip(runs, speeds, strict=True)]
    middle = statistics.median(shares)
    return [
        Comparison(run, plan, speed, share, middle / share - 1)
        for run, plan, speed, share in zip(runs, plans, speeds, shares, strict=True)
    ]


def as_text(comparisons: list[Comparison]) -> str:
    rows = [
        (
            c.run.name,
            c.run.topology,
            " ".join(f"{axis}={size}" for axis, size in c.plan.mesh.items()) + (" (assumed)" if c.run.assumed else ""),
            f"{c.run.speed:,.0f}",
            f"{c.predicted:,.0f}",
            f"{c.share:.0%}",
            f"{c.error:+.0%}",
            c.plan.measurement.roofline.bound,
            c.run.source,
        )
        for c in comparisons
    ]
    header = ("run", "topology", "mesh", "published", "roofline", "share", "error", "bound by", "source")
    shares, errors = [c.share for c in comparisons], [abs(c.error) for c in comparisons]
    return (
        f"tokens a second and chip, published and at the roofline (estimated from shapes)\n{table(header, rows)}\n"
        f"published runs reach {min(shares):.0%} to {max(shares):.0%} of the roofline, {statistics.median(shares):.0%} in the "
        f"middle; with that one factor the prediction is off by {statistics.median(errors):.0%} in the middle, "
        f"{max(errors):.0%} at most"
    )


def published_runs() -> list[Run]:
    recipes = "github.com/AI-Hypercomputer/tpu-recipes"
    tiers = "MaxText docs/reference/models/tiering.md"
    scout, maverick = (dataclasses.replace(named_config(name), vision=None) for name in ("scout-17b-16e", "maverick-17b-128e"))
    on_all = MeshConfig(fsdp=-1, data=1)
    llama70, llama405 = _llama3(8192, 80, 64, 28_672), _llama3(16_384, 126, 128, 53_248)
    mixtral = _dense(32_000, 4096, 32, 32, 14_336, experts=8)
    return [
        Run("Llama 4 Scout", scout, "v5p:4x4x8", on_all, 8192, 8, 2070, f"{recipes} v5p", False),
        Run(
            "Llama 4 Maverick",
            maverick,
            "v5p:4x4x8",
            MeshConfig(data=1, fsdp=32, tensor=4),
            8192,
            4,
            1322,
            f"{recipes} v5p",
            False,
        ),
        Run("Mixtral 8x7B", mixtral, "v5p:4x8x8", on_all, 4096, 4, 2909, tiers),
        Run("Llama 2 70B", _dense(32_000, 8192, 80, 64, 28_672), "v5p:8x8x8", on_all, 4096, 4, 692, tiers),
        Run("Llama 3.1 405B", llama405, "v5p:8x8x8", on_all, 8192, 2, 124.6, f"{recipes} v5p"),
        Run("Llama 3.1 8B", _llama3(4096, 32, 32, 14_336), "v6e:16x16", on_all, 8192, 2, 7207, f"{recipes} trillium"),
        Run("Llama 3.1 70B", llama70, "v6e:16x16", on_all, 8192, 2, 960, f"{recipes} trillium"),
        Run("Mixtral 8x7B", mixtral, "v6e:16x16", on_all, 4096, 4, 3645, tiers),
        Run("Mixtral 8x22B", _dense(32_768, 6144, 56, 48, 16_384, experts=8), "v6e:16x16", on_all, 4096, 4, 1326, tiers),
        Run("Llama 3.1 70B", llama70, "tpu7x:4x4x4", on_all, 8192, 2, 2687, f"{recipes} ironwood"),
        Run("Llama 3.1 405B", llama405, "tpu7x:4x8x8", on_all, 8192, 2, 500, f"{recipes} ironwood"),
    ]


def _dense(vocab: int, width: int, layers: int, heads: int, ffn: int, experts: int = 0) -> ModelConfig:
    """A Llama of before 4, or a Mixtral with `experts`, two for each token."""
    moe = {"num_experts": experts, "experts_per_token": 2, "expert_ffn_size": ffn, "moe_interval": 1} if experts else {}
    return ModelConfig(
        vocab_size=vocab, hidden_size=width, num_layers=layers, num_heads=heads, dense_ffn_size=ffn, shared_expert=False,
        **({"moe_interval": 0} | moe), nope_interval=0, attention_chunk_size=None, qk_norm=False, temperature=None,
    )  # fmt: skip


def _llama3(width: int, layers: int, heads: int, ffn: int) -> ModelConfig:
    return _dense(128_256, width, layers, heads, ffn)


def _plan(run: Run) -> Plan:
    topology = parse_topology(run.topology)
    experiment = Experiment(
        model=run.model,
        data=DataConfig(sources=("published",), sequence_length=run.length, batch_size=run.rows * topology.chips),
        execution=ExecutionConfig(compute_dtype="bfloat16", remat="layer"),
        mesh=run.mesh,
    )
    found = estimate(experiment, topology)
    sizes = {"data": 1, **{a: s for a, s in dataclasses.asdict(run.mesh).items() if s > 1}}
    if run.mesh.fsdp == -1:
        sizes["fsdp"] = topology.devices
    return make_plan(run.name, experiment, "train", topology, sizes, found, method="ESTIMATED")
