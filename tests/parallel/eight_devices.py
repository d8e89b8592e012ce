"""Run by test_eight_devices.py in a process of its own: many meshes of eight virtual devices against one device.

    python eight_devices.py FOLDER CASE...

Writes a JSON line for the batch and its routing, for each case, for a step of training, and for a state that moved between
two meshes through a checkpoint.
"""

import json
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama4_jax.checkpoints.run_checkpoints import RunCheckpoints
from llama4_jax.config import (
    AttentionTemperature,
    CheckpointConfig,
    ExecutionConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
)
from llama4_jax.data.packing import PackedRows, TokenizedDocuments, check_windows, plan_packing
from llama4_jax.inference import decoding
from llama4_jax.model.linear import project
from llama4_jax.model.llama4 import Llama4, init_params, logical_axes
from llama4_jax.parallel import context_parallel
from llama4_jax.parallel.expert_parallel import routed_experts
from llama4_jax.parallel.mesh import make_mesh
from llama4_jax.parallel.rules import batch_sharding, named_shardings, partition, put_batch, use_mesh
from llama4_jax.training.objective import cross_entropy_objective
from llama4_jax.training.optimizer import learning_rate_schedule, make_optimizer
from llama4_jax.training.state import abstract_state, create_state
from llama4_jax.training.step import make_train_step
from pallas_kernels.attention import Mask
from pallas_kernels.attention import attention as kernel_attention
from pallas_kernels.attention.intervals import Intervals
from pallas_kernels.expert_ffn import expert_ffn

CHUNK, LENGTH, ROWS = 8, 64, 8
CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=8, experts_per_token=2,
    expert_ffn_size=16, dense_ffn_size=32, moe_interval=2, nope_interval=2, attention_chunk_size=CHUNK,
    temperature=AttentionTemperature(floor=4, scale=0.5), initializer_range=0.2,
)  # fmt: skip
OPTIMIZER = make_optimizer(OptimizerConfig(), 10)
OPTIONS = {"xla_backend_optimization_level": 0}  # of compilation, which is what takes time here

# Name: axes, execution. Sizes that multiply to less than eight use so many devices.
CASES = {
    "dcn_data": ({"dcn_data": 2}, {}),
    "data": ({"data": 8}, {}),
    "fsdp": ({"fsdp": 8}, {}),
    "context": ({"context": 4}, {"context_exchange": "ring"}),
    "expert": ({"expert": 4}, {"expert_exchange": "all_to_all"}),
    "tensor": ({"tensor": 2}, {}),
    "context_gathered": ({"context": 4}, {"context_exchange": "all_gather"}),
    "context_zigzag": ({"context": 4}, {"context_exchange": "ring", "context_layout": "zigzag"}),
    "context_no_promise": ({"context": 4}, {"context_exchange": "ring", "context_layout": "zigzag"}),
    "expert_gathered": ({"expert": 4}, {"expert_exchange": "all_gather"}),
    "expert_weights": ({"fsdp": 2, "expert": 2, "tensor": 2}, {"expert_exchange": "gather_weights"}),
    "data_fsdp": ({"data": 2, "fsdp": 4}, {}),
    "fsdp_tensor": ({"fsdp": 4, "tensor": 2}, {"remat": "layer"}),
    "expert_tensor_gathered": ({"expert": 4, "tensor": 2}, {"expert_exchange": "all_gather"}),
    "data_expert_tensor": ({"data": 2, "expert": 2, "tensor": 2}, {"expert_exchange": "all_to_all"}),
    "fsdp_context_zigzag_gathered": (
        {"fsdp": 2, "context": 4}, {"context_exchange": "all_gather", "context_layout": "zigzag"},
    ),
    "context_tensor": ({"data": 2, "context": 2, "tensor": 2}, {"context_exchange": "ring"}),
    "fsdp_context_expert": (
        {"fsdp": 2, "context": 2, "expert": 2}, {"context_exchange": "ring", "expert_exchange": "all_to_all"},
    ),
    "dcn_data_fsdp_expert": ({"dcn_data": 2, "fsdp": 2, "expert": 2}, {"expert_exchange": "all_gather"}),
    "context_expert_tensor_zigzag": (
        {"context": 2, "expert": 2, "tensor": 2},
        {"context_exchange": "ring", "context_layout": "zigzag", "expert_exchange": "all_to_all", "remat": "layer"},
    ),
    "dcn_context_expert": ({"dcn_data": 2, "context": 2, "expert": 2}, {}),
    "dcn_data_fsdp_tensor": ({"dcn_data": 2, "data": 1, "fsdp": 2, "tensor": 2}, {}),
}  # fmt: skip


