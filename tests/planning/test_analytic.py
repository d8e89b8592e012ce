"""The estimate: exact where it can be, and of the right order where it simplifies."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import llama4_jax as l4
from llama4_jax.errors import UserError
from llama4_jax.planning.analytic import estimate, tile_padding
from llama4_jax.planning.chips import parse_topology
from llama4_jax.planning.model_flops import keys_seen, model_flops, tokens_of
from llama4_jax.planning.search import compiled_text, products, rank, ranking_text
from llama4_jax.training.flops import training_flops_per_token
from pallas_kernels.grouped_matmul.visits import by_tile, spans


def experiment(**mesh) -> l4.Experiment:
    """Scout's shapes with four layers, 8 rows of 8,192 tokens on each of 16 chips."""
    return l4.Experiment(
        model=dataclasses.replace(l4.named_config("scout-17b-16e"), vision=None, num_layers=4),
        data=l4.DataConfig(sources=("text",), sequence_length=8192, batch_size=128),
        execution=l4.ExecutionConfig(compute_dtype="bfloat16", remat="layer"),
        mesh=l4.MeshConfig(**mesh),
    )


POD = parse_topology("v5p:2x2x4")


def exchanged(measurement, kind: str, axes: str) -> float:
    return sum(e.sent for e in measurement.exchanges if (e.kind, e.axes) == (kind, axes))


def test_weights_and_moments_are_the_models_over_the_devices():
    whole = experiment(fsdp=4, expert=4)
    count = l4.count_parameters(whole.model).total
    memory = estimate(whole, POD).memory
    assert memory.arguments["parameters"] == pytest.approx(4 * count / 16, rel=1e-3)  # router and norms are not all split
    assert memory.arguments["optimizer"] == 2 * memory.arguments["parameters"]
    replicated = estimate(experiment(data=16), POD).memory
    assert replicated.arguments["parameters"] == 4 * count


def test_without_fsdp_gradients_are_summed_once_over_data():
    found = estimate(experiment(data=16), POD)
    count = l4.count_parameters(experiment().model).total
    assert {(e.kind, e.axes) for e in found.exchanges} == {("all-reduce", "data")}
    assert exchanged(found, "all-reduce", "data") == pytest.approx(4 * count * 2 * 15 / 16)


def test_experts_exchange_what_the_cost_rule_says():
    """4 layers, five times each: rows and answers, rows again when recomputed, both gradients; 1.1 of an even share."""
    found = estimate(experiment(fsdp=4, expert=4), POD)
    tokens = 8 * 8192
    assert exchanged(found, "all-to-all", "expert") == pytest.approx(4 * 5 * 1.1 * tokens * 3 / 4 * 5120 * 2, rel=1e-3)


def test_experts_that_travel_are_gathered_twice_and_computed_without_spare_rows():
    rows = experiment(fsdp=4, expert=4)
    weights = dataclasses.replace(rows, execution=dataclasses.replace(rows.execution, expert_exchange="gather_weights"))
    of_rows, of_weights = estimate(rows, POD), estimate(weights, POD)
    routed = 4 * 4 * 2 * 8 * 8192 * 3 * 5120 * 8192  # four passes over four layers
    assert of_rows.flops - of_weights.flops == pytest.approx(0.1 * routed)
    assert exchanged(of_weights, "all-to-all", "expert") == 0
    gathered = 2 * 4 * 15 / 16 * 16 * 3 * 5120 * 8192 * 2
    found = sum(e.sent for e in of_weights.exchanges if (e.kind, e.scope) == ("all-gather", "experts"))
    assert found == pytest.approx(gathered)


def test_recomputation_costs_one_forward_pass_of_the_layers():
    run = experiment(data=16)
    kept = dataclasses.replace(run, execution=dataclasses.replace(run.execution, remat="none"))
    again, once = estimate(run, POD), estimate(kept, POD)
    head = 4 * 2 * 8 * 8192 * 5120 * 202_048  # logits are computed twice, with and without remat
    assert again.flops - once.flops == pytest.approx((once.flops - head) / 3)
    assert once.flops - head / 4 == pytest.approx(8 * 8192 * training_flops_per_token(run.model, 8192))
    assert again.memory.temporaries < once.memory.temporaries


def test_long_rows_over_context_exchange_keys_in_nope_layers_only():
    long = dataclasses.replace(
        experiment(fsdp=4, context=4), data=l4.DataConfig(("text",), sequence_length=131_072, batch_size=4)
    )
    found = estimate(long, POD)
    keys = 131_072 / 4 * 2 * 8 * 128 * 2  # one NoPE layer; two forward passes, keys again and their gradients behind
    assert exchanged(found, "all-gather", "context") == pytest.approx(4 * 3 * keys)


