import matplotlib.image
import pytest

from llama4_jax.training.report import expert_load_figure, write_report


def record(step, load=None, dropped=0.0):
    routing = {"expert_load": load, "router_entropy": [0.5, 0.6], "router_drop_share": [0.0, dropped]} if load else {}
    return {"step": step, "loss": 2.0, "cross_entropy": 3.0 / step} | routing


@pytest.mark.parametrize("steps", [[1], [1, 10, 20]])
def test_pictures_of_a_run_of_any_length(tmp_path, steps):
    records = [record(step, [[0.75, 0.25], [0.5, 0.5]]) for step in steps]
    write_report([*records, {"step": 20, "evaluation": "heldout", "bits_per_byte": 2.5}], tmp_path, {"gzip": 2.9})
    for name in ("loss.png", "expert_load.png"):
        picture = matplotlib.image.imread(tmp_path / name)
        assert min(picture.shape[:2]) > 200 and picture.std() > 0.01


def test_entropy_is_always_seen_and_drops_where_there_are_any():
    def rows(dropped):
        axes = expert_load_figure([record(step, [[0.75, 0.25], [0.5, 0.5]], dropped) for step in (1, 10)]).axes
        return [axis.get_ylabel().split("\n")[0] for axis in axes if axis.get_ylabel()]

    assert rows(0.0) == ["MoE layer 0", "MoE layer 1", "busiest expert", "entropy"]
    assert rows(0.3) == [*rows(0.0), "dropped"]


def test_a_dense_model_has_no_picture_of_experts(tmp_path):
    write_report([record(1), record(2)], tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
