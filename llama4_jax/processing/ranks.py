"""Llama 4's tokenizer from its published form: a file of byte strings in the order in which they merge ("ranks").

Each line of the file is a token's bytes in base64 and its rank, which is its id; this is the form that tiktoken reads. The file
comes with Meta's llama-models package or from the user, under Meta's licence; it is no part of this project. The rule that
cuts a text into pieces and the special tokens are not in the file, so they are here.
"""

import base64
import importlib.util
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from llama4_jax.errors import UserError

LLAMA4 = "llama4"  # names the file inside an installed llama-models

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPLIT = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",  # a word that ends in lower case
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",  # another word
        r"\p{N}{1,3}",  # digits by threes
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",  # punctuation
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_NUM_SPECIAL_TOKENS = 2048
_LLAMA3_RANKS = 128_000


def wheel_file() -> Path:
    """The rank file of the installed llama-models. Raises UserError when it is not installed."""
    package = importlib.util.find_spec("llama_models")  # found, not imported: it would want tiktoken
    for folder in package.submodule_search_locations if package else ():
        if (path := Path(folder, "llama4", "tokenizer.model")).is_file():
            return path
    raise UserError(
        "Llama 4's tokenizer comes with Meta's llama-models, which is not installed: "
        "pip install 'llama4-jax[llama-tokenizer]', or give the path of a tokenizer.model"
    )


def read_ranks(path: Path) -> list[bytes]:
    """The tokens of a rank file, by rank. Raises UserError, naming the line, when it is not one."""
    return parse_ranks(_read(path), str(path))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no tokenizer at {path}: give the path of a tokenizer.model") from None
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from None


def parse_ranks(content: bytes, name: str) -> list[bytes]:
    """The same of a file's bytes; `name` is what messages call it."""
    tokens = []
    for rank, line in enumerate(content.splitlines()):
        try:
            token, number = line.split()
            tokens.append(base64.b64decode(token, validate=True))
            if int(number) != rank or not tokens[-1]:
                raise ValueError
        except ValueError:
            raise UserError(f"{name} is not a file of ranks: line {rank + 1} is not a token in base64 and {rank}") from None
    if len(set(tokens)) < len(tokens):
        raise UserError(f"{name} is not a file of ranks: a token is there twice")
    return tokens


def load_ranks(path: Path, keep: int | None = None) -> tokenizers.Tokenizer:
    """A tokenizer from a rank file, with the ids of Llama 4: see ranks_tokenizer. Raises UserError for a file that is not one."""
    return ranks_tokenizer(_read(path), str(path), keep)


def ranks_tokenizer(content: bytes, name: str, keep: int | None = None) -> tokenizers.Tokenizer:
    """A tokenizer from a rank file's bytes, with the ids of Llama 4: the ranks, then 2,048 special tokens.

    `keep` cuts it to the first `keep` ranks; then the special tokens that have a meaning follow alone, in their order, and the
    reserved ones are left out. Raises UserError for a file that is not one, or when a byte is not among the ranks.
    """
    tokens = parse_ranks(content, name)
    if len(tokens) == _LLAMA3_RANKS:
        raise UserError(f"{name} is Llama 3's tokenizer, which cuts text by another rule: give Llama 4's tokenizer.model")
    if keep is not None:
        if not 0 < keep <= len(tokens):
            raise UserError(f"DataConfig.tokenizer_ranks={keep} must be 1 to {len(tokens)}, the number of ranks in {name}")
        tokens = tokens[:keep]
    missing = {bytes([byte]) for byte in range(256)} - set(tokens)
    if missing:
        raise UserError(
            f"the {len(tokens)} ranks of {name} lack {len(missing)} of the 256 bytes, so not every text could be written"
        )
    letters = _letters()
    vocabulary = {"".join(letters[byte] for byte in token): rank for rank, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(vocabulary), ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    specials = special_tokens() if keep is None else named_special_tokens()
    backend.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in specials])
    return backend


def special_tokens() -> list[str]:
    """The names of Llama 4's special tokens, in the order of their ids."""

    def reserved(kind, first, last):
        return [f"{kind}reserved_special_token_{i}" for i in range(first, last + 1)]

    names = ["begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"]
    names += ["header_start", "header_end", "eom", "eot", "step", *reserved("text_post_train_", 0, 5)]
    names += ["python_start", "python_end", "finetune_right_pad", *reserved("text_post_train_", 8, 68)]
    names += ["image_start", "image_end", *reserved("vision_", 0, 1), "tile_x_separator", "tile_y_separator"]
    names += [*reserved("vision_", 2, 5), "image", *reserved("vision_", 6, 6), "patch", *reserved("vision_", 7, 1047)]
    names += [*reserved("reasoning_", 0, 7), "reasoning_thinking_start", "reasoning_thinking_end"]
    names += reserved("", 0, _NUM_SPECIAL_TOKENS - len(names) - 1)
    return [f"<|{name}|>" for name in names]


def named_special_tokens() -> list[str]:
    """Those of them that have a meaning."""
    return [name for name in special_tokens() if "reserved" not in name]


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, in the order of what it makes: what merging by rank means."""
    pairs = []
    for token in vocabulary:
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs += sorted(
            (pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary),
            key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]),
        )
    return pairs


def _letters() -> list[str]:
    """The printable letter that stands for each byte in `tokenizers`' byte-level models."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("\u00a1"), ord("\u00ac") + 1),
        *range(ord("\u00ae"), ord("\u00ff") + 1),
    ]
    letters, others = [], 0
    for byte in range(256):
        if byte in printable:
            letters.append(chr(byte))
        else:
            letters.append(chr(256 + others))
            others += 1
    return letters
