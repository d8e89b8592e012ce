"""Everything between people and a model: text, pictures and conversations to tokens and tiles, and tokens back to text.

processor = Processor.load("llama4", config)
prompt = processor.chat([{"role": "user", "content": [{"type": "image", "path": "dog.jpg"}, {"type": "text", "text": "What?"}]}])
prompt.tokens, prompt.tiles
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from llama4_jax.config import ModelConfig
from llama4_jax.errors import UserError
from llama4_jax.processing import chat
from llama4_jax.processing.chat import Encoded, Llama4Format
from llama4_jax.processing.image_tokens import ImageTokens, check_patch_places, tokens_per_tile
from llama4_jax.processing.images import ImageLimits, Picture, choose_grid, cut_tiles, image_size, read_image
from llama4_jax.processing.messages import Conversation, Shown, read_conversation, read_tools
from llama4_jax.processing.ranks import LLAMA4, ranks_tokenizer
from llama4_jax.processing.template_format import TemplateFormat
from llama4_jax.processing.templates import ChatTemplate
from llama4_jax.processing.tokenizer import Tokenizer
from llama4_jax.processing.video import VideoSampling

LossOn = Literal["assistant", "last", "all"]

_TOKENIZER, _RANKS, _SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
_TEMPLATE, _OLD_TEMPLATE = "chat_template.jinja", "chat_template.json"
_GENERATION, _PICTURES = "generation_config.json", "preprocessor_config.json"
_FILES = (_TOKENIZER, _RANKS, _SETTINGS, _TEMPLATE, _OLD_TEMPLATE, _GENERATION, _PICTURES)
_TURN_ENDS = (chat.EOT, chat.EOM)
_IMAGE = "<|image|>"  # what a Llama 4 template writes in a picture's place
_MAX_TILES = 16  # of the published models


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """What a model reads: tokens, and the tiles of their pictures in order; None without pictures."""

    tokens: list[int]
    tiles: UInt8[np.ndarray, "I h w 3"] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingText:
    """A conversation to train on.

    Attributes:
        tokens: of all of it.
        counted: of each token, whether the loss counts its prediction.
        shown: its pictures, not decoded yet: `Processor.tiles` cuts them.
        num_tiles: that they will have.
    """

    tokens: list[int]
    counted: list[bool]
    shown: list[Shown]
    num_tiles: int


class Processor:
    """Prompts for one model.

    Attributes:
        tokenizer: its tokenizer.
        stop_ids: the tokens that end what a model writes.
        max_tiles: of a picture, the global tile aside.
        limits: of pictures.
        video: how frames are chosen.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: ModelConfig,
        *,
        template: ChatTemplate | None = None,
        settings: Mapping[str, Any] | None = None,
        stop_ids: Sequence[int] | None = None,
        max_tiles: int = _MAX_TILES,
    ):
        """A processor of parts; `load` makes one of files.

        Args:
            tokenizer: whose tokens the model has.
            config: of the model.
            template: the chat template; None: Llama 4's own format, where the tokenizer has its control tokens.
            settings: what tokenizer_config.json says, for a template and for the token that begins a prompt.
            stop_ids: None: those of `config`. The tokens that end a turn are added in any case.
            max_tiles: see Processor.

        Raises UserError when the tokenizer has more tokens than the model, or not those of a model that sees.
        """
        tokenizer.require_fits(config.vocab_size)
        self.tokenizer, self.config, self.max_tiles = tokenizer, config, max_tiles
        self.limits, self.video = ImageLimits(), VideoSampling()
        self._settings = dict(settings or {})
        self._vision = config.vision
        self._image_tokens = None if config.vision is None else ImageTokens.of(tokenizer, config.vision)
        ends = (tokenizer.token_to_id(name) for name in _TURN_ENDS)
        self.stop_ids = tuple(dict.fromkeys([*(config.eos_token_ids if stop_ids is None else stop_ids), *ends]))
        self.stop_ids = tuple(token for token in self.stop_ids if token is not None)
        self._format: Llama4Format | TemplateFormat | None = None
        if template is not None:
            self._format = TemplateFormat(tokenizer, template, _named_tokens(self._settings), _IMAGE if config.vision else None)
        elif Llama4Format.fits(tokenizer):
            self._format = Llama4Format(tokenizer)

    @classmethod
    def load(cls, source: str | Path, config: ModelConfig) -> "Processor":
        """The processor of a checkpoint's folder, of one tokenizer file, or of `llama4`, the tokenizer in llama-models.

        A folder holds tokenizer.json (or Meta's tokenizer.model), and may hold tokenizer_config.json, chat_template.jinja or
        .json, generation_config.json and preprocessor_config.json. Raises UserError for a file that is missing or damaged.
        """
        folder = Path(source)
        if source == LLAMA4 or not folder.is_dir():
            return cls(Tokenizer.load(source), config)
        try:
            files = {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
        return cls.from_files(files, config, str(folder))

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], config: ModelConfig, name: str) -> "Processor":
        """The same of a folder's files in memory, by their names; `name` is what messages call the folder."""
        try:
            texts = {each: content.decode() for each, content in files.items() if each in _FILES and each != _RANKS}
        except UnicodeDecodeError as error:
            raise UserError(f"a file of words in {name} is not UTF-8: {error}") from None
        if _TOKENIZER in texts:
            tokenizer = Tokenizer.from_json(texts[_TOKENIZER], f"{name}/{_TOKENIZER}")
        elif _RANKS in files:
            tokenizer = Tokenizer(ranks_tokenizer(files[_RANKS], f"{name}/{_RANKS}"), f"{name}/{_RANKS}")
        else:
            raise UserError(f"no tokenizer in {name}: it has neither {_TOKENIZER} nor {_RANKS}")
        settings = _json_object(texts, _SETTINGS, name)
        return cls(
            tokenizer,
            config,
            template=_find_template(texts, settings, name),
            settings=settings,
            stop_ids=_whole_numbers(texts, _GENERATION, name, "eos_token_id"),
            max_tiles=max(_whole_numbers(texts, _PICTURES, name, "max_patches") or [_MAX_TILES]),
        )

    def save(self, folder: str | Path) -> None:
        """Writes `files` into a folder, made where it is missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (folder / name).write_bytes(content)

    def files(self) -> dict[str, bytes]:
        """The files that `load` and transformers read, by name: tokenizer, its settings, the template, what ends a text."""
        tokenizer, config = self.tokenizer, self.config
        roles = (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("pad", tokenizer.pad_id))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_position_embeddings}
        settings |= {f"{role}_token": tokenizer.decode([token]) for role, token in roles}
        settings |= {key: value for key, value in self._settings.items() if key != "chat_template"}
        texts = {
            _TOKENIZER: tokenizer.to_json(),
            _SETTINGS: _json_text(settings),
            _GENERATION: _json_text({"bos_token_id": config.bos_token_id, "eos_token_id": list(self.stop_ids)}),
        }
        if isinstance(self._format, TemplateFormat):
            texts[_TEMPLATE] = self._format.template.source
        if self._vision is not None:
            side, half = self._vision.image_size, [0.5, 0.5, 0.5]
            texts[_PICTURES] = _json_text(
                {"image_processor_type": "Llama4ImageProcessorFast", "size": {"height": side, "width": side}}
                | {"max_patches": self.max_tiles, "image_mean": half, "image_std": half}
            )
        return {name: text.encode() for name, text in texts.items()}

    # --------------------------------------------------------------------------------------------------------------------
    # In

    def prompt(self, text: str, images: Sequence[Picture] = (), *, allow_special: bool = False) -> Prompt:
        """A text to go on from, after the token that begins a text and the pictures, if any.

        The name of a special token in the text is text, unless `allow_special`. Raises UserError for a picture that cannot be
        read, and for any where the model does not see.
        """
        shown = [Shown(picture) for picture in images]
        pictures = [token for layout in self._layouts(shown) for token in layout]
        return self._with_tiles([*self._prefix(), *pictures, *self.tokenizer.encode(text, allow_special=allow_special)], shown)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        images: Sequence[Picture] = (),
    ) -> Prompt:
        """A conversation (see messages.py) for the assistant to go on.

        Args:
            messages: what was said.
            tools: JSON schemas of functions that the assistant may call.
            add_generation_prompt: whether the assistant's next turn begins at the end.
            images: of the image parts that name none themselves, in order.

        Raises:
            UserError: a role, part or picture that cannot be read; pictures where the model does not see, or more or fewer
                of them than the conversation shows; a conversation that the template refuses; no chat format.
        """
        conversation = read_conversation(messages, images, video=self.video)
        encoded = self._encode(conversation, tools, add_generation_prompt=add_generation_prompt)
        return self._with_tiles(encoded.tokens, conversation.pictures)

    def conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        loss_on: LossOn = "assistant",
        images: Sequence[Picture] = (),
        folder: Path | None = None,
    ) -> TrainingText:
        """A whole conversation to train on. Of its pictures only the headers are read.

        The loss counts what the assistant writes, the token that ends its turn included: in all of its turns, in the `last` one,
        or counts `all` tokens but the first and those of pictures. Paths are relative to `folder`. Raises UserError as `chat`
        does, and where nothing would be counted.
        """
        conversation = read_conversation(messages, images, folder=folder, video=self.video)
        turns = "none" if loss_on == "all" else "last" if loss_on == "last" else "all"
        encoded = self._encode(conversation, tools, turns=turns)
        counted = _counted(encoded, loss_on, self._image_tokens)
        if not any(counted):
            raise UserError(f"with the loss on {loss_on!r} nothing counts in a conversation without a turn of the assistant")
        places = 0 if self._vision is None else encoded.tokens.count(self._vision.patch_token_id)
        per_tile = 1 if self._vision is None else tokens_per_tile(self._vision)
        return TrainingText(encoded.tokens, counted, conversation.pictures, places // per_tile)

    def tiles(self, shown: Shown) -> UInt8[np.ndarray, "I h w 3"]:
        """The tiles of one picture. Raises UserError when it cannot be decoded."""
        image = read_image(shown.picture, self.limits)
        return cut_tiles(image, self._vision.image_size, shown.max_tiles or self.max_tiles).tiles

    def _encode(
        self, conversation: Conversation, tools, *, add_generation_prompt: bool = False, turns: str = "none"
    ) -> Encoded:
        if self._format is None:
            raise UserError(
                f"tokenizer {self.tokenizer.name} comes with no chat template and has not Llama 4's control tokens: "
                "give a folder with chat_template.jinja, or prompt with plain text"
            )
        layouts, tools = self._layouts(conversation.pictures), read_tools(tools)
        options = {"tools": tools, "add_generation_prompt": add_generation_prompt}
        if isinstance(self._format, TemplateFormat):
            options["turns"] = turns
        return self._format.encode(conversation.messages, layouts, **options)

    def _layouts(self, shown: Sequence[Shown]) -> list[list[int]]:
        """The tokens of each picture, by its size alone."""
        if not shown:
            return []
        if self._vision is None:
            raise UserError(
                f"{len(shown)} images for a model without a vision tower: leave them out, or take a model that sees"
            )
        side, per_tile = self._vision.image_size, tokens_per_tile(self._vision)
        grids = (choose_grid(*image_size(s.picture, self.limits), side, s.max_tiles or self.max_tiles) for s in shown)
        return [self._image_tokens.layout(grid, per_tile) for grid in grids]

    def _with_tiles(self, tokens: list[int], shown: Sequence[Shown]) -> Prompt:
        tiles = np.concatenate([self.tiles(each) for each in shown]) if shown else None
        if self._vision is not None:
            check_patch_places(tokens, tiles, self._vision)
        return Prompt(tokens, tiles)

    def _prefix(self) -> list[int]:
        """What begins a prompt: as tokenizer_config.json says, or else as the tokenizer's own file does."""
        prefix, told = self.tokenizer.prefix, self._settings.get("add_bos_token")
        bos = self.tokenizer.token_to_id(_named_tokens(self._settings).get("bos_token", ""))
        return prefix if told is None else [] if not told else prefix or [self.tokenizer.bos_id if bos is None else bos]

    # --------------------------------------------------------------------------------------------------------------------
    # Out

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """The text of tokens, without the special ones unless `keep_special`."""
        return self.tokenizer.decode(ids, keep_special=keep_special)

    def stream(self, *, keep_special: bool = False) -> "TextStream":
        """A decoder for tokens that come one after another."""
        return TextStream(self, keep_special)


