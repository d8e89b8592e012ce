"""Which checkpoints stay, for any folder and any policy."""

import hypothesis.strategies as st
from hypothesis import given

from llama4_jax.checkpoints.keep import best_step, superfluous
from llama4_jax.config import CheckpointConfig

VALUES = st.dictionaries(st.sampled_from(["a.loss", "a.other"]), st.floats())
FOLDERS = st.dictionaries(st.integers(1, 60), VALUES, max_size=12)
POLICIES = st.builds(
    CheckpointConfig,
    keep=st.integers(1, 4),
    keep_every=st.none() | st.integers(1, 9),
    keep_best=st.none() | st.just("a.loss"),
    best_is=st.sampled_from(["lowest", "highest"]),
)


@given(POLICIES, FOLDERS)
def test_what_a_policy_names_stays_and_all_else_goes(config, folder):
    gone = superfluous(config, folder)
    newest = sorted(folder)[-config.keep :]
    for step in folder:
        named = step in newest or (config.keep_every and step % config.keep_every == 0) or step == best_step(config, folder)
        assert (step in gone) == (not named)


@given(POLICIES, FOLDERS)
def test_no_other_has_a_better_value_than_the_best(config, folder):
    best = best_step(config, folder)
    compared = [values[config.keep_best] for values in folder.values() if config.keep_best in values]
    compared = [value for value in compared if value == value]
    if not compared:
        assert best is None
    else:
        assert folder[best][config.keep_best] == (min if config.best_is == "lowest" else max)(compared)


def test_of_equals_the_older_is_the_best():
    config = CheckpointConfig(keep_best="a.loss")
    assert best_step(config, {3: {"a.loss": 1.0}, 2: {"a.loss": 1.0}, 1: {"a.loss": 2.0}}) == 2