def test_a_cache_lies_over_context_in_nope_layers():
    """One row of 1,048,576 tokens: one layer in four keeps them all, three keep 8,192."""
    row = dataclasses.replace(
        experiment(context=4, tensor=4, data=1), data=l4.DataConfig(("text",), sequence_length=2**20, batch_size=1)
    )
    token = 2 * 8 * 128 * 2 / 4  # keys and values of a shard of `tensor`
    whole = estimate(row, POD, "decode").memory.arguments["cache"]
    assert whole == pytest.approx(token * (2**20 / 4 + 3 * 8192))
    assert (
        estimate(row, POD, "prefill").flops
        > 2**20 / 1024 * estimate(dataclasses.replace(row, mesh=l4.MeshConfig(data=4, tensor=4)), POD, "prefill").flops / 4 / 2
    )  # the whole prompt, not its last piece


def test_tile_padding_is_what_whole_tiles_have_beside_masks_and_groups():
    """One document of 8,192 a row, tiles of 512: counted one by one. Sixteen ragged groups of rows: by the kernel's own plan."""
    run = experiment(fsdp=16, data=1)
    query, key = np.mgrid[:8192:512, :8192:512]
    tiles = (key <= query).sum() * 512**2 - 8192 * 8193 / 2  # beyond what a causal mask leaves
    attention = (2 * 4 + 10) * 8 * 40 * 128 * tiles  # forward twice, backward; 8 rows of 40 heads
    sizes = jnp.full(16, 4096).at[0].add(7).at[15].add(-7)  # every group but the first begins within a tile
    plan = by_tile(*spans(16, sizes, jnp.int32(0)), 65_536, 512)
    visits = int((plan.stop > plan.start).sum())
    routed = 4 * 2 * (visits * 512 - 65_536) * 3 * 5120 * 8192
    assert visits == 128 + 15
    assert tile_padding(run, POD) == pytest.approx(4 * (attention + routed), rel=2e-3)
    assert tile_padding(run, parse_topology("h100:2x8")) == 0


def test_an_axis_that_takes_the_rest_may_come_to_one():
    """context=-1 over as many chips as tensor has: prompts are read in pieces, as with context=1."""
    row = dataclasses.replace(experiment(data=1, tensor=4), data=l4.DataConfig(("text",), sequence_length=2**20, batch_size=1))
    four = parse_topology("v5p:2x2x1")
    found = [
        estimate(dataclasses.replace(row, mesh=dataclasses.replace(row.mesh, context=context)), four, "prefill")
        for context in (1, -1)
    ]
    assert found[0].flops == found[1].flops and found[0].memory == found[1].memory


def test_a_mesh_that_does_not_fit_is_one_line():
    with pytest.raises(UserError, match=r"fsdp=3.*16"):
        estimate(experiment(fsdp=3, data=1), POD)
    with pytest.raises(UserError, match="num_experts"):
        estimate(experiment(expert=-1, data=1), parse_topology("v5p:4x4x2"))


def test_misaligned_shards_are_named():
    found = estimate(experiment(fsdp=128), parse_topology("v5p:4x4x8")).misaligned
    assert any("attention/query" in name and "40" in name for name in found)  # 5120 / 128
    assert not any("layers" in name for name in estimate(experiment(fsdp=4, expert=4), POD).misaligned)


def test_search_ranks_what_fits_by_time_and_tells_the_rest():
    ranking = rank(experiment(), POD, axes=("fsdp", "expert", "tensor"))  # 8 heads of keys do not divide by 16
    times = [c.measurement.roofline.step for c in ranking.candidates]
    assert times == sorted(times) and len(times) > 3
    assert ranking.too_large and ranking.refused
    limit = 0.9 * POD.chip.hbm_bytes
    assert all(c.measurement.memory.total <= limit for c in ranking.candidates)
    assert all(c.measurement.memory.total > limit for c in ranking.too_large)
    assert str(ranking.candidates[0]) in ranking_text(ranking)
    assert f"{len(ranking.candidates)} that should fit" in compiled_text([], [], ranking)


def test_search_says_why_no_mesh_divides():
    with pytest.raises(UserError, match=r"no mesh over 16 devices.*batch_size=3"):
        rank(
            dataclasses.replace(experiment(), data=l4.DataConfig(("t",), sequence_length=8192, batch_size=3)),
            POD,
            axes=("fsdp", "data"),
        )


def test_products_are_all_factorisations():
    assert sorted(products(12, 2)) == [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)]
    assert len(list(products(128, 5))) == 330


def test_model_flops_of_inference_are_a_forward_pass():
    run = experiment()
    assert tokens_of(run, "train") == 128 * 8192 and tokens_of(run, "prefill") == 128 * 1024 and tokens_of(run, "decode") == 128
    assert model_flops(run, "decode") < model_flops(run, "prefill") < model_flops(run, "train") / 3
    assert keys_seen(run.model, 10_000, 1) == [10_000 % 8192 + 1] * 3 + [10_001]
    assert keys_seen(run.model, 0, 8192) == [4096.5] * 4
