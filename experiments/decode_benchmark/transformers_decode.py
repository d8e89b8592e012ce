"""The same by transformers and torch, which run every expert on every token: prints one JSON line."""

import json
import sys
import time

import numpy as np
import shape as s
import torch
import transformers


def main() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    prompts = torch.from_numpy(np.load(sys.argv[2])).long()

    @torch.inference_mode()
    def run():
        began = time.perf_counter()
        out = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        prefilled, tokens = time.perf_counter(), [token]
        for _ in range(s.NEW - 1):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(token)
        return prefilled - began, time.perf_counter() - prefilled, torch.cat(tokens, 1).tolist()

    run()
    prefill, decode, tokens = min((run() for _ in range(s.ROUNDS)), key=lambda r: r[1])
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(json.dumps({"versions": versions, "prefill": prefill, "decode": decode, "tokens": tokens}))


if __name__ == "__main__":
    main()
