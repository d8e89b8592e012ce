"""What a run looked like: loss.png and expert_load.png, drawn from metrics.jsonl."""

from pathlib import Path
from typing import Any


def write_report(records: list[dict[str, Any]], folder: Path, baselines: dict[str, float]) -> None:
    """Writes loss.png and, for a model with experts, expert_load.png.

    Args:
        records: the lines of metrics.jsonl.
        folder: where the pictures go.
        baselines: bits per byte of gzip -9 and xz -9 on the held-out text, drawn beside the model's.
    """
    steps = [record for record in records if "loss" in record]
    if steps:
        _draw_loss(steps, [r for r in records if "bits_per_byte" in r], folder / "loss.png", baselines)
        if "expert_load" in steps[-1]:
            _draw_expert_load(steps, folder / "expert_load.png")


def _draw_loss(steps, evaluations, path: Path, baselines: dict[str, float]) -> None:
    from matplotlib.figure import Figure  # no pyplot: no global state, no window

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([r["step"] for r in steps], [r["cross_entropy"] for r in steps], color="tab:blue", linewidth=1)
    left.set(title="Training", xlabel="step", ylabel="cross entropy, nats a token")
    left.grid(alpha=0.3)
    for name in sorted({r["evaluation"] for r in evaluations}):
        own = [r for r in evaluations if r["evaluation"] == name]
        label = f"{name}: {own[-1]['bits_per_byte']:.3f}"
        right.plot([r["step"] for r in own], [r["bits_per_byte"] for r in own], marker="o", markersize=3, label=label)
    for (name, value), style in zip(baselines.items(), ("--", ":", "-."), strict=False):
        right.axhline(value, color="gray", linestyle=style, linewidth=1, label=f"{name} -9: {value:.3f}")
    right.set(title="Held-out text", xlabel="step", ylabel="bits a byte")
    right.grid(alpha=0.3)
    if right.get_legend_handles_labels()[0]:
        right.legend(frameon=False)
    figure.savefig(path)


def _draw_expert_load(steps, path: Path) -> None:
    import numpy as np
    from matplotlib.figure import Figure

    load = np.array([r["expert_load"] for r in steps if "expert_load" in r])  # [time, layers, E]
    load = load * load.shape[-1]  # 1 is an even share
    step = [r["step"] for r in steps if "expert_load" in r]
    layers, experts = load.shape[1:]
    rows = min(layers, 8)  # deep models: layers spread evenly over the depth
    shown = np.unique(np.linspace(0, layers - 1, rows).round().astype(int))
    figure = Figure(figsize=(9, 1.2 + 1.1 * len(shown)), dpi=120, layout="constrained")
    axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axis, layer in zip(axes, shown, strict=True):
        image = axis.pcolormesh(
            _edges(step), np.arange(experts + 1) - 0.5, load[:, layer].T, cmap="RdBu_r", vmin=0, vmax=2, shading="flat"
        )
        axis.set_ylabel(f"MoE layer {layer}\nexpert", fontsize=8)
        axis.set_yticks([0, experts - 1])
    axes[-1].set_xlabel("step")
    figure.suptitle("Load of each expert, as a multiple of an even share", fontsize=11)
    figure.colorbar(image, ax=axes, extend="max", shrink=0.9)
    figure.savefig(path)


def _edges(step: list[int]):
    """Borders of cells centred on the logged steps."""
    import numpy as np

    middles = (np.array(step[1:]) + np.array(step[:-1])) / 2
    return np.concatenate([[step[0] - 0.5], middles, [step[-1] + 0.5]])
