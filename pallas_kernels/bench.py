"""`python -m pallas_kernels.bench --op=grouped_matmul,attention --shape=scout`: kernels beside their peers on this device.

Each row is the time of one contender, forward or with all gradients, and the share of the peak: what one large matrix product
of the same dtype reaches in the same run. Peers that are not installed, or that refuse the shape, are listed with the reason.
Peers are XLA (`lax.ragged_dot`, attention as this package's XLA form), cuDNN (`jax.nn.dot_product_attention`, whose chunks are
a mask or, where they allow it, rows of their own) and tokamax.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.attention import Mask, attention
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the contenders compute: `contender(*arguments)`, of which `trained` arguments get gradients."""

    name: str
    arguments: tuple
    trained: int
    flops: float  # forward
    contenders: dict[str, Callable]


@dataclasses.dataclass(frozen=True)
class Row:
    problem: str
    contender: str
    gradients: bool
    milliseconds: float | None
    share_of_peak: float | None
    refused: str | None = None


SHAPES = {  # rows, D, F, groups; tokens of a row, heads, KV heads, head size
    "scout": ((8192, 5120, 8192, 16), (16384, 40, 8, 128)),
    "maverick": ((8192, 5120, 8192, 128), (16384, 40, 8, 128)),
    "tiny": ((64, 32, 48, 4), (64, 2, 1, 16)),
}


def grouped(op: str, shape: str) -> Problem:
    M, D, F, G = SHAPES[shape][0]
    draw = lambda i, *size: jax.random.normal(jax.random.key(i), size).astype(jnp.bfloat16)  # noqa: E731
    # Shares of 1 to 3, as a balanced router's are not quite equal.
    weights = 1 + 2 * jax.random.uniform(jax.random.key(3), (G,))
    edges = jnp.round(jnp.cumsum(weights) / weights.sum() * M).astype(jnp.int32)
    sizes = jnp.diff(edges, prepend=0)
    halves = 2 if op == "grouped_swiglu" else 1
    function = grouped_swiglu if halves == 2 else grouped_matmul
    arguments = draw(0, M, D), draw(1, G, *[2] * (halves == 2), D, F) * D**-0.5, sizes
    names = [name for name in (dispatch.platform(), "xla", "tokamax") if name != "cpu"]
    contenders = {name: partial(function, implementation=name) for name in names}
    return Problem(f"{op} [{M},{D}]x[{G},{D},{F}]", arguments, 2, 2.0 * M * D * F * halves, contenders)


def attend(shape: str, chunk: int | None) -> Problem:
    T, N, K, H = SHAPES[shape][1]
    chunk = chunk and min(chunk, T // 2)
    draw = lambda i, heads: jax.random.normal(jax.random.key(i), (1, T, heads, H)).astype(jnp.bfloat16)  # noqa: E731
    ours = lambda name: lambda *x: attention(*x, Mask(chunk=chunk), implementation=name)  # noqa: E731
    contenders = {name: ours(name) for name in (dispatch.platform(), "xla") if name != "cpu"}
    contenders["cudnn"] = _cudnn(chunk, masked=False)
    if chunk:
        contenders["cudnn, a mask"] = _cudnn(chunk, masked=True)
    pairs = T * ((chunk or T) + 1) / 2
    name = f"attention T={T}, {N} heads of {K}, H={H}, " + (f"chunks of {chunk}" if chunk else "causal")
    return Problem(name, (draw(0, N), draw(1, K), draw(2, K)), 3, 4.0 * pairs * N * H, contenders)


def _cudnn(chunk: int | None, masked: bool) -> Callable:
    def attend(query, key, value):
        cudnn = partial(jax.nn.dot_product_attention, implementation="cudnn", is_causal=True)
        if chunk is None:
            return cudnn(query, key, value)
        if masked:
            window = jnp.arange(query.shape[1]) // chunk
            return cudnn(query, key, value, mask=(window[:, None] == window[None])[None, None])
        rows = [x.reshape(-1, chunk, *x.shape[2:]) for x in (query, key, value)]
        return cudnn(*rows).reshape(query.shape)

    return attend


PROBLEMS: dict[str, Callable[[str], Problem]] = {
    "grouped_matmul": partial(grouped, "grouped_matmul"),
    "grouped_swiglu": partial(grouped, "grouped_swiglu"),
    "attention": partial(attend, chunk=None),
    "chunked_attention": partial(attend, chunk=8192),
}


def measure(problem: Problem, peak: float, repeats: int) -> list[Row]:
    rows = []
    for name, contender in problem.contenders.items():
        for gradients in (False, True):
            function = jax.jit(_with_gradients(contender, problem.trained) if gradients else contender)
            try:
                seconds = _seconds(function, problem.arguments, repeats)
            except Exception as refused:
                reason = f"{type(refused).__name__}: {refused}".splitlines()[0][:120]
                rows.append(Row(problem.name, name, gradients, None, None, reason))
                continue
            flops = problem.flops * (3 if gradients else 1)
            rows.append(Row(problem.name, name, gradients, 1e3 * seconds, flops / seconds / peak))
    return rows


def _with_gradients(function: Callable, trained: int) -> Callable:
    """The result and its gradients, for an upstream gradient of ones."""

    def both(*arguments):
        out, back = jax.vjp(lambda *first: function(*first, *arguments[trained:]), *arguments[:trained])
        return out, back(jnp.ones_like(out))

    return both


def _seconds(function: Callable, arguments: tuple, repeats: int) -> float:
    """The median of `repeats` runs, after one that compiles and one that warms up."""
    for _ in range(2):
        jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measured_peak(size: int, repeats: int) -> float:
    """FLOP/s of one bfloat16 product of matrices of `size`."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)  # a GPU multiplies constants faster
    return 2.0 * size**3 / _seconds(jax.jit(jnp.dot), (a, a), repeats)


def main() -> int:
    parser = argparse.ArgumentParser(prog="pallas_kernels.bench", description="Kernels beside their peers on this device.")
    parser.add_argument("--op", default=",".join(PROBLEMS), help=f"of {', '.join(PROBLEMS)}; separated by commas")
    parser.add_argument("--shape", default="scout", choices=SHAPES)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="rows as JSON, instead of a table")
    flags = parser.parse_args()
    with contextlib.suppress(ImportError):  # tokamax reads absl's flags, which must not be ours
        importlib.import_module("absl.flags").FLAGS(sys.argv[:1])
    if unknown := set(flags.op.split(",")) - set(PROBLEMS):
        print(f"pallas_kernels.bench: no op {', '.join(sorted(unknown))}; choose from {', '.join(PROBLEMS)}", file=sys.stderr)
        return 2
    size = 256 if flags.shape == "tiny" else 8192
    peak = measured_peak(size, flags.repeats)
    device = jax.devices()[0].device_kind
    rows = [row for op in flags.op.split(",") for row in measure(PROBLEMS[op](flags.shape), peak, flags.repeats)]
    if flags.json:
        record = {"device": device, "jax": jax.__version__, "peak_flops": peak, "rows": [dataclasses.asdict(r) for r in rows]}
        print(json.dumps(record, indent=1))
        return 0
    print(f"{device}, jax {jax.__version__}: one product of {size}^3 reaches {peak / 1e12:.3g} TFLOP/s")
    for row in rows:
        what = "with gradients" if row.gradients else "forward"
        figures = row.refused or f"{row.milliseconds:9.3f} ms {row.share_of_peak:7.1%} of peak"
        print(f"{row.problem:55s} {row.contender:15s} {what:15s} {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
