"""The models and the run that every contender decodes. Imports nothing, so that any interpreter can read it."""

VOCAB, HIDDEN, LAYERS = 2048, 256, 4
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 32
EXPERTS, TOP_K, EXPERT_FFN = 8, 1, 512  # and a shared expert of the same width
DENSE_FFN = 2 * EXPERT_FFN  # of the dense model that works as hard on each token
CHUNK = 256
BATCH, PROMPT, NEW = 4, 128, 384  # float32, greedy; the 257th token begins a new chunk
ROUNDS = 3  # the best counts
