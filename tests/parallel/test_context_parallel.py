import numpy as np
import pytest

from llama4_jax.config import ExecutionConfig
from llama4_jax.parallel.context_parallel import Zigzag, choose_exchange, zigzag_of

SCOUT = {"rows": 1, "context_shards": 8, "num_heads": 40, "num_kv_heads": 8, "head_dim": 128, "itemsize": 2}


def test_short_shards_gather_and_long_ones_go_round():
    """The two measured settings that the rule names, and one where gathered keys and values do not fit."""
    assert choose_exchange(shard_length=2048, **SCOUT) == "all_gather"
    assert choose_exchange(shard_length=16_384, **SCOUT) == "ring"
    assert choose_exchange(shard_length=4096, **SCOUT | {"context_shards": 256}) == "ring"


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_zigzag_gives_every_shard_the_same_share_of_the_triangle(shards):
    zigzag = Zigzag(64, shards)
    order = zigzag.arrange(np.arange(64)[None])[0]
    keys_read = (order + 1).reshape(shards, -1).sum(axis=1)
    assert len(set(keys_read.tolist())) == 1
    np.testing.assert_array_equal(order[zigzag.places(np.arange(64))], np.arange(64))
    x = np.arange(2 * 64).reshape(2, 64)
    np.testing.assert_array_equal(zigzag.restore(zigzag.arrange(x)), x)
    assert zigzag.arrange(None) is None


def test_without_a_mesh_rows_keep_their_order():
    assert zigzag_of(ExecutionConfig(context_layout="zigzag"), 8, 64) is None