def packed_batch():
    """Rows that keep the packer's promise: documents of 1 to 50 tokens, some longer than a chunk, and padding."""
    rng = np.random.default_rng(0)
    lengths = rng.choice([2, 3, 5, 9, 14, 30, 50], 60)
    ids = rng.integers(0, CONFIG.vocab_size, lengths.sum()).astype(np.int32)
    documents = TokenizedDocuments(ids, np.concatenate([[0], np.cumsum(lengths)]), np.zeros(len(lengths), int))
    rows = PackedRows(documents, plan_packing(lengths, LENGTH, CHUNK), LENGTH, CHUNK)
    batch = rows.batch(range(len(rows) - ROWS, len(rows)))  # the last rows are the emptiest
    check_windows(batch.segment_ids, CHUNK)
    return batch


def skewed_params(model):
    """Every token has a part in common, on which the router lays the more weight the lower the expert."""
    params = init_params(model, jax.random.key(0))
    common = jax.random.normal(jax.random.key(1), (CONFIG.hidden_size,))
    params["embed"]["embedding"] += 0.4 * common
    slope = jnp.linspace(1.5, -6.0, CONFIG.num_experts)
    params["layers"]["layer_1"]["feed_forward"]["router"]["kernel"] += 0.1 * common[:, None] * slope
    return params


def describe(model, params, batch) -> dict:
    """What makes this batch a hard one, and equality a fair demand."""
    _, captured = model.apply(
        {"params": params}, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids,
        document_window=batch.document_window, capture_intermediates=True, mutable="intermediates",
    )  # fmt: skip
    routing = captured["intermediates"]["layers"]["layer_1"]["feed_forward"]["router"]["__call__"][0]
    valid = np.asarray(batch.segment_ids).reshape(-1) > 0
    logits = np.sort(np.asarray(routing.logits).reshape(-1, CONFIG.num_experts)[valid], axis=1)
    experts = np.asarray(routing.experts).reshape(-1, CONFIG.experts_per_token)[valid]
    load = np.bincount(experts.reshape(-1), minlength=CONFIG.num_experts) / experts.size
    margin = float(np.min(logits[:, -CONFIG.experts_per_token] - logits[:, -CONFIG.experts_per_token - 1]))
    documents = [len(np.unique(row[row > 0])) for row in batch.segment_ids]
    return {"margin": margin, "load": load.tolist(), "padding": float(1 - valid.mean()), "documents": documents}


def loss_and_gradients(params, mesh, execution, batch):
    model = Llama4(CONFIG, execution)
    objective = cross_entropy_objective(model, ObjectiveConfig())
    with use_mesh(mesh):
        params = jax.device_put(params, named_shardings(params, logical_axes(model), mesh))
        run = jax.jit(jax.value_and_grad(lambda p, b: objective(p, b, None), has_aux=True), compiler_options=OPTIONS)
        (loss, metrics), gradients = run(params, put_batch(batch, mesh))
    return jax.device_get((loss, metrics["expert_load"], gradients))


def mesh_of(sizes):
    devices = int(np.prod(list(sizes.values())))
    return make_mesh(MeshConfig(**{"data": 1} | sizes), jax.devices()[:devices])


def relative_error(a, b) -> float:
    return float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30))


def report(case, **record):
    print(json.dumps({"case": case} | record), flush=True)


def train_two_steps(model, mesh):
    """A step that is compiled once and uses up the state it is given."""
    state = create_state(model, OPTIMIZER, ".*", mesh, seed=0)
    objective, schedule = cross_entropy_objective(model, ObjectiveConfig()), learning_rate_schedule(OptimizerConfig(), 10)
    split = sum(not x.is_fully_replicated for x in jax.tree.leaves(state.params))
    same = jax.tree.map(lambda m, p: m.sharding == p.sharding, state.opt_state[1][0].mu, state.params)
    with use_mesh(mesh):
        step = make_train_step(objective, OPTIMIZER, schedule, state=state, mesh=mesh, seed=0)
        batch = put_batch(packed_batch(), mesh)
        second = step(step(state, batch)[0], batch)[0]
    given = [x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)) if x.ndim]
    report(
        "train", compilations=step._cache_size(), donated=all(given), step=int(second.step), split=split,
        moments_follow=all(jax.tree.leaves(same)),
    )  # fmt: skip


