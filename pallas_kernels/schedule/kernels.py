"""The kernels that the tool knows by name: the bars (jax's own) and this package's."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.aot import Case


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Attributes:
    build: the case to compile; see `aot.Request`.
    listing: how the kernel's name begins in the compiler's listing.
    tile: what one tile is, in words.
    macs: multiply-accumulates that one tile asks for.
    steps: grid steps that share what happens once (a cleared accumulator, a finished output).
    """

    build: Callable[[Sequence], Case]
    listing: str
    tile: str
    macs: int
    steps: int


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
    listing = "splash_mqa_dkv" if backward else "splash_mqa_fwd"
    tile = f"{q}x{kv} scores ({compute} keys at a time), head size {H}, T = S = {T}, {heads} query heads of one KV head"
    return Kernel(build, listing, tile, products * q * kv * H, T // kv)


KERNELS: dict[str, Kernel] = {
    "megablox": _megablox(8192, 5120, 8192, 16, (512, 1024, 1024)),
    "splash": _splash(8192, 5, 128, 512, 1024, 1024),
    "splash_large": _splash(8192, 5, 128, 1024, 2048, 1024),
    "splash_backward": _splash(8192, 5, 128, 512, 1024, 1024, backward=True),
}


def case(devices: Sequence, op: str) -> Case:
    """The case of the kernel called `op`, for `aot.compile_for`."""
    return KERNELS[op].build(devices)
