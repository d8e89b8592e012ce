"""Text to token ids and back: any tokenizer.json, Llama 4's own tokenizer, or a byte-level BPE trained here."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from llama4_jax.errors import UserError
from llama4_jax.processing.ranks import LLAMA4, load_ranks, wheel_file

BEGIN, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad|>"

# A tokenizer.json does not say which of its tokens begins a text, ends it, or pads: published names, in order of choice.
_BEGIN_NAMES = (BEGIN, "<s>", "<bos>", "<|endoftext|>")
_END_NAMES = (END, "</s>", "<eos>", "<|endoftext|>")
_PAD_NAMES = (PAD, "<|finetune_right_pad_id|>", "<pad>", *_END_NAMES)

# No merge crosses the pieces that this cuts a text into. Fewer tokens than GPT-2's rule on source code by about 8% at
# 4096 of them, because a line's end and the indentation after it become one token.
_SPLIT = "|".join(
    (
        r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+",  # a word with the space, dot, underscore ... before it
        r"\p{N}{1,3}",  # digits by threes
        r" ?[^\s\p{L}\p{M}\p{N}]+(?:[\r\n]+[ \t]*)?",  # punctuation, with the line's end and the next one's indentation
        r"[\r\n]+[ \t]*",  # line ends and the next line's indentation
        r"[ \t]+(?=[\r\n])",  # white space before a line's end
        r"\s+(?!\S)",  # other white space, but for the space that belongs to a word
        r"\s+",
    )
)


def tokenizer_file(source: str | Path) -> Path:
    """The file that `source` names. Raises UserError for `llama4` where llama-models is not installed."""
    return wheel_file() if source == LLAMA4 else Path(source)


class Tokenizer:
    """Encodes and decodes text. A special token's name in a text is text, never the token, unless asked."""

    def __init__(self, backend: tokenizers.Tokenizer, name: str):
        """`name` is what error messages call it. Raises UserError when no known token begins or ends a text."""
        # Without this the name of a control token in a document would become that token.
        backend.encode_special_tokens = True
        # A published file may ask for either; both would lose or invent tokens here.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.name = name
        self.bos_id = self._find(_BEGIN_NAMES, "begins")
        self.eos_id = self._find(_END_NAMES, "ends")
        self.pad_id = self._find(_PAD_NAMES, "pads")

    @classmethod
    def train_bpe(cls, documents: Iterable[str], vocab_size: int, specials: Sequence[str] = (BEGIN, END, PAD)) -> Tokenizer:
        """A byte-level BPE of at most `vocab_size` tokens, lossless for every text; the same input gives the same one.

        It has fewer tokens when the documents repeat too little to fill it. `specials` are its special tokens, whose ids
        count from 0. Raises UserError when `vocab_size` leaves no room for the 256 bytes and the special tokens.
        """
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        smallest = len(alphabet) + len(specials)
        if vocab_size < smallest:
            raise UserError(f"a byte-level BPE needs a vocabulary of at least {smallest} tokens, got {vocab_size}")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(documents, trainer)
        return cls(backend, "bpe")

    @classmethod
    def load(cls, source: str | Path, ranks: int | None = None) -> Tokenizer:
        """Reads a tokenizer.json, a tokenizer.model (Llama 4's file of ranks), or `llama4`, the one in llama-models.

        `ranks` cuts a tokenizer.model to its first ranks, for small models: see load_ranks. Raises UserError when the file is
        missing, unreadable, or of another form, and when something else than a tokenizer.model is to be cut.
        """
        path = tokenizer_file(source)
        if path.suffix == ".model":
            return cls(load_ranks(path, ranks), str(source))
        if ranks is not None:
            raise UserError(f"DataConfig.tokenizer_ranks cuts a tokenizer.model, not {source}")
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"no tokenizer at {path}: give the path of a tokenizer.json") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the tokenizer {path}: {error}") from None
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, name: str) -> Tokenizer:
        """From what a tokenizer.json holds; `name` is what messages call it. Raises UserError when it is not one."""
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # what the library raises for a malformed file is a bare Exception
            raise UserError(f"{name} is not a tokenizer.json: {error}") from None
        return cls(backend, name)

    def to_json(self) -> str:
        """A tokenizer.json that `load`, tokenizers and transformers read."""
        return self._backend.to_str(pretty=True)

    def save(self, path: str | Path) -> None:
        """Writes `to_json`."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of the text alone: no token is added before or after it.

        With `allow_special` the names of special tokens become those tokens: for text that the caller vouches for.
        """
        backend = self._recognising if allow_special else self._backend
        return backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, over all cores."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, keep_special: bool = True) -> str:
        """The text of the ids, special tokens by their names. Bytes that are no UTF-8 become U+FFFD, unused ids nothing."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=not keep_special)

    @property
    def prefix(self) -> list[int]:
        """What the file puts before a text; where it has no rule for it, the token that begins a document."""
        if self._backend.post_processor is None:
            return [self.bos_id]
        bare, whole = self.encode("a"), self._backend.encode("a").ids
        places = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[: next(places, 0)]

    def token_to_id(self, name: str) -> int | None:
        """The id of a token by its name, or None."""
        return self._backend.token_to_id(name)

    @property
    def special_tokens(self) -> dict[str, int]:
        """The names and ids of the tokens that text never becomes by itself."""
        return {token.content: i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}

    @property
    def added_tokens(self) -> dict[str, int]:
        """The special tokens and those that stand for their names wherever these occur, such as `<think>` of some models."""
        return {token.content: i for i, token in self._backend.get_added_tokens_decoder().items()}

    def with_special(self, names: Iterable[str]) -> Tokenizer:
        """This one, in which these tokens are special too."""
        names = [name for name in names if name not in self.special_tokens]
        if not names:
            return self
        backend = copy.copy(self._backend)
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        return Tokenizer(backend, self.name)

    @functools.cached_property
    def _recognising(self) -> tokenizers.Tokenizer:
        # A copy: the switch is the backend's own, and other threads may be encoding.
        backend = copy.copy(self._backend)
        backend.encode_special_tokens = False
        return backend

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def require_fits(self, model_vocab_size: int) -> None:
        """Raises UserError unless a model with that many embeddings has one for every id."""
        if self.vocab_size > model_vocab_size:
            raise UserError(
                f"tokenizer {self.name} has {self.vocab_size} tokens, more than the model's {model_vocab_size}: "
                f"set ModelConfig.vocab_size to {self.vocab_size} or more"
            )

    def _find(self, names: Sequence[str], role: str) -> int:
        ids = (self._backend.token_to_id(name) for name in names)
        found = next((token for token in ids if token is not None), None)
        if found is None:
            raise UserError(f"tokenizer {self.name} has no token that {role} a text; looked for {', '.join(names)}")
        return found
