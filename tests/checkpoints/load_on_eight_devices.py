"""Run by test_load.py in a process that has eight devices: `python load_on_eight_devices.py FOLDER...` loads each folder on
several meshes, and prints for each whether the parameters are those of one device, and how much was read."""

import json
import sys

import jax
import numpy as np

from llama4_jax.checkpoints import load
from llama4_jax.checkpoints.load import load_pretrained
from llama4_jax.config import MeshConfig
from llama4_jax.model.llama4 import logical_axes
from llama4_jax.parallel.mesh import make_mesh
from llama4_jax.parallel.rules import named_shardings

MESHES = (MeshConfig(data=1, fsdp=2, expert=2, tensor=2), MeshConfig(data=4, tensor=2), MeshConfig(data=1, fsdp=4, expert=2))


def main(folders):
    for folder in folders:
        _, whole = load_pretrained(folder)
        for config in MESHES:
            mesh, read = make_mesh(config), []
            check = load.require_finite  # sees every part that is read
            load.require_finite = lambda part, place, read=read: read.append(part.nbytes)
            model, params = load_pretrained(folder, mesh=mesh)
            load.require_finite = check
            jax.tree.map(np.testing.assert_array_equal, params, whole)
            expected = named_shardings(params, logical_axes(model), mesh)
            assert jax.tree.all(jax.tree.map(lambda x, sharding: x.sharding == sharding, params, expected))
            shards = [{str(shard.index): shard.data.nbytes for shard in x.addressable_shards} for x in jax.tree.leaves(params)]
            print(
                json.dumps({"folder": folder, "read": sum(read), "shards": sum(sum(by_index.values()) for by_index in shards)})
            )


if __name__ == "__main__":
    main(sys.argv[1:])
