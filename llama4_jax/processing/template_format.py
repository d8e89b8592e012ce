"""Conversations to tokens by the chat template of a checkpoint, whatever people write in their messages.

A template renders one string, in which nothing tells its own control tokens from the same names in a message. So before it renders,
each control token's name in a message is replaced by one private character, and so is an unfinished name at a text's end, which
the next text could complete. In the rendered string every name is then the template's; the private characters are turned back and
encoded as plain text. This holds for templates that copy, trim, cut, split or join what they are given; only one that puts a name
together from parts of a message, such as "<|" + text + "|>", could be made to write a control token, and means to.

The rest is encoded as transformers does, so a conversation without such names gives the same tokens.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from llama4_jax.errors import UserError
from llama4_jax.processing.chat import Encoded
from llama4_jax.processing.templates import ChatTemplate
from llama4_jax.processing.tokenizer import Tokenizer

_PRIVATE = range(0xF0000, 0xFFFFE)


class TemplateFormat:
    """Encodes conversations by a chat template."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, variables: dict[str, str], image_token: str | None = None):
        """`variables` are those that the template may name beside the conversation: bos_token and the like. `image_token` is
        what the template writes in a picture's place."""
        self.template, self._variables = template, variables
        special = list(tokenizer.special_tokens)
        # A token that text may become, such as <think>, is a control token where the template names it; of the assistant's
        # own messages it is a part.
        named = [name for name in tokenizer.added_tokens if name not in tokenizer.special_tokens and name in template.source]
        self._special, self._others = _Names(special), _Names([*special, *named])
        self._tokenizer, self._plain = tokenizer, tokenizer.with_special(named)
        self._image = None if image_token is None else tokenizer.token_to_id(image_token)

    def encode(
        self,
        messages: Sequence[dict[str, Any]],
        layouts: Iterable[Sequence[int]] = (),
        *,
        tools: Sequence[dict[str, Any]] = (),
        add_generation_prompt: bool = False,
        turns: Literal["none", "last", "all"] = "none",
    ) -> Encoded:
        """Tokens of messages as read_conversation gives them; `layouts` are the tokens of each picture.

        `turns` says which of the assistant's turns to tell: those that `{% generation %}` marks, or what a turn adds to the
        text before it. Raises UserError where the template refuses, or writes the text before a turn anew after it.
        """
        layouts = list(layouts)
        private = _Private([messages, tools, self._variables, self.template.source])
        messages = [private.replace(m, self._special if m["role"] == "assistant" else self._others) for m in messages]
        marks = (private.unused(), private.unused()) if self.template.marks_generation and turns != "none" else ("", "")
        render = _Renderer(
            self.template, marks, {"tools": private.replace(list(tools), self._others) or None, **self._variables}
        )
        text = render(messages, add_generation_prompt)
        encoded, pictures = Encoded(), iter(layouts)
        for piece, turn in [(text, -1)] if turns == "none" else self._turns(text, messages, render, turns):
            encoded.add(self._encode(piece, private, pictures), turn)
        if next(pictures, None) is not None:
            raise UserError(f"the chat template {self.template.name} leaves out an image of the conversation")
        return encoded

    def _encode(self, text: str, private: "_Private", pictures) -> list[int]:
        ids = []
        for i, piece in enumerate(private.split(text)):
            if i % 2:
                ids += self._plain.encode(private.texts[piece])
            elif piece:
                ids += self._tokenizer.encode(piece, allow_special=True)
        if self._image is None or self._image not in ids:
            return ids
        try:
            return [token for each in ids for token in (next(pictures) if each == self._image else [each])]
        except StopIteration:
            raise UserError(f"the chat template {self.template.name} shows more images than the conversation has") from None

    def _turns(self, text: str, messages, render: "_Renderer", turns: str) -> list[tuple[str, int]]:
        """The text in pieces, each with the turn of the assistant that it is, or -1."""
        if self.template.marks_generation:
            pieces = re.split(f"[{''.join(render.marks)}]", text)
            return [(piece, i // 2 if i % 2 else -1) for i, piece in enumerate(pieces) if piece]
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        pieces, done = [], 0
        for turn, place in enumerate(places):
            if turns == "last" and place != places[-1]:
                continue
            before, after = render(messages[:place], True), render(messages[: place + 1], False)
            if not (text.startswith(after) and after.startswith(before) and len(before) >= done):
                raise UserError(
                    f"the chat template {self.template.name} writes the assistant's turn {turn + 1} otherwise than it prompts for "
                    "it, or anew when others follow, so its part cannot be told: count the loss on 'last' or 'all'"
                )
            end = len(before) + len(self._without_space_at_end(after[len(before) :]))
            pieces += [(text[done : len(before)], -1), (text[len(before) : end], turn)]
            done = end
        return [*pieces, (text[done:], -1)]

    def _without_space_at_end(self, text: str) -> str:
        """White space after the token that ends a turn comes from the template, and nobody generates it."""
        bare = text.rstrip()
        return bare if self._special.ends(bare) else text


class _Names:
    """Names of tokens, to be found in texts."""

    def __init__(self, names: Sequence[str]):
        longest_first = sorted(names, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) is nowhere
        self._names, self._longest = set(names), max(map(len, names), default=0)
        self._beginnings = {name[:end] for name in names for end in range(1, len(name))}

    def unfinished(self, text: str) -> int | None:
        """Where the longest beginning of a name starts that the text ends in."""
        starts = range(max(len(text) - self._longest + 1, 0), len(text))
        return next((start for start in starts if text[start:] in self._beginnings), None)

    def ends(self, text: str) -> bool:
        """Whether the text ends in a name."""
        return any(text[start:] in self._names for start in range(max(len(text) - self._longest, 0), len(text)))


class _Renderer:
    def __init__(self, template: ChatTemplate, marks: tuple[str, str], variables: dict[str, Any]):
        self._template, self.marks, self._variables = template, marks, variables

    def __call__(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
        variables = self._variables | {
            "messages": list(messages),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._template.render(variables, self.marks)


class _Private:
    """Characters that stand for texts; none of them occurs in what is given."""

    def __init__(self, given: Any):
        used = {character for text in _strings(given) for character in text if ord(character) >= _PRIVATE[0]}
        self._free = (chr(code) for code in _PRIVATE if chr(code) not in used)
        self._characters: dict[str, str] = {}
        self.texts: dict[str, str] = {}

    def character(self, text: str) -> str:
        """The one for this text."""
        if text not in self._characters:
            self._characters[text] = self.unused()
            self.texts[self._characters[text]] = text
        return self._characters[text]

    def unused(self) -> str:
        """A character that stands for nothing yet."""
        return next(self._free)

    def replace(self, value: Any, names: "_Names") -> Any:
        """The data with each of the names replaced, also the beginning of one at a text's end (white space aside)."""
        if isinstance(value, dict):
            return {self.replace(key, names): self.replace(item, names) for key, item in value.items()}
        if isinstance(value, list):
            return [self.replace(item, names) for item in value]
        if not isinstance(value, str):
            return value
        value = names.pattern.sub(lambda match: self.character(match.group()), value)
        bare = value.rstrip()
        start = names.unfinished(bare)
        return value if start is None else bare[:start] + self.character(bare[start:]) + value[len(bare) :]

    def split(self, text: str) -> list[str]:
        """Text, private character, text, private character, ... text."""
        return re.split(f"([{''.join(self.texts)}])", text) if self.texts else [text]


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in [*value.keys(), *value.values()]:
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