def read_and_decode(sizes, layout="contiguous") -> dict:
    """A prompt over `context` and tokens behind it, one of which begins a new chunk, against a forward pass of all on one
    device; what a device holds of the cache; and the collectives of decoding."""
    model, rng, lengths, new, length = Llama4(CONFIG), np.random.default_rng(1), [46, 33], 6, 64
    on_mesh = Llama4(CONFIG, ExecutionConfig(context_layout=layout, context_exchange="ring"))
    params = init_params(model, jax.random.key(3))
    rows = jnp.asarray(rng.integers(0, CONFIG.vocab_size, (len(lengths), max(lengths) + new)))
    expected = model.apply({"params": params}, rows).logits
    prompts = [row[:n].tolist() for row, n in zip(rows, lengths, strict=True)]
    tokens, segment_ids = decoding.padded(prompts, length, on_the_left=False)
    mesh, errors = mesh_of(sizes), []
    with use_mesh(mesh):
        variables = {"params": jax.device_put(params, named_shardings(params, logical_axes(model), mesh))}
        cache = decoding.empty_cache(on_mesh, len(rows), length)
        logits, cache = decoding.prefill(on_mesh, variables, cache, tokens, segment_ids)
        step = jax.jit(lambda variables, token, cache: on_mesh.apply(variables, token, cache=cache))
        for i in range(new):
            places = jnp.asarray(lengths) + i
            want = jnp.take_along_axis(expected, places[:, None, None] - 1, axis=1)[:, 0]
            errors.append(relative_error(np.asarray(logits), np.asarray(want)))
            output = step(variables, jnp.take_along_axis(rows, places[:, None], axis=1), cache)
            logits, cache = output.logits[:, 0], output.cache
        sent = collectives(lambda *args: step(*args).logits, variables, rows[:, :1], cache)
    held = [x.addressable_shards[0].data.size / x.size for x in cache.keys]
    return {"error": max(errors), "held": held, "collectives": sent}


def move_between_meshes(model, folder):
    checkpoints = RunCheckpoints(folder, CheckpointConfig(keep=1))
    state = create_state(model, OPTIMIZER, ".*", mesh_of({"fsdp": 8}), seed=1).replace(step=jnp.int32(3))
    checkpoints.save(3, state, {}, {})
    checkpoints.wait()
    target = abstract_state(model, OPTIMIZER, ".*", mesh_of({"data": 2, "fsdp": 2, "tensor": 2}))
    restored = checkpoints.restore_newest(target).state
    equal = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), restored, state)
    placed = jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, target)
    report("restored", equal=all(jax.tree.leaves(equal)), placed=all(jax.tree.leaves(placed)))


def of_one_device(line: str) -> bool:
    """Whether a collective has groups of one: {{0},{1},..}, or the axes of a mesh that have size 1."""
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return all(sizes[axis] == "1" for axis in re.findall(r"\w+", mesh[2]))
    return "replica_groups={{0},{1}," in line


def collectives(function, *args) -> list[str]:
    """The names of all collectives in the compiled program, those of a device with itself aside."""
    lines = jax.jit(function).lower(*args).compile(OPTIONS).as_text().splitlines()
    text = "\n".join(line for line in lines if not of_one_device(line))
    return sorted(set(re.findall(r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)))


def collectives_of_attention(chunk, window, **execution) -> list[str]:
    """Of one attention, forward and backward, under data=2 x context=4."""
    mesh, local = mesh_of({"data": 2, "context": 4}), partial(kernel_attention, implementation="xla")

    def gradients(q, k, v, dout, segment_ids, positions, spans):
        mask = Mask(positions, segment_ids, chunk=chunk, document_window=window)
        attend = partial(
            context_parallel.attention,
            mask=mask,
            spans=spans,
            local=local,
            execution=ExecutionConfig(**execution),
            zigzag=context_parallel.zigzag_of(ExecutionConfig(**execution), ROWS, LENGTH),
        )
        out, pullback = jax.vjp(attend, q, k, v)
        return out, pullback(dout)

    with use_mesh(mesh):
        rows = lambda *shape: jax.ShapeDtypeStruct((ROWS, LENGTH, *shape), "float32", sharding=batch_sharding(mesh))  # noqa: E731
        places = jax.ShapeDtypeStruct((ROWS, LENGTH), "int32", sharding=batch_sharding(mesh))
        return collectives(gradients, rows(4, 8), rows(2, 8), rows(2, 8), rows(4, 8), places, places, Intervals(places, places))


