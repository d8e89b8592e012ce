"""The kernels that the tool knows by name: the bars (jax's own) and this package's."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.aot import Case
from pallas_kernels.attention import shapes as attention
from pallas_kernels.decode_attention import shapes as decode
from pallas_kernels.decode_attention.tpu import BLOCK as DECODE_BLOCK
from pallas_kernels.grouped_matmul import columns as columns_product
from pallas_kernels.grouped_matmul import shapes as grouped
from pallas_kernels.grouped_matmul import tiling
from pallas_kernels.ring_attention import shapes as ring
from pallas_kernels.routing import shapes as routing
from pallas_kernels.routing import tpu as router


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Attributes:
    build: the case to compile; see `aot.Request`.
    listing: the kernel's name in the compiler's listing.
    tile: what one tile is, in words.
    macs: multiply-accumulates that one tile asks for.
    steps: grid steps that share what is guarded and holds no matrix work (a cleared accumulator, a finished output); None:
        a tile with work never runs it.
    trips: of the loops without constant bounds, in the order of the listing: how often they run in a grid step, on average.
    """

    build: Callable[[Sequence], Case]
    listing: str
    tile: str
    macs: int
    steps: int | None
    trips: tuple[int | float, ...] = ()


def _abstract(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _megablox(M: int, D: int, F: int, G: int, tiling: tuple[int, int, int]) -> Kernel:
    def build(devices):
        from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

        def function(lhs, rhs, sizes):
            return gmm(lhs, rhs, sizes, preferred_element_type=jnp.bfloat16, tiling=tiling)

        return Case(function, (_abstract(M, D), _abstract(G, D, F), _abstract(G, dtype=jnp.int32)))

    m, k, n = tiling
    return Kernel(build, "gmm", f"{m}x{k}x{n} of [{M},{D}]x[{G},{D},{F}]", m * k * n, D // k)


def _megablox_gradient(M: int, D: int, F: int, G: int, tiling: tuple[int, int, int]) -> Kernel:
    def build(devices):
        from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

        def function(lhs, dout, sizes):
            return tgmm(lhs.T, dout, sizes, preferred_element_type=jnp.bfloat16, tiling=tiling)

        return Case(function, (_abstract(M, D), _abstract(M, F), _abstract(G, dtype=jnp.int32)))

    m, k, n = tiling
    tile = f"{k}x{m}x{n} of [{M},{D}]^T x [{M},{F}] for each of {G} groups"
    return Kernel(build, "tgmm", tile, m * k * n, M // G // m + 1)


def _splash(T: int, heads: int, H: int, q: int, kv: int, compute: int, *, backward: bool = False) -> Kernel:
    def build(devices):
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        sizes = splash.BlockSizes(
            block_q=q,
            block_kv=kv,
            block_kv_compute=compute,
            block_q_dkv=q,
            block_kv_dkv=kv,
            block_kv_dkv_compute=compute,
            use_fused_bwd_kernel=True,
        )
        mask = masks.MultiHeadMask([masks.CausalMask((T, T)) for _ in range(heads)])
        kernel = splash.make_splash_mqa_single_device(mask, block_sizes=sizes)

        def gradients(query, key, value, dout):
            return jax.vjp(kernel, query, key, value)[1](dout)

        arguments = (_abstract(heads, T, H), _abstract(T, H), _abstract(T, H))
        return Case(gradients, (*arguments, arguments[0])) if backward else Case(kernel, arguments)

    products = 5 if backward else 2
    listing = "splash_mqa_dkv_no_residuals" if backward else "splash_mqa_fwd_no_residuals"
    tile = f"{q}x{kv} scores ({compute} keys at a time), head size {H}, T = S = {T}, {heads} query heads of one KV head"
    return Kernel(build, listing, tile, products * q * kv * H, T // kv)


def _grouped(op: str, shape: str = "scout", weights: str = "bfloat16", block: int = 0) -> Kernel:
    size, halves = grouped.SHAPES[shape], 2 if op == "grouped_swiglu" else 1
    stored = {"stored": {"int8": 1, "int4": 0.5}[weights] + 4 / block, "units": (8 * block, 128)} if block else {}
    tiles = tiling.choose(size.M, size.D, size.F, 2, matrices=halves, **stored)
    tile = f"{tiles.rows}x{size.D}x{tiles.columns * halves} of [{size.M},{size.D}]x[{size.G},{size.D},{size.F * halves}]"
    tile += f" in {weights}, a scale for {block}" if block else ""
    build = functools.partial(grouped.case, shape=shape, op=op, weights=weights, block=block)
    return Kernel(build, op, tile, tiles.rows * size.D * tiles.columns * halves, None)


def _grouped_gradients(lhs: bool, shape: str = "scout") -> Kernel:
    size = grouped.SHAPES[shape]
    build = functools.partial(grouped.case, shape=shape, gradients=True)
    if lhs:
        tiles = tiling.choose(size.M, size.F, size.D, 2)
        tile = f"{tiles.rows}x{size.F}x{tiles.columns} of [{size.M},{size.F}]x[{size.G},{size.D},{size.F}]^T"
        return Kernel(build, "grouped_matmul_transposed", tile, tiles.rows * size.F * tiles.columns, None)
    rows, columns, piece = dataclasses.astuple(columns_product.TILING)
    tile = f"{piece}x{rows}x{columns} of [{size.M},{size.D}]^T x [{size.M},{size.F}] for each of {size.G} groups"
    return Kernel(build, "grouped_matmul_gradient", tile, rows * columns * piece, None)


def _routing(name: str, shape: str) -> Kernel:
    size = routing.SHAPES[shape]
    if name == "route":
        tile = f"{router.TILE} tokens, {size.X} of {size.E} experts"  # its matrix work counts earlier tokens
        return Kernel(functools.partial(routing.case, shape=shape), name, tile, size.E * router.TILE**2, None)
    gradients = name != "move_rows"
    build = functools.partial(routing.moving, shape=shape, gradients=gradients)
    return Kernel(build, name, f"192 rows of {size.D} in bfloat16", 0, None)


def _attention() -> Kernel:
    """A block of 1,024 of 8,192 queries, causal: the ith has i / 2 tiles of 1024x2048 before it, rounded down, and in masked
    tiles of 512x512 what is left of them and the diagonal."""
    tile = "for a block of 1024 queries: 1.5 times 1024x2048 and 6 times 512x512 scores, head size 128, T = S = 8192"
    build = functools.partial(attention.case, shape="group")
    return Kernel(build, "attention", tile, 2 * 128 * 8192 * 8193 // 2 // 8, 1, (1.5, 3))


def _attention_backward() -> Kernel:
    """A block of 512 of 8,192 queries of five heads, causal: one masked tile, and before the ith block i whole ones."""
    tile = "for a block of 512 queries of 5 heads: 1 masked and 7.5 whole times 2560x512 scores, head size 128, T = S = 8192"
    macs, blocks = 5 * 128 * 5 * 8192 * 8193 // 2, 16
    clear, write = 16, 16  # blocks of keys, once for a KV head
    return Kernel(attention.backward_case, "attention_backward", tile, macs // blocks, blocks, (clear, 1, 7.5, write))


def _ring_attention() -> Kernel:
    """The same block in a shard's own part of the row, while keys and values travel."""
    build = functools.partial(ring.case, shape="group")
    return dataclasses.replace(_attention(), build=build)


def _decode(shape: str, eight_bits: bool = False) -> Kernel:
    size = decode.SHAPES[shape]
    build = functools.partial(decode.case, shape=shape, eight_bits=eight_bits)
    slots = DECODE_BLOCK // size.K
    tile = f"{slots} of {size.S} slots of {size.K} {'8-bit ' if eight_bits else ''}heads, {size.T} queries of {size.N} heads"
    return Kernel(build, "decode_attention", tile, 2 * size.T * size.N * slots * size.H, size.S // slots)


KERNELS: dict[str, Kernel] = {
    "grouped_matmul": _grouped("grouped_matmul"),
    "grouped_swiglu": _grouped("grouped_swiglu"),
    "grouped_matmul_int8": _grouped("grouped_matmul", weights="int8", block=128),
    "grouped_matmul_int4": _grouped("grouped_matmul", weights="int4", block=32),
    "grouped_swiglu_int8": _grouped("grouped_swiglu", weights="int8", block=128),
    "grouped_matmul_dlhs": _grouped_gradients(lhs=True),
    "grouped_matmul_drhs": _grouped_gradients(lhs=False),
    "route": _routing("route", "scout"),
    "route_maverick": _routing("route", "maverick"),
    "move_rows": _routing("move_rows", "scout"),
    "move_rows_back": _routing("move_rows_and_scores_gradient", "scout"),
    "decode_attention": _decode("full"),
    "decode_attention_int8": _decode("full", eight_bits=True),
    "megablox": _megablox(8192, 5120, 8192, 16, (512, 1024, 1024)),
    "megablox_drhs": _megablox_gradient(8192, 5120, 8192, 16, (512, 1024, 1024)),
    "attention": _attention(),
    "attention_backward": _attention_backward(),
    "ring_attention": _ring_attention(),
    "splash": _splash(8192, 5, 128, 512, 1024, 1024),
    "splash_large": _splash(8192, 5, 128, 1024, 2048, 1024),
    "splash_backward": _splash(8192, 5, 128, 512, 1024, 1024, backward=True),
}


def case(devices: Sequence, op: str) -> Case:
    """The case of the kernel called `op`, for `aot.compile_for`."""
    return KERNELS[op].build(devices)
