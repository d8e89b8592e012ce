"""Calibration and deployment claims: their arithmetic, and that what they say of themselves holds."""

import dataclasses

import pytest

import llama4_jax as l4
from llama4_jax.planning import calibration, deployment, scaling
from llama4_jax.planning.chips import CHIPS, parse_topology


def test_memory_of_a_deployment_is_weights_and_cache():
    """Scout: 107.77 billion weights; 48 KiB a token on 12 NoPE layers, and 36 layers of 8,192 tokens once."""
    found = deployment.need("scout-17b-16e", 4, 1_000_000)
    assert found.weights == 107_769_861_120 / 2
    assert found.cache == 48 * 1024 * 1_000_000 + 36 * 8192 * 4096
    assert found.tokens_a_second(3350e9) == pytest.approx(3350e9 / (17_172_894_720 / 2 + found.cache))


def test_what_fits_is_what_would_fit():
    for claim in deployment.claims():
        longest = dataclasses.replace(claim, context=claim.context_that_fits)
        if longest.context > 8192:
            assert longest.holds and not dataclasses.replace(claim, context=longest.context + 100).holds
        assert claim.holds == (claim.bits_that_fit >= claim.bits)
    assert "NO" in deployment.as_text() and "yes" in deployment.as_text()


def test_published_runs_are_slower_than_the_roofline():
    runs = [run for run in calibration.published_runs() if not run.assumed]
    compared = calibration.compare(runs)
    assert [c.run.name for c in compared] == ["Llama 4 Scout", "Llama 4 Maverick"]
    assert all(0.4 < c.share < 1 for c in compared)
    assert all(abs(c.error) < 0.1 for c in compared)
    assert "of the roofline" in calibration.as_text(compared)


def test_scaling_has_a_point_for_each_pod_that_the_batch_divides():
    experiment = l4.Experiment(
        model=l4.named_config("llama4-8b"),
        data=l4.DataConfig(sources=("text",), sequence_length=8192, batch_size=8),
        execution=l4.ExecutionConfig(compute_dtype="bfloat16", remat="layer"),
    )
    home = parse_topology("v5p:2x2x2")
    pods = [parse_topology("v5p:2x2x1"), home, parse_topology("v5p:2x2x2", 2)]
    weak = scaling.scale(experiment, "weak", home, pods)
    assert [(p.chips, p.rows) for p in weak] == [(4, 4), (8, 8), (16, 16)]
    strong = scaling.scale(experiment, "strong", home, pods)
    assert [(p.chips, p.rows) for p in strong] == [(4, 8), (8, 8), (16, 8)]
    assert strong[0].step > strong[1].step
    assert scaling.as_text(weak + strong).count("\n") == 6
    for chip in CHIPS.values():
        assert scaling.pods(chip)[0].chips == 1 and scaling.pods(chip)[-1].chips == 8192
