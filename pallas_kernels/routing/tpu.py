"""Routing as one Pallas kernel for TPU.

Experts lie along sublanes and tokens along lanes: then every reduction over experts is one of whole registers, and the
outputs are dense. The grid walks along the tiles of tokens, twice. On the first walk each tile is read, and chosen for; how
many earlier tokens chose the same expert is the count so far, plus a product with a triangle of ones, which bfloat16 and
float32 sums do exactly. The second walk only adds to that rank, kept in VMEM, where the expert's rows begin.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.routing.decision import Route

TILE = 512  # tokens
MAX_PAIRS_BYTES = 32 * 2**20  # of VMEM for experts and ranks of all choices, between the two walks


def route(logits, num_choices, bias, valid, *, tile: int = TILE, interpret=False):
    """See `api.route`.

    Args:
        tile: tokens, a multiple of 128.
        interpret: as in `pl.pallas_call`.

    Raises:
        NotImplementedError: more choices than VMEM has room for.
    """
    M, _ = logits.shape
    if -(-M // tile) * tile * -(-num_choices // 8) * 64 > MAX_PAIRS_BYTES:
        raise NotImplementedError(f"route on TPU: {M} tokens with {num_choices} choices each do not fit into VMEM; split them")
    if not M:
        from pallas_kernels.routing import reference

        return reference.route(logits, num_choices, bias, valid)
    return Route(**_route(logits, bias, valid, num_choices, tile, interpret))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _route(logits, bias, valid, X, tile, interpret):
    M, E = logits.shape
    tiles = -(-M // tile)
    once = lambda walk, i: (0, i * (1 - walk) + (tiles - 1) * walk)  # noqa: E731
    fixed = lambda walk, i: (0, 0)  # noqa: E731
    tokens = pl.BlockSpec((X, tile), once)
    bias_ = jnp.zeros((E, 1)) if bias is None else bias.astype(jnp.float32)[:, None]
    beside = [] if valid is None else [valid.astype(jnp.int32)[None]]  # [1, M]
    experts, scores, place, group_sizes, probabilities, means = pl.pallas_call(
        functools.partial(_kernel, M=M, tiles=tiles),
        out_shape=(
            jax.ShapeDtypeStruct((X, M), jnp.int32),
            jax.ShapeDtypeStruct((X, M), jnp.float32),
            jax.ShapeDtypeStruct((X, M), jnp.int32),
            jax.ShapeDtypeStruct((E, 1), jnp.int32),
            jax.ShapeDtypeStruct((E, 1), jnp.float32),
            jax.ShapeDtypeStruct((2, 1), jnp.float32),
        ),
        grid=(2, tiles),
        in_specs=[
            pl.BlockSpec((E, tile), once),
            pl.BlockSpec((E, 1), fixed),
            *(pl.BlockSpec((1, tile), once) for _ in beside),
        ],
        out_specs=(
            tokens,
            tokens,
            pl.BlockSpec((X, tile), lambda walk, i: (0, i * walk)),
            pl.BlockSpec((E, 1), fixed),
            pl.BlockSpec((E, 1), fixed),
            pl.BlockSpec((2, 1), fixed),
        ),
        scratch_shapes=[
            pltpu.VMEM((tiles, X, tile), jnp.int32),  # experts
            pltpu.VMEM((tiles, X, tile), jnp.int32),  # ranks
            pltpu.VMEM((E, 1), jnp.float32),  # choices so far
            pltpu.VMEM((E, tile), jnp.float32),  # probabilities so far, lane by lane
            pltpu.VMEM((2, tile), jnp.float32),  # entropy and z-loss so far
            pltpu.VMEM((tile, tile), jnp.bfloat16),  # ones above the diagonal
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=interpret,
        name="route",
    )(logits.astype(jnp.float32).T, bias_, *beside)
    total = jnp.maximum(group_sizes.sum(), 1)
    tokens = jnp.maximum(group_sizes.sum() // X, 1).astype(jnp.float32)
    return dict(
        experts=experts.T,
        scores=scores.T,
        place=place.T,
        group_sizes=group_sizes[:, 0],
        load=group_sizes[:, 0] / total,
        probabilities=probabilities[:, 0] / tokens,
        entropy=means[0, 0] / tokens,
        z_loss=means[1, 0] / tokens,
    )


def _kernel(logits, bias, *refs, M: int, tiles: int):
    beside, outputs, scratch = refs[:-12], refs[-12:-6], refs[-6:]
    experts_out, scores_out, place_out, sizes_out, probabilities_out, means_out = outputs
    experts_kept, ranks_kept, counts, probabilities, means, triangle = scratch
    walk, i = pl.program_id(0), pl.program_id(1)
    (E, tile), X = logits.shape, experts_out.shape[0]
    expert = jax.lax.broadcasted_iota(jnp.int32, (E, tile), 0)

    @pl.when((walk == 0) & (i == 0))
    def _start():
        earlier, later = (jax.lax.broadcasted_iota(jnp.int32, (tile, tile), axis) for axis in (0, 1))
        triangle[...] = (earlier < later).astype(jnp.bfloat16)
        for sums in (counts, probabilities, means):
            sums[...] = jnp.zeros_like(sums)

    @pl.when(walk == 0)
    def _choose():
        inside = i * tile + jax.lax.broadcasted_iota(jnp.int32, (1, tile), 1) < M
        counted = inside if not beside else inside & (beside[0][...] != 0)
        values = jnp.where(inside, logits[...], 0.0)
        ranked = values + bias[...]
        ranked = jnp.where(ranked == ranked, ranked, jnp.inf)  # a NaN must not choose an expert twice
        taken = jnp.zeros((E, tile), bool)
        for x in range(X):
            best = jnp.max(jnp.where(taken, -jnp.inf, ranked), axis=0, keepdims=True)
            first = jnp.where(~taken & (ranked == best), expert, E)
            chosen = jnp.min(first, axis=0, keepdims=True)
            mine = expert == chosen
            taken = taken | mine
            experts_out[x : x + 1] = chosen
            experts_kept[i, x : x + 1] = chosen
            scores_out[x : x + 1] = jax.nn.sigmoid(jnp.sum(jnp.where(mine, values, 0.0), axis=0, keepdims=True))

        taken = (taken & counted).astype(jnp.float32)
        dimensions = (((1,), (0,)), ((), ()))
        before = jax.lax.dot_general(taken.astype(jnp.bfloat16), triangle[...], dimensions, preferred_element_type=jnp.float32)
        before = before.astype(jnp.int32) + counts[...].astype(jnp.int32)
        for x in range(X):
            rank = jnp.sum(jnp.where(expert == experts_kept[i, x : x + 1], before, 0), axis=0, keepdims=True)
            ranks_kept[i, x : x + 1] = jnp.where(counted, rank, -1)
        counts[...] += jnp.sum(taken, axis=1, keepdims=True)

        top = jnp.max(values, axis=0, keepdims=True)
        powers = jnp.exp(values - top)
        total = jnp.sum(powers, axis=0, keepdims=True)
        log_total = jnp.log(total)
        p = powers / total
        entropy = -jnp.sum(p * (values - top - log_total), axis=0, keepdims=True)
        probabilities[...] += jnp.where(counted, p, 0.0)
        means[0:1] += jnp.where(counted, entropy, 0.0)
        means[1:2] += jnp.where(counted, jnp.square(top + log_total), 0.0)

    @pl.when(walk == 1)
    def _place():
        kept, rank = experts_kept[i], ranks_kept[i]
        begin = jnp.zeros((X, tile), jnp.int32)
        for e in range(E - 1):
            begin += jnp.where(kept > e, counts[e : e + 1].astype(jnp.int32), 0)
        place_out[...] = jnp.where(rank < 0, M * X, begin + rank)

    @pl.when((walk == 1) & (i == tiles - 1))
    def _finish():
        sizes_out[...] = counts[...].astype(jnp.int32)
        probabilities_out[...] = jnp.sum(probabilities[...], axis=1, keepdims=True)
        means_out[...] = jnp.sum(means[...], axis=1, keepdims=True)


def _forward(logits, bias, valid, X, tile, interpret):
    out = _route(logits, bias, valid, X, tile, interpret)
    return out, (logits, valid, bias, out)


def _backward(X, tile, interpret, residuals, d):
    """One elementwise pass over the logits, which XLA makes of it."""
    logits, valid, bias, out = residuals
    logits = logits.astype(jnp.float32)
    weights = jnp.ones(logits.shape[0]) if valid is None else valid.astype(jnp.float32)
    weights = (weights / jnp.maximum(out["group_sizes"].sum() // X, 1))[:, None]
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(log_p)
    entropy = -(p * log_p).sum(axis=-1, keepdims=True)
    along = p * (d["probabilities"] - (p * d["probabilities"]).sum(axis=-1, keepdims=True))
    z = 2 * jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    dlogits = weights * (along - d["entropy"] * p * (log_p + entropy) + d["z_loss"] * z * p)
    expert = jnp.arange(logits.shape[1])
    for x in range(X):
        score = out["scores"][:, x : x + 1]
        dlogits += jnp.where(out["experts"][:, x : x + 1] == expert, d["scores"][:, x : x + 1] * score * (1 - score), 0.0)
    no_gradient = None if valid is None else np.zeros(valid.shape, jax.dtypes.float0)
    return dlogits, None if bias is None else jnp.zeros_like(bias), no_gradient


_route.defvjp(_forward, _backward)
