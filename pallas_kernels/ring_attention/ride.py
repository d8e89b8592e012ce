"""Arrays that travel to another device while a kernel computes.

    ride = Ride([key, value], ...)
    found = forward(query, key, value, ..., call=ride.pallas_call)
    key, value = ride.arrived

`Ride.pallas_call` stands in for `pl.pallas_call`. The kernel's own code stays as it is; before its first step the copies
to the other device are started, and after its last step what comes from yet another one is awaited. Which step is the first and
which the last, the scalar unit alone has to know.

All devices run the same kernels in the same order, so that a buffer lies at the same address on each. A device may write
into another's buffer once that one has entered the kernel, which it says to whoever will write there. No signal is
mistaken for another: a device sends the next one to its source only after it has received what it asked for with the last.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool

COLLECTIVE_ID = 7  # of rides to the next device; those to the one before use the next id


@dataclasses.dataclass
class Ride:
    """Inside shard_map.

    Attributes:
        arrays: what travels.
        sends, receives: which of the arrays this device sends, and which it will get; an array that does not arrive is
            garbage. What one device sends, the device `distance` after it receives.
        axis: of the mesh.
        distance: along the axis, round the end.
        collective_id: of a barrier semaphore: the same for all rides to one distance, another one for every other.
        arrived: afterwards, the arrays that came.
    """

    arrays: Sequence[Array]
    sends: Sequence[Bool[Array, ""]]
    receives: Sequence[Bool[Array, ""]]
    axis: str
    distance: int = 1
    collective_id: int = COLLECTIVE_ID
    arrived: Sequence[Array] | None = None

    def pallas_call(
        self,
        kernel,
        *,
        out_shape,
        grid_spec,
        compiler_params=None,
        input_output_aliases=None,
        cost_estimate=None,
        interpret=False,
        **options,
    ):
        """As `pl.pallas_call`, of a kernel with a list of outputs and a `PrefetchScalarGridSpec`."""
        scalars, inputs, outputs = grid_spec.num_scalar_prefetch, len(grid_spec.in_specs), len(out_shape)
        scratch, count = len(grid_spec.scratch_shapes), len(self.arrays)
        at_rest = [pl.BlockSpec(memory_space=pltpu.HBM)] * count
        shards, here = jax.lax.axis_size(self.axis), jax.lax.axis_index(self.axis)
        plan = (here + self.distance) % shards, (here - self.distance) % shards
        plan = jnp.stack([jnp.asarray(x, jnp.int32) for x in (*plan, *self.sends, *self.receives)])

        def riding(*refs):
            edges = [scalars, inputs, 1, count, outputs, count, scratch, count, count]
            given, own, plan, sources, out, targets, work, sent, received = _split(refs, edges)
            steps = [(pl.program_id(i), pl.num_programs(i)) for i in range(len(grid_spec.grid))]
            journey = _Journey(plan[0], sources, targets, sent, received, self.axis)
            pl.when(_all(step == 0 for step, _ in steps))(journey.begin)
            kernel(*given, *own, *out, *work)
            pl.when(_all(step == number - 1 for step, number in steps))(journey.end)

        call = pl.pallas_call(
            riding,
            out_shape=[*out_shape, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self.arrays)],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=scalars,
                grid=grid_spec.grid,
                in_specs=[*grid_spec.in_specs, pl.BlockSpec(memory_space=pltpu.SMEM), *at_rest],
                out_specs=[*grid_spec.out_specs, *at_rest],
                scratch_shapes=[*grid_spec.scratch_shapes, *[pltpu.SemaphoreType.DMA(())] * (2 * count)],
            ),
            # One core walks over the whole grid, in order: first and last step are what they say.
            compiler_params=dataclasses.replace(
                compiler_params or pltpu.CompilerParams(),
                dimension_semantics=("arbitrary",) * len(grid_spec.grid),
                collective_id=self.collective_id,
                has_side_effects=True,
            ),
            input_output_aliases=input_output_aliases or {},
            cost_estimate=dataclasses.replace(
                cost_estimate or pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=0),
                remote_bytes_transferred=sum(x.nbytes for x in self.arrays),
            ),
            interpret=interpret,
            **options,
        )

        def run(*operands):
            found = list(call(*operands, plan, *self.arrays))
            self.arrived = found[outputs:]
            return found[:outputs]

        return run

    def alone(self, *, interpret=False) -> Sequence[Array]:
        """The arrays that came, with nothing computed meanwhile."""
        nothing = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=0, grid=(1,), in_specs=[], out_specs=[])
        self.pallas_call(lambda: None, out_shape=[], grid_spec=nothing, interpret=interpret, name="ride")()
        return self.arrived


class Permuted:
    """What stands in for a `Ride` where `ppermute` carries the arrays; the compiler moves it beside the kernel."""

    pallas_call = staticmethod(pl.pallas_call)

    def __init__(self, arrays: Sequence[Array], axis: str, distance: int = 1):
        shards = jax.lax.axis_size(axis)
        ring = [(i, (i + distance) % shards) for i in range(shards)]
        self.arrived = [jax.lax.ppermute(x, axis, ring) for x in arrays]

    def alone(self, *, interpret=False) -> Sequence[Array]:
        return self.arrived


@dataclasses.dataclass(frozen=True)
class _Journey:
    """Within the kernel. `plan` holds the device to send to, the one to receive from, and which arrays are sent and received."""

    plan: jax.Array
    sources: Sequence
    targets: Sequence
    sent: Sequence
    received: Sequence
    axis: str

    def begin(self) -> None:
        barrier = pltpu.get_barrier_semaphore()
        count = len(self.sources)

        @pl.when(_any(self.plan[2 + count + i] for i in range(count)))
        def _my_buffers_may_be_written():
            pl.semaphore_signal(barrier, device_id={self.axis: self.plan[1]}, device_id_type=pl.DeviceIdType.MESH)

        @pl.when(_any(self.plan[2 + i] for i in range(count)))
        def _wait_until_theirs_may_be():
            pl.semaphore_wait(barrier, 1)

        for i in range(count):
            pl.when(self.plan[2 + i] == 1)(self._copy(i).start)

    def end(self) -> None:
        count = len(self.sources)
        for i in range(count):
            pl.when(self.plan[2 + i] == 1)(self._copy(i).wait_send)
            pl.when(self.plan[2 + count + i] == 1)(self._copy(i).wait_recv)

    def _copy(self, i: int):
        return pltpu.make_async_remote_copy(
            self.sources[i],
            self.targets[i],
            self.sent[i],
            self.received[i],
            device_id={self.axis: self.plan[0]},
            device_id_type=pl.DeviceIdType.MESH,
        )


def _split(items: Sequence, sizes: Sequence[int]) -> list:
    parts, start = [], 0
    for size in sizes:
        parts.append(items[start : start + size])
        start += size
    return parts


def _all(conditions):
    total = True
    for condition in conditions:
        total = condition & total
    return total


def _any(flags):
    return sum(flags) > 0
