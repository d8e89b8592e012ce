"""Conversations to tokens by the chat template of a checkpoint, whatever people write in their messages.

A template renders one string, in which nothing tells its own control tokens from the same names in a message. So while it renders,
one character of every name, such as the < of <|eot|>, is another, private one in what people wrote. A name in the rendered string
is then the template's, whatever it does to texts: copy, trim, cut, split, replace or join them. (Only one that writes "<" and then a
text as a name would be deceived.) What the assistant wrote may be looked into by a template, for </think> and the like, so there the
character is exchanged only in names of special tokens and in the beginning of one at a text's end, which the next text could complete.

Then the characters are turned back, and all is encoded as transformers does, so a conversation without such names gives the same
tokens; only texts in which people wrote one are encoded by themselves, as plain text.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from llama4_jax.errors import UserError
from llama4_jax.processing.chat import Encoded
from llama4_jax.processing.messages import ROLES
from llama4_jax.processing.templates import ChatTemplate
from llama4_jax.processing.tokenizer import Tokenizer

_PRIVATE = range(0xF0000, 0xFFFFE)
_OWN_WORDS = {*ROLES, "text", "image", "function"}


class TemplateFormat:
    """Encodes conversations by a chat template."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, variables: dict[str, str], image_token: str | None = None):
        """`variables` are those that the template may name beside the conversation: bos_token and the like. `image_token` is
        what the template writes in a picture's place."""
        self.template, self._variables = template, variables
        special = [name for name in tokenizer.special_tokens if not name.isspace()]
        # A token that text may become, such as <think>, is a control token where the template names it; of the assistant's
        # own messages it is a part.
        ordinary = tokenizer.added_tokens.keys() - tokenizer.special_tokens.keys()
        named = sorted(name for name in ordinary if name in template.source and not name.isspace())
        self._special, self._names = _Names(special), _Names([*special, *named])
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
        messages = [
            private.in_names(m, self._special) if m["role"] == "assistant" else private.everywhere(m, self._names)
            for m in messages
        ]
        marks = (private.unused(), private.unused()) if self.template.marks_generation and turns != "none" else ("", "")
        render = _Renderer(
            self.template, marks, {"tools": private.everywhere(list(tools), self._names) or None, **self._variables}
        )
        text = render(messages, add_generation_prompt)
        encoded, pictures = Encoded(), iter(layouts)
        for piece, turn in [(text, -1)] if turns == "none" else self._turns(text, messages, render, turns):
            encoded.add(self._encode(piece, private, pictures), turn)
        if next(pictures, None) is not None:
            raise UserError(f"the chat template {self.template.name} leaves out an image of the conversation")
        return encoded

    def _encode(self, text: str, private: "_Private", pictures) -> list[int]:
        own = [match.span() for match in self._names.pattern.finditer(text)]  # the template's
        text = private.restored(text)
        if own == [match.span() for match in self._names.pattern.finditer(text)]:
            ids = self._tokenizer.encode(text, allow_special=True)
        else:
            ids, done = [], 0
            for start, end in zip([0, *(end for _, end in own)], [*(start for start, _ in own), len(text)], strict=True):
                if self._names.pattern.search(text[start:end]):
                    ids += self._tokenizer.encode(text[done:start], allow_special=True) + self._plain.encode(text[start:end])
                    done = end
            ids += self._tokenizer.encode(text[done:], allow_special=True)
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
        self.guards = {
            next((character for character in name if not (character.isalnum() or character.isspace())), name[0])
            for name in names
        }
        self._names, self._longest = set(names), max(map(len, names), default=0)
        self._beginnings = {name[:end] for name in names for end in range(1, len(name))}

    def unfinished(self, text: str) -> int:
        """Where the longest beginning of a name starts that the text ends in; its end if there is none."""
        starts = range(max(len(text) - self._longest + 1, 0), len(text))
        return next((start for start in starts if text[start:] in self._beginnings), len(text))

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
    """Characters that stand for others; none of them occurs in what is given."""

    def __init__(self, given: Any):
        used = {character for text in _strings(given) for character in text if ord(character) >= _PRIVATE[0]}
        self._free = (chr(code) for code in _PRIVATE if chr(code) not in used)
        self._of: dict[str, str] = {}

    def unused(self) -> str:
        """A character that stands for nothing yet."""
        return next(self._free)

    def everywhere(self, value: Any, names: _Names) -> Any:
        """The data with each character that a name depends on exchanged."""
        return _in_texts(value, lambda text: self._exchanged(text, names))

    def in_names(self, value: Any, names: _Names) -> Any:
        """The data with such characters exchanged in names, and in the beginning of one at a text's end (white space aside)."""

        def exchanged(text: str) -> str:
            text = names.pattern.sub(lambda match: self._exchanged(match.group(), names), text)
            end = len(text.rstrip())
            start = names.unfinished(text[:end])
            return text[:start] + self._exchanged(text[start:end], names) + text[end:]

        return _in_texts(value, exchanged)

    def restored(self, text: str) -> str:
        """The text as it was."""
        return text.translate({ord(private): character for character, private in self._of.items()})

    def _exchanged(self, text: str, names: _Names) -> str:
        for character in names.guards - self._of.keys():
            self._of[character] = self.unused()
        return text.translate({ord(character): self._of[character] for character in names.guards})


def _in_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The data with its texts changed, but for the words of our own form, which templates compare."""
    if isinstance(value, dict):
        return {key if key.isidentifier() else change(key): _in_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_in_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) and value not in _OWN_WORDS else value


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in [*value.keys(), *value.values()]:
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
