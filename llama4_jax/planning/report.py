"""What a plan says: a measurement or an estimate beside the chip's limits, as text and as JSON."""

import dataclasses
from typing import Any

from llama4_jax.config import Experiment
from llama4_jax.planning.chips import CHIPS, Topology
from llama4_jax.planning.measure import Measurement
from llama4_jax.planning.model_flops import model_flops, tokens_of

TOKENS = 1e12


@dataclasses.dataclass(frozen=True)
class Plan:
    """A program on a topology. Sizes and times are of one device unless they say otherwise.

    Attributes:
        experiment: where the configuration came from.
        program: train, prefill or decode.
        topology, devices, chips: what it runs on.
        mesh: sizes of its axes above 1.
        method: "compiled", with the compiler's versions, or "estimated".
        measurement: see there.
        tokens: of all devices in one run of the program.
        model_flops: that these tokens need, a device's share; see model_flops.py.
        hbm_bytes: the device's HBM.
        step_seconds: at the roofline.
        mfu: model FLOPs over step time and peak.
        chip_hours: for `total_tokens`.
        compile_seconds, compiler_bytes: what compiling took of this machine.
        padding_flops: that kernels do beside the counted ones, because they multiply whole tiles; an expectation, of training.
        needed_bytes: of HBM, as the compiler said when it refused the program for want of it; then all else is estimated.
    """

    experiment: str
    program: str
    topology: str
    devices: int
    chips: int
    mesh: dict[str, int]
    remat: str
    method: str
    measurement: Measurement
    tokens: int
    model_flops: float
    hbm_bytes: float
    step_seconds: float
    mfu: float
    total_tokens: float
    chip_hours: float
    compile_seconds: float = 0.0
    compiler_bytes: float = 0.0
    padding_flops: float = 0.0
    needed_bytes: float | None = None

    @property
    def fits(self) -> bool:
        return self.needed_bytes is None and self.measurement.memory.total <= self.hbm_bytes

    def as_json(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        roofline = self.measurement.roofline
        found["fits"] = self.fits
        found["measurement"]["memory"]["total"] = self.measurement.memory.total
        found["measurement"]["roofline"] |= {"step": roofline.step, "bound": roofline.bound}
        return found


def make_plan(
    name: str,
    experiment: Experiment,
    program: str,
    topology: Topology,
    mesh: dict[str, int],
    measurement: Measurement,
    *,
    method: str,
    total_tokens: float = TOKENS,
    compile_seconds: float = 0.0,
    compiler_bytes: float = 0.0,
    padding_flops: float = 0.0,
    needed_bytes: float | None = None,
) -> Plan:
    tokens = tokens_of(experiment, program)
    needed = model_flops(experiment, program) / topology.devices
    step = measurement.roofline.step
    return Plan(
        experiment=name,
        program=program,
        topology=str(topology),
        devices=topology.devices,
        chips=topology.chips,
        mesh={axis: size for axis, size in mesh.items() if size > 1},
        remat=experiment.execution.remat,
        method=method,
        measurement=measurement,
        tokens=tokens,
        model_flops=needed,
        hbm_bytes=topology.chip.hbm_bytes,
        step_seconds=step,
        mfu=needed / (step * topology.chip.flops),
        total_tokens=total_tokens,
        chip_hours=total_tokens / tokens * step * topology.chips / 3600,
        compile_seconds=compile_seconds,
        compiler_bytes=compiler_bytes,
        padding_flops=padding_flops,
        needed_bytes=needed_bytes,
    )


# ------------------------------------------------------------------------------------------------------------------------
# Text


def as_text(plan: Plan) -> str:
    m = plan.measurement
    blocks = [_head(plan), _memory(plan), _arithmetic(plan), _exchanges(plan), _time(plan)]
    if m.misaligned:
        worst = sorted(m.misaligned, key=m.misaligned.get, reverse=True)[:4]
        more = f" and {len(m.misaligned) - len(worst)} more" if len(m.misaligned) > len(worst) else ""
        blocks.append(f"WARNING: shards that are no multiples of 16, padded to whole tiles: {'; '.join(worst)}{more}")
    if m.loops:
        loops = "; ".join(f"{loop.scope}: {loop.turns:g}" for loop in m.loops)
        blocks.append(f"loops whose turns depend on data, with the turns counted: {loops}")
    return "\n\n".join(blocks)


def _head(plan: Plan) -> str:
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "one device"
    each = "" if plan.chips == plan.devices else f", {plan.devices} devices"
    compiled = (
        f" in {plan.compile_seconds:.0f} s with {gb(plan.compiler_bytes)} of this machine" if plan.compile_seconds else ""
    )
    if plan.needed_bytes is not None:
        compiled = f". DOES NOT FIT: the compiler needs {gb(plan.needed_bytes)} of {gb(plan.hbm_bytes)} HBM"
    return (
        f"{plan.experiment}: {plan.program} on {plan.topology} ({plan.chips:,} chips{each}), mesh {mesh}, remat {plan.remat}\n"
        f"{plan.method}{compiled}; all figures are of one device and one run of the program"
    )


def _memory(plan: Plan) -> str:
    memory = plan.measurement.memory
    rows = [*memory.arguments.items(), ("temporaries", memory.temporaries), ("results", memory.results), ("code", memory.code)]
    rows = [(name, gb(size), f"{size / plan.hbm_bytes:.1%}") for name, size in rows if size]
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    rows.append(("total", gb(memory.total), f"{memory.total / plan.hbm_bytes:.1%} of {gb(plan.hbm_bytes)}: {verdict}"))
    lines = table(("memory", "bytes", "of HBM"), rows)
    largest = ", ".join(f"{b.shape} {gb(b.bytes)} ({b.scope})" for b in plan.measurement.buffers[:4])
    if memory.allocated > 1.01 * memory.temporaries:
        lines += f"\ntemporaries at their peak; with gaps between them the compiler allocated {gb(memory.allocated)}"
    return lines + (f"\nlargest arrays made meanwhile: {largest}" if largest else "")


def _arithmetic(plan: Plan) -> str:
    m = plan.measurement
    rows = [
        ("FLOPs", tera(m.flops), f"of them in kernels {tera(m.kernel_flops)}"),
        ("model FLOPs", tera(plan.model_flops), f"FLOPs / model FLOPs {m.flops / max(plan.model_flops, 1):.3f}"),
        ("HBM traffic", gb(m.hbm_bytes), f"{m.flops / max(m.hbm_bytes, 1):.0f} FLOPs a byte"),
    ]
    if plan.padding_flops:
        ratio = (m.flops + plan.padding_flops) / max(plan.model_flops, 1)
        rows.insert(1, ("tile padding", tera(plan.padding_flops), f"not among them: with it {ratio:.3f} of the model's"))
    return table(("work", "amount", ""), rows)


def _exchanges(plan: Plan) -> str:
    if not plan.measurement.exchanges:
        return "no exchange between devices"
    rows = []
    fast, slow = ("ICI", "DCN") if CHIPS[plan.topology.partition(":")[0]].is_tpu else ("NVLink", "network")
    most = max(e.sent for e in plan.measurement.exchanges)
    shown = [e for e in plan.measurement.exchanges if e.sent >= 1e-3 * most]
    for e in shown[:14]:
        how = "beside work" if e.overlapped else "waiting"
        net = slow if e.slow else fast
        rows.append((e.kind, e.axes, net, f"{e.count:g}", gb(e.sent), ms(e.seconds), how, e.scope))
    left = plan.measurement.exchanges[len(rows) :]
    if left:
        sent, seconds = sum(e.sent for e in left), sum(e.seconds for e in left)
        rows.append((f"{len(left)} others", "", "", f"{sum(e.count for e in left):g}", gb(sent), ms(seconds), "", ""))
    total = sum(e.sent for e in plan.measurement.exchanges)
    rows.append(("total", "", "", "", gb(total), ms(sum(e.seconds for e in plan.measurement.exchanges)), "", ""))
    return table(("exchange", "mesh axes", "over", "times", "sent", "takes", "", "mostly in"), rows)


def _time(plan: Plan) -> str:
    r = plan.measurement.roofline
    rows = [
        ("matrix units alone", ms(r.matmul)),
        ("HBM alone", ms(r.hbm)),
        ("instruction by instruction", ms(r.core)),
        ("waiting for exchanges", ms(r.waiting)),
        ("exchanges inside a slice or node", ms(r.ici)),
        ("exchanges between them", ms(r.dcn)),
        ("run of the program", f"{ms(r.step)}, bound by {r.bound}"),
        ("tokens a second", f"{plan.tokens / r.step:,.0f}, {plan.tokens / r.step / plan.chips:,.4g} a chip"),
        ("MFU at the roofline", f"{plan.mfu:.1%}"),
        (f"chip-hours for {plan.total_tokens:.3g} tokens", f"{plan.chip_hours:,.0f}"),
    ]
    scopes = ", ".join(f"{name} {ms(seconds)}" for name, seconds in list(plan.measurement.scopes.items())[:8])
    return table(("time at published rates", ""), rows) + (f"\nwhere: {scopes}" if scopes else "") + f"\n{PROMISE}"


PROMISE = "Published rates, perfect kernels: real runs are slower. Compare plans with each other, not with a clock."


def gb(size: float) -> str:
    """Bytes."""
    return _scaled(size, ("GB", 1e9), ("MB", 1e6), ("KB", 1e3))


def ms(seconds: float) -> str:
    """A time."""
    return f"{seconds:,.2f} s" if seconds >= 100 else _scaled(seconds, ("ms", 1e-3), ("us", 1e-6))


def tera(flops: float) -> str:
    return _scaled(flops, ("T", 1e12), ("G", 1e9), ("M", 1e6))


def _scaled(value: float, *units: tuple[str, float]) -> str:
    """In the first unit of which there is a tenth."""
    name, unit = next((u for u in units if value >= u[1] / 10), units[-1] if value else units[0])
    return f"{value / unit:,.2f} {name}"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Columns of text; the first and the last stand left, others right where they hold numbers."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    right = [i > 0 and all(line[i][:1].isdigit() or not line[i] for line in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in lines
    )
