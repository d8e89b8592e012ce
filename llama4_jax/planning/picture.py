"""A plan as a picture: memory, time, and bytes on the wires."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama4_jax.planning.report import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plan_figure(plan: Plan) -> Figure:
    """Three panels of one device: HBM by kind against what there is; time by unit; bytes sent along each mesh axis."""
    figure = new_figure(13, 4.2)
    memory, time, sent = figure.subplots(1, 3, width_ratios=(1, 1.6, 1.6))
    _memory(memory, plan)
    _time(time, plan)
    _sent(sent, plan)
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    how = "estimated" if plan.method.startswith("ESTIMATED") else "compiled"
    figure.suptitle(f"{plan.experiment}: {plan.program} on {plan.topology}, mesh {mesh} ({how})", fontsize=11)
    return figure


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # here, since it takes a second; no pyplot: no global state, no window

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _memory(axes, plan: Plan) -> None:
    memory, bottom = plan.measurement.memory, 0.0
    parts = {**memory.arguments, "temporaries": memory.temporaries, "results": memory.results, "code": memory.code}
    for name, size in parts.items():
        if size >= 0.002 * plan.hbm_bytes:
            axes.bar([0], [size / 1e9], bottom=bottom, label=f"{name}: {size / 1e9:.1f}", width=0.6)
            bottom += size / 1e9
    axes.axhline(plan.hbm_bytes / 1e9, color="black", linestyle="--", linewidth=1)
    axes.annotate("HBM", (1.0, plan.hbm_bytes / 1e9), va="bottom")
    axes.set(title="Memory, GB", xticks=[], xlim=(-0.4, 1.4))
    axes.legend(frameon=False, fontsize=8, loc="center right")


def _time(axes, plan: Plan) -> None:
    r = plan.measurement.roofline
    rows = {
        "matrix units": r.matmul, "HBM": r.hbm, "core": r.core, "waiting": r.waiting, "ICI": r.ici, "DCN": r.dcn, "step": r.step
    }  # fmt: skip
    names = list(rows)[::-1]
    axes.barh(names, [rows[name] * 1e3 for name in names], color=["tab:blue" if n != "step" else "tab:orange" for n in names])
    axes.set(title=f"Time at published rates, ms: MFU {plan.mfu:.0%}, {r.bound}")
    axes.grid(axis="x", alpha=0.3)


def _sent(axes, plan: Plan) -> None:
    kinds = sorted({e.kind for e in plan.measurement.exchanges})
    along: dict[str, dict[str, float]] = {}
    for e in plan.measurement.exchanges:
        by_kind = along.setdefault(f"{e.axes}{' (DCN)' if e.slow else ''}", {})
        by_kind[e.kind] = by_kind.get(e.kind, 0.0) + e.sent / 1e9
    names = sorted(along, key=lambda name: sum(along[name].values()))[-8:]
    left = [0.0] * len(names)
    for kind in kinds:
        values = [along[name].get(kind, 0.0) for name in names]
        axes.barh(names, values, left=left, label=kind)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set(title="Sent along mesh axes, GB")
    axes.grid(axis="x", alpha=0.3)
    if kinds:
        axes.legend(frameon=False, fontsize=8)