def collectives_of_experts(exchange) -> list[str]:
    """Of the routed experts' forward pass under data=2 x expert=4."""
    mesh, c = mesh_of({"data": 2, "expert": 4}), CONFIG
    of = lambda dtype, spec, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    tokens = P(("data", "expert"))
    weights = (c.num_experts, 2, c.hidden_size, c.expert_ffn_size), (c.num_experts, c.expert_ffn_size, c.hidden_size)
    with use_mesh(mesh):
        return collectives(
            partial(routed_experts, ffn=partial(expert_ffn, implementation="blocks"), exchange=exchange),
            *(of(dtype, tokens, ROWS, LENGTH, n) for dtype, n in (("float32", c.hidden_size), ("int32", 2), ("float32", 2))),
            *(of("float32", P("expert"), *shape) for shape in weights),
        )


def collectives_of_a_projection() -> list[str]:
    """Onto heads of which no shard has a tile, forward and backward, under fsdp=2 x expert=4."""
    mesh, axes = mesh_of({"fsdp": 2, "expert": 4}), ("embed", "heads", "head_dim")
    of = lambda spec, *shape: jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, spec))  # noqa: E731
    kernel = partition("kernel", (32, 4, 8), P(*axes), mesh)

    def gradients(x, kernel, dy):
        y, pullback = jax.vjp(lambda x, kernel: project(x, kernel, axes), x, kernel)
        return y, pullback(dy)

    with use_mesh(mesh):
        rows = batch_sharding(mesh).spec
        return collectives(gradients, of(rows, ROWS, LENGTH, 32), of(kernel, 32, 4, 8), of(rows, ROWS, LENGTH, 4, 8))


def layers_whose_attention_sends(params, batch, **execution) -> list[str]:
    """In the whole gradient's compiled program, under data=2 x context=4; what projections do with their weights aside."""
    model, mesh = Llama4(CONFIG, ExecutionConfig(context_exchange="ring", **execution)), mesh_of({"data": 2, "context": 4})
    objective = cross_entropy_objective(model, ObjectiveConfig())
    with use_mesh(mesh):
        gradient = jax.jit(jax.grad(lambda p, b: objective(p, b, None)[0]))
        lines = gradient.lower(params, put_batch(batch, mesh)).compile(OPTIONS).as_text().splitlines()
    sent = [line for line in lines if re.search(r" (all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\(", line)]
    return sorted({found[1] for line in sent if (found := re.search(r'op_name="[^"]*/(layer_\d)/attention/', line))})


def count_collectives(params, batch):
    report(
        "collectives",
        in_the_model=layers_whose_attention_sends(params, batch),
        in_the_model_zigzag=layers_whose_attention_sends(params, batch, context_layout="zigzag"),
        in_the_model_without_the_promise=layers_whose_attention_sends(params, batch.replace(document_window=None)),
        local=collectives_of_attention(CHUNK, CHUNK),
        local_zigzag=collectives_of_attention(CHUNK, CHUNK, context_layout="zigzag"),
        no_promise=collectives_of_attention(CHUNK, None, context_exchange="ring"),
        ring=collectives_of_attention(None, CHUNK, context_exchange="ring"),
        zigzag=collectives_of_attention(None, CHUNK, context_exchange="ring", context_layout="zigzag"),
        gathered=collectives_of_attention(None, CHUNK, context_exchange="all_gather"),
        all_to_all=collectives_of_experts("all_to_all"),
        all_gather=collectives_of_experts("all_gather"),
        gather_weights=collectives_of_experts("gather_weights"),
        projection=collectives_of_a_projection(),
    )


def main(folder: str, *cases: str) -> None:
    model = Llama4(CONFIG)
    params = skewed_params(model)
    batch = packed_batch()
    report("batch", **describe(model, params, batch))
    expected = loss_and_gradients(params, mesh_of({}), ExecutionConfig(), batch)
    for name in cases:
        sizes, execution = CASES[name]
        given = batch.replace(document_window=None) if name == "context_no_promise" else batch
        got = loss_and_gradients(params, mesh_of(sizes), ExecutionConfig(**execution), given)
        errors = jax.tree.map(relative_error, got, expected)
        paths = {jax.tree_util.keystr(path): error for path, error in jax.tree_util.tree_leaves_with_path(errors)}
        worst = max(paths, key=paths.get)
        report(name, error=paths[worst], worst=worst)
    if folder != "-":
        count_collectives(params, batch)
        report("read", **read_and_decode({"context": 8}))
        report("read_cut_chunks", **read_and_decode({"context": 8}, "zigzag"))
        report("read_zigzag", **read_and_decode({"data": 2, "context": 2, "tensor": 2}, "zigzag"))
        train_two_steps(model, mesh_of({"fsdp": 2, "expert": 2, "tensor": 2}))
        move_between_meshes(model, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
