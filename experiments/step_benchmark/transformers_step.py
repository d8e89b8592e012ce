"""The same step by transformers and torch, which run every expert on every token: prints one JSON line."""

import time

START = time.time()

import json  # noqa: E402

import shape as s  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402


def main() -> None:
    config = transformers.Llama4TextConfig(
        vocab_size=s.VOCAB,
        hidden_size=s.HIDDEN,
        num_hidden_layers=s.LAYERS,
        num_attention_heads=s.HEADS,
        num_key_value_heads=s.KV_HEADS,
        head_dim=s.HEAD_DIM,
        intermediate_size=s.EXPERT_FFN,
        num_local_experts=s.EXPERTS,
        num_experts_per_tok=s.TOP_K,
        interleave_moe_layer_step=1,
        attention_chunk_size=s.CHUNK,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=1,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = transformers.Llama4ForCausalLM(config).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.randint(0, s.VOCAB, (s.BATCH, s.LENGTH))
    seconds, start_up = [], None
    for _ in range(s.STEPS):
        began = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
        start_up = start_up or time.time() - START
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(json.dumps(s.summary("transformers", versions, seconds, start_up) | {"loss": loss.item()}))


if __name__ == "__main__":
    main()
