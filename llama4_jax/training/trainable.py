"""Which parameters train: a regular expression over their paths, and the split that it makes."""

import difflib
import re
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from llama4_jax.errors import UserError

PyTree = Any


def trainable_paths(params: PyTree, pattern: str) -> frozenset[str]:
    """Paths, such as `layers/layer_0/attention/query/kernel`, in which `pattern` is found.

    Raises:
        UserError: the pattern is no regular expression, or matches no path.
    """
    paths = flatten_dict(params, sep="/")
    try:
        chosen = frozenset(path for path in paths if re.search(pattern, path))
    except re.error as error:
        raise UserError(f"OptimizerConfig.trainable={pattern!r} is not a regular expression: {error}") from error
    if not chosen:
        near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.2) or sorted(paths)[:3]
        raise UserError(f"OptimizerConfig.trainable={pattern!r} matches no parameter; some are {', '.join(near)}")
    return chosen


def split(params: PyTree, paths: frozenset[str]) -> tuple[PyTree, PyTree]:
    """(parameters at `paths`, all others), each a nested dict."""
    flat = flatten_dict(params, sep="/")
    return (
        unflatten_dict({path: leaf for path, leaf in flat.items() if path in paths}, sep="/"),
        unflatten_dict({path: leaf for path, leaf in flat.items() if path not in paths}, sep="/"),
    )


def merge(one: PyTree, other: PyTree) -> PyTree:
    """Undoes `split`."""
    return unflatten_dict(flatten_dict(one, sep="/") | flatten_dict(other, sep="/"), sep="/")
