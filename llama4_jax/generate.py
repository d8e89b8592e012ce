r"""Text out of a model: goes on from a prompt, answers in a chat, looks at pictures.

    python -m llama4_jax.generate --model=DIR --prompt="Once upon a time"
    python -m llama4_jax.generate --model=DIR --chat --prompt="What is in this picture?" --image=dog.jpg
    python -m llama4_jax.generate --model=DIR --chat                     # a conversation in the terminal; Ctrl-D ends it
    python -m llama4_jax.generate --model=DIR --messages=conversation.json

DIR is a checkpoint of any format that llama4_jax.convert reads, or a training run's --workdir. Several --prompt are read and decoded
together. Exit status: 0 finished, 2 bad input.
"""

import json
from pathlib import Path

from absl import flags

from llama4_jax import app
from llama4_jax.errors import UserError

_MODEL = flags.DEFINE_string("model", None, "checkpoint: a folder, a .gguf file, a hub name, or a training run's --workdir")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "text to go on from, or with --chat the user's turn; several make a batch")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "a file whose text is the prompt")
_CHAT = flags.DEFINE_bool("chat", False, "put prompts into the model's chat format; without a prompt, talk in the terminal")
_MESSAGES = flags.DEFINE_string("messages", None, "JSON file of a conversation: a list of messages for the model to answer")
_SYSTEM = flags.DEFINE_string("system", None, "the system prompt of --chat")
_IMAGE = flags.DEFINE_multi_string("image", [], "PNG, JPEG or WebP file that stands before the prompt")
_VIDEO = flags.DEFINE_multi_string("video", [], "video file whose frames stand before the prompt; needs --chat")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "tokens to write at most", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "of the sampling; 0 takes the likeliest token", lower_bound=0)
_TOP_K = flags.DEFINE_integer("top_k", None, "draw from that many of the likeliest tokens", lower_bound=1)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "draw from the likeliest tokens that together reach this probability")
_MIN_P = flags.DEFINE_float("min_p", 0.0, "never draw a token less likely than this share of the likeliest")
_STOP = flags.DEFINE_multi_string("stop", [], "a string that ends the text; may be given several times")
_SEED = flags.DEFINE_integer("seed", 0, "of the sampling")


def main(overrides: dict[str, str]) -> int:
    if overrides:
        raise UserError("--config.* belongs to training; generate takes --model")
    if _MODEL.value is None:
        raise UserError("--model=DIR is needed")
    check_flags()
    from llama4_jax.inference.generator import Limits, load_generator  # after the flags: a misspelt one answers at once
    from llama4_jax.inference.sampling import Sampling

    sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _MIN_P.value)
    limits = Limits(_MAX_NEW_TOKENS.value, tuple(_STOP.value))
    generator = load_generator(_MODEL.value)
    if _CHAT.value and not _texts() and _MESSAGES.value is None:
        talk(generator, sampling, limits)
        return 0
    prompts = make_prompts(generator.processor)
    if len(prompts) == 1:
        show(generator.stream(prompts[0], sampling, limits, seed=_SEED.value))
        return 0
    for number, completion in enumerate(generator.complete(prompts, sampling, limits, seed=_SEED.value), start=1):
        print(f"--- {number}\n{completion.text}")
    return 0


def check_flags() -> None:
    """Raises UserError for flags that do not go together."""
    if not (_CHAT.value or _MESSAGES.value or _texts()):
        raise UserError("nothing to go on from: give --prompt, --prompt_file, --messages, or --chat for a conversation")
    if _MESSAGES.value and (_texts() or _IMAGE.value or _VIDEO.value or _SYSTEM.value):
        raise UserError("--messages holds a whole conversation: it goes without --prompt, --system, --image and --video")
    if (_SYSTEM.value or _VIDEO.value) and not _CHAT.value:
        raise UserError(f"--{'system' if _SYSTEM.value else 'video'} needs --chat")
    if (_IMAGE.value or _VIDEO.value) and len(_texts()) > 1:
        raise UserError(f"pictures go with one prompt, got {len(_texts())}")


def _texts() -> list[str]:
    """The prompts of the flags."""
    if _PROMPT_FILE.value is None:
        return list(_PROMPT.value)
    try:
        return [*_PROMPT.value, Path(_PROMPT_FILE.value).read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --prompt_file={_PROMPT_FILE.value}: {error}") from None


def make_prompts(processor) -> list:
    """What the flags ask the model to go on from."""
    if _MESSAGES.value:
        return [processor.chat(read_messages(_MESSAGES.value))]
    if _CHAT.value:
        return [processor.chat([*opening(), user_turn(text)]) for text in _texts()]
    return [processor.prompt(text, _IMAGE.value) for text in _texts()]


def read_messages(path: str) -> list[dict]:
    try:
        messages = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --messages={path}: {error}") from None
    if not isinstance(messages, list):
        raise UserError(f"--messages={path} must hold a JSON list of messages, got {type(messages).__name__}")
    return messages


def opening() -> list[dict]:
    return [{"role": "system", "content": _SYSTEM.value}] if _SYSTEM.value else []


def user_turn(text: str, first: bool = True) -> dict:
    """A turn of the user; the first one shows the pictures."""
    files = [("image", path) for path in _IMAGE.value] + [("video", path) for path in _VIDEO.value] if first else []
    parts = [{"type": kind, "path": path} for kind, path in files]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def talk(generator, sampling, limits) -> None:
    """A conversation in the terminal, each turn read from the start: what was said may be edited by the chat format."""
    messages = opening()
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        messages.append(user_turn(text, first=not any(m["role"] == "user" for m in messages)))
        prompt = generator.processor.chat(messages)
        answer = show(generator.stream(prompt, sampling, limits, seed=_SEED.value + len(messages)))
        messages.append({"role": "assistant", "content": answer})


def show(pieces) -> str:
    """Prints text as it comes, and returns it."""
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


if __name__ == "__main__":
    app.run(main)
