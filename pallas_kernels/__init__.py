"""Kernels of sparse, long-context transformers. Knows jax and nothing of llama4_jax: any JAX project can take it.

Each folder is one operation: `api.py` is its signature and dispatch, `reference.py` the specification in plain jnp,
the other files one implementation each. `implementation="auto"` chooses by backend; a name means that one or an error.
"""
