"""Which steps are left out, and where a run goes back to: pure decisions, the same on every process."""

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from llama4_jax.config import AnomalyConfig
from llama4_jax.errors import UserError
from llama4_jax.training.anomalies import (
    GRADIENT_SPIKE,
    LOSS_SPIKE,
    NOT_FINITE,
    SOUND,
    Rollbacks,
    Usual,
    describe,
    judge,
    next_usual,
)

CONFIG = AnomalyConfig(grad_norm_factor=4.0, loss_factor=2.0, window=5)


def judged(values, config=CONFIG):
    """Verdicts on (loss, gradient norm) of one step after another, and what was usual after each."""

    def step(usual, value):
        verdict = judge(usual, *value, config)
        usual = next_usual(usual, *value, verdict == SOUND, config)
        return usual, (verdict, usual)

    values = jnp.asarray(values, jnp.float32).reshape(-1, 2)
    _, (verdicts, usual) = jax.lax.scan(step, Usual.at_start(), (values[:, 0], values[:, 1]))
    return verdicts.tolist(), jax.tree.map(np.asarray, usual)


@pytest.mark.parametrize(
    "loss, norm", [(math.nan, 1), (math.inf, 1), (-math.inf, 1), (2, math.nan), (2, math.inf), (math.nan, math.nan)]
)
@pytest.mark.parametrize("step", [0, 9])
def test_what_is_not_finite_is_never_made_part_of_anything(step, loss, norm):
    values = [(2.0, 1.0)] * 10
    values[step] = (loss, norm)
    verdicts, usual = judged(values)
    assert verdicts == [NOT_FINITE if i == step else SOUND for i in range(10)]
    assert usual.skipped[-1] == 1 and usual.sound[-1] == 9
    np.testing.assert_allclose([usual.loss[-1], usual.grad_norm[-1]], [2, 1], rtol=1e-6)


def test_spikes_are_told_apart_and_count_from_the_first_full_window_on():
    calm, gradient, loss = (2.0, 1.0), (2.0, 4.1), (4.1, 1.0)
    verdicts, _ = judged([calm, calm, gradient, loss, calm, calm, gradient, loss, (4.1, 4.1), (3.9, 3.9), calm])
    assert verdicts[:6] == [SOUND] * 6, "too few steps are known"
    verdicts, usual = judged([calm] * 5 + [gradient, loss, (4.1, 4.1), (3.9, 3.9), calm])
    assert verdicts[5:] == [GRADIENT_SPIKE, LOSS_SPIKE, GRADIENT_SPIKE, SOUND, SOUND]
    assert usual.grad_norm[7] == usual.grad_norm[4], "a spike does not become usual"


def test_without_factors_only_what_is_not_finite_counts():
    verdicts, _ = judged([(2.0, 1.0)] * 5 + [(1e9, 1e9), (math.nan, 1.0)], AnomalyConfig(None, None, window=5))
    assert verdicts == [SOUND] * 6 + [NOT_FINITE]


def test_a_loss_below_zero_makes_no_spikes():
    verdicts, _ = judged([(-2.0, 1.0)] * 8 + [(-0.5, 1.0), (3.0, 1.0)])
    assert verdicts == [SOUND] * 10


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0.5, 1.5), st.floats(0.5, 1.5)), min_size=1, max_size=60))
def test_ordinary_noise_is_never_left_out(values):
    """Within a factor of three between any two steps, of the four and three (here two) that make a spike."""
    config = AnomalyConfig(grad_norm_factor=4.0, loss_factor=3.001, window=5)
    verdicts, usual = judged(values, config)
    assert verdicts == [SOUND] * len(values)
    first = np.asarray(values[:5], np.float32).mean(axis=0)
    np.testing.assert_allclose([usual.loss[:5][-1], usual.grad_norm[:5][-1]], first, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=6, max_size=30), st.floats(4.5, 1e30))
def test_a_spike_over_everything_so_far_is_always_left_out(norms, factor):
    verdicts, _ = judged([(1.0, max(min(norm, 2.0), 1.0)) for norm in norms] + [(1.0, 2.0 * factor)])
    assert verdicts == [SOUND] * len(norms) + [GRADIENT_SPIKE]


def test_a_step_that_was_left_out_is_described():
    values, usual = {"loss": 9.5, "grad_norm": 40.0}, {"loss": 2.25, "grad_norm": 1.5}
    assert describe(NOT_FINITE, {"loss": math.nan, "grad_norm": 3.0}, usual) == "loss is nan and gradient norm 3.0"
    assert describe(GRADIENT_SPIKE, values, usual) == "gradient norm 40 is a spike: it has been 1.5"
    assert describe(LOSS_SPIKE, values, usual) == "loss 9.5 is a spike: it has been 2.25"


def test_rollbacks_are_kept_and_a_second_to_one_place_is_refused(tmp_path):
    rollbacks = Rollbacks(tmp_path)
    assert rollbacks.data_after(5) is None
    rollbacks.add(to=5, sound=6, skipped=["step 7"], data={"step": 10})
    rollbacks.add(to=20, sound=23, skipped=["step 24"], data={"step": 30})
    again = Rollbacks(tmp_path)
    assert [again.data_after(step) for step in (5, 6, 20)] == [{"step": 10}, None, {"step": 30}]
    with pytest.raises(UserError, match=r"going back to step 5, and past the batches of step 7, did not help: step 8"):
        again.add(to=5, sound=7, skipped=["step 8"], data={"step": 12})


def test_a_rollback_to_an_older_step_voids_those_to_newer_ones(tmp_path):
    """Their data would be read again."""
    rollbacks = Rollbacks(tmp_path)
    for to, batch in ((4, 10), (8, 14), (12, 20)):
        rollbacks.add(to=to, sound=to, skipped=[f"step {to + 1}"], data={"step": batch})
    rollbacks.add(to=6, sound=12, skipped=["step 13"], data={"step": 24})
    assert [Rollbacks(tmp_path).data_after(step) for step in (4, 6, 8, 12)] == [{"step": 10}, {"step": 24}, None, None]


def test_a_step_is_never_got_past_where_none_after_it_was_sound_before_and_after_a_rollback_to_it(tmp_path):
    rollbacks = Rollbacks(tmp_path)
    assert not rollbacks.never_got_past(5, sound=5), "it may have been the batches"
    rollbacks.add(to=5, sound=5, skipped=["step 6"], data={"step": 9})
    rollbacks.add(to=10, sound=11, skipped=["step 12"], data={"step": 19})
    assert rollbacks.never_got_past(5, sound=5)
    assert not rollbacks.never_got_past(5, sound=6)
    assert not rollbacks.never_got_past(10, sound=10), "step 11 was sound, before"


def test_a_file_of_rollbacks_that_cannot_be_read_is_not_taken_for_none(tmp_path):
    (tmp_path / "rollbacks.json").write_text('[{"to": 5, "da')
    with pytest.raises(UserError, match=r"cannot read .*rollbacks\.json.*cannot tell which batches it left out"):
        Rollbacks(tmp_path)


@pytest.mark.parametrize(
    "field, value", [("loss_factor", 1.0), ("grad_norm_factor", 0.5), ("window", 0), ("rollback_after", 0)]
)
def test_factors_that_would_skip_everything_are_refused(field, value):
    with pytest.raises(UserError, match=f"AnomalyConfig.{field} must be"):
        AnomalyConfig(**{field: value})