class TextStream:
    """Text out of tokens as they come. A character whose bytes are not all there yet waits for them.

    All that `push` and `finish` return, one after another, is `decode` of all tokens.
    """

    def __init__(self, processor: Processor, keep_special: bool = False):
        self._processor, self._keep_special = processor, keep_special
        self._ids: list[int] = []  # some that are decoded, as context, and those that wait
        self._context = 0  # how many are context
        self._sent = 0  # characters of those that wait

    def push(self, token: int) -> str:
        """What this token makes certain."""
        self._ids.append(int(token))
        return self._take(final=False)

    def finish(self) -> str:
        """What is left; bytes that never became a character come as U+FFFD."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        def decode(ids):
            return self._processor.decode(ids, keep_special=self._keep_special)

        before, text = decode(self._ids[: self._context]), decode(self._ids)
        whole = text if final else text.rstrip("\ufffd")
        new = whole[len(before) + self._sent :]
        if final or whole == text:
            self._ids = [] if final else self._ids[self._context :]
            self._context, self._sent = len(self._ids), 0
        else:
            self._sent += len(new)
        return new


# ------------------------------------------------------------------------------------------------------------------------


def _counted(encoded: Encoded, loss_on: LossOn, image: ImageTokens | None) -> list[bool]:
    of_images = set() if image is None else set(dataclasses.asdict(image).values())
    if loss_on == "all":
        return [i > 0 and token not in of_images for i, token in enumerate(encoded.tokens)]
    last = max(encoded.turns, default=-1)
    wanted = (lambda turn: turn == last) if loss_on == "last" else (lambda turn: True)
    pairs = zip(encoded.tokens, encoded.turns, strict=True)
    return [turn >= 0 and wanted(turn) and token not in of_images for token, turn in pairs]


def _json_object(texts: Mapping[str, str], file: str, name: str) -> dict[str, Any]:
    """What the file holds; nothing where there is none."""
    try:
        content = json.loads(texts.get(file, "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}/{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{name}/{file} must hold a JSON object, got {type(content).__name__}")
    return content


def _json_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _find_template(texts: Mapping[str, str], settings: dict[str, Any], name: str) -> ChatTemplate | None:
    """The template in a file of its own, else what tokenizer_config.json holds, of several the one called default."""
    if _TEMPLATE in texts:
        return ChatTemplate(texts[_TEMPLATE], f"{name}/{_TEMPLATE}")
    for file, found in ((_OLD_TEMPLATE, _json_object(texts, _OLD_TEMPLATE, name)), (_SETTINGS, settings)):
        source = found.get("chat_template")
        if isinstance(source, list):
            source = {each.get("name"): each.get("template") for each in source if isinstance(each, dict)}.get("default")
        if isinstance(source, str):
            return ChatTemplate(source, f"{name}/{file}")
    return None


def _whole_numbers(texts: Mapping[str, str], file: str, name: str, key: str) -> list[int] | None:
    """The number, or numbers, under a key of a file; None where there are none."""
    value = _json_object(texts, file, name).get(key)
    if value is None:
        return None
    numbers = value if isinstance(value, list) else [value]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise UserError(f"{name}/{file}: {key} must be whole numbers, got {value!r:.80}")
    return numbers


def _named_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """bos_token and the like, which a template may write."""
    tokens = {key: value for key, value in settings.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in tokens.items()}
    return {key: value for key, value in texts.items() if isinstance(value, str)}
