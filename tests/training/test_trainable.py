import pytest

from llama4_jax.errors import UserError
from llama4_jax.training.trainable import merge, split, trainable_paths

PARAMS = {"embed": {"embedding": 1}, "layers": {"layer_0": {"router": {"kernel": 2}, "norm": {"scale": 3}}}}


def test_a_pattern_is_found_anywhere_in_a_path():
    assert trainable_paths(PARAMS, "router") == {"layers/layer_0/router/kernel"}
    assert trainable_paths(PARAMS, "scale$|^embed/") == {"layers/layer_0/norm/scale", "embed/embedding"}
    assert len(trainable_paths(PARAMS, ".*")) == 3


def test_nothing_matched_offers_near_paths():
    with pytest.raises(
        UserError, match="'layers/layer_0/ruoter/kernel' matches no parameter; some are layers/layer_0/router/kernel"
    ):
        trainable_paths(PARAMS, "layers/layer_0/ruoter/kernel")


def test_a_broken_pattern_is_told():
    with pytest.raises(UserError, match=r"'\*x' is not a regular expression: nothing to repeat"):
        trainable_paths(PARAMS, "*x")


@pytest.mark.parametrize("pattern", ["router", "embed", ".*"])
def test_merge_undoes_split(pattern):
    chosen, rest = split(PARAMS, trainable_paths(PARAMS, pattern))
    assert merge(chosen, rest) == PARAMS
