"""Our greedy decoding of the checkpoint folder that is given: prints one JSON line."""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import shape as s

import llama4_jax as l4
from llama4_jax.inference import decoding


def main() -> None:
    model, params = l4.load_pretrained(sys.argv[1])
    variables, prompts = {"params": params}, np.load(sys.argv[2])
    stop_ids, steps = jnp.array([decoding.NOTHING]), jnp.int32(decode_room := 32)

    def run():
        began = time.perf_counter()
        cache = decoding.empty_cache(model, s.BATCH, decoding.bucket(s.PROMPT + s.NEW))
        logits, cache = decoding.prefill(model, variables, cache, prompts, np.ones_like(prompts))
        keys = jax.random.split(jax.random.key(0), s.BATCH)
        state = decoding.State(cache, jax.block_until_ready(logits), keys, jnp.int32(0), jnp.zeros(s.BATCH, bool))
        prefilled, pieces = time.perf_counter(), []
        for _ in range(s.NEW // decode_room):
            state, tokens = decoding.decode(model, variables, state, stop_ids, steps, sampling=l4.Sampling(), room=decode_room)
            pieces.append(np.asarray(tokens))  # as a server would, to look for stop strings
        return prefilled - began, time.perf_counter() - prefilled, np.concatenate(pieces, axis=1)

    run()
    prefill, decode, tokens = min((run() for _ in range(s.ROUNDS)), key=lambda r: r[1])
    print(json.dumps({"versions": f"jax {jax.__version__}", "prefill": prefill, "decode": decode, "tokens": tokens.tolist()}))


if __name__ == "__main__":
    main()
