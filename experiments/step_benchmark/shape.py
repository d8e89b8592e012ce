"""The model and the step that every contender runs. Imports nothing, so that any interpreter can read it."""

VOCAB, HIDDEN, LAYERS = 2048, 256, 4
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 32
EXPERTS, TOP_K, EXPERT_FFN = 8, 1, 512  # and a shared expert of the same width
CHUNK = 256
BATCH, LENGTH = 4, 512
LEARNING_RATE, CLIP_NORM = 1e-3, 1.0  # AdamW, float32
STEPS, WARMUP = 20, 3  # the first WARMUP steps are not counted


def summary(contender: str, versions: str, seconds: list[float], start_up: float) -> dict:
    """One contender's result: seconds of each counted step, and from the process's start to the end of its first step."""
    counted = sorted(seconds[WARMUP:])
    return {
        "contender": contender,
        "versions": versions,
        "best": counted[0],
        "median": counted[len(counted) // 2],
        "start_up": start_up,
    }
