"""What a run looked like: loss.png and expert_load.png, drawn from metrics.jsonl."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Records = list[dict[str, Any]]  # the lines of metrics.jsonl


def write_report(records: Records, folder: Path, baselines: dict[str, float]) -> None:
    """Writes loss.png and, for a model with experts, expert_load.png. See `loss_figure` and `expert_load_figure`."""
    if any("loss" in record for record in records):
        loss_figure(records, baselines).savefig(folder / "loss.png")
    if any("expert_load" in record for record in records):
        expert_load_figure(records).savefig(folder / "expert_load.png")


def loss_figure(records: Records, baselines: dict[str, float] | None = None) -> Figure:
    """Training loss by step, beside held-out bits per byte.

    Args:
        records: the lines of metrics.jsonl.
        baselines: bits per byte of general compressors on the held-out text, by name, drawn beside the model's.
    """
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "bits_per_byte" in record]
    figure = _figure(10, 4)
    left, right = figure.subplots(1, 2)
    left.plot([r["step"] for r in steps], [r["cross_entropy"] for r in steps], color="tab:blue", linewidth=1)
    left.set(title="Training", xlabel="step", ylabel="cross entropy, nats a token")
    left.grid(alpha=0.3)
    for name in sorted({r["evaluation"] for r in evaluations}):
        own = [r for r in evaluations if r["evaluation"] == name]
        label = f"{name}: {own[-1]['bits_per_byte']:.3f}"
        right.plot([r["step"] for r in own], [r["bits_per_byte"] for r in own], marker="o", markersize=3, label=label)
    for (name, value), style in zip((baselines or {}).items(), ("--", ":", "-."), strict=False):
        right.axhline(value, color="gray", linestyle=style, linewidth=1, label=f"{name} -9: {value:.3f}")
    right.set(title="Held-out text", xlabel="step", ylabel="bits a byte")
    right.grid(alpha=0.3)
    if right.get_legend_handles_labels()[0]:
        right.legend(frameon=False)
    return figure


def expert_load_figure(records: Records) -> Figure:
    """Routing over time, as heat.

    First a row for each MoE layer (at most eight): how each step's choices were spread over the experts. Below, all layers
    in one row each: the busiest expert's load, the router's entropy as a share of the most there can be (an even
    distribution's), and, where any were dropped, the share of choices beyond their expert's capacity.
    """
    records = [record for record in records if "expert_load" in record]
    load = np.array([r["expert_load"] for r in records])  # [time, layers, E]
    layers, experts = load.shape[1:]
    load = load * experts  # 1 is an even share
    shown = np.unique(np.linspace(0, layers - 1, min(layers, 8)).round().astype(int))
    panels = [(f"MoE layer {layer}\nexpert", load[:, layer], {"cmap": "RdBu_r", "vmin": 0, "vmax": 2}) for layer in shown]
    entropy = np.array([r["router_entropy"] for r in records]) / math.log(max(experts, 2))
    dropped = np.array([r["router_drop_share"] for r in records])
    summaries = [
        ("busiest expert\nMoE layer", load.max(axis=-1), {"cmap": "Reds", "vmin": 1, "vmax": max(2.0, load.max())}),
        ("entropy\nMoE layer", entropy, {"cmap": "viridis", "vmin": 0, "vmax": 1}),
        ("dropped\nMoE layer", dropped, {"cmap": "Reds", "vmin": 0, "vmax": dropped.max()}),
    ]
    panels += summaries if dropped.any() else summaries[:2]

    figure = _figure(9, 1.2 + 1.1 * len(panels))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    edges = _edges([r["step"] for r in records])
    for axis, (label, values, colors) in zip(axes, panels, strict=True):  # values: [time, rows]
        rows = values.shape[1]
        image = axis.pcolormesh(edges, np.arange(rows + 1) - 0.5, values.T, shading="flat", **colors)
        axis.set_ylabel(label, fontsize=8)
        axis.set_yticks(sorted({0, rows - 1}))
        figure.colorbar(image, ax=axis, extend="max" if label.startswith("MoE layer") else "neither")
    axes[-1].set_xlabel("step")
    figure.suptitle("Load of the experts, as a multiple of an even share", fontsize=11)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # here, since it takes a second; no pyplot: no global state, no window

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _edges(step: list[int]) -> np.ndarray:
    """Borders of cells centred on the logged steps."""
    middles = (np.array(step[1:]) + np.array(step[:-1])) / 2
    return np.concatenate([[step[0] - 0.5], middles, [step[-1] + 0.5]])
