"""Conversations as people write them, checked and brought to one form.

A conversation is a list of messages in the form of Hugging Face's and OpenAI's libraries:

    {"role": "user", "content": "What is this?"}
    {"role": "user", "content": [{"type": "image", "path": "dog.jpg"}, {"type": "text", "text": "What is this?"}]}
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {"at": "dog"}}}]}
    {"role": "tool", "content": "a dog"}

An image is under `path`, `image` (a path, bytes, an array or an image of Pillow's), `base64`, or a data URL in OpenAI's
`image_url`; without any of these it is the next of the pictures that are given beside the messages.
"""

import base64
import binascii
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama4_jax.errors import UserError
from llama4_jax.processing.images import Picture
from llama4_jax.processing.video import VideoSampling, sample_frames, time_label

ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
_SAMPLING = VideoSampling()
_PICTURE = "a path, bytes, a uint8 array or an image of Pillow's"


@dataclasses.dataclass(frozen=True, eq=False)
class Shown:
    """A picture of a conversation, and how many tiles it may take at most; None: as many as any image."""

    picture: Picture
    max_tiles: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Conversation:
    """Messages of plain data, and their pictures in order.

    Each message is a dict with a role and a content: a string, or a list of {"type": "text", "text": ...} and
    {"type": "image"}. Tool calls are {"type": "function", "function": {"name", "arguments": a dict}}. Other keys stay.
    """

    messages: list[dict[str, Any]]
    pictures: list[Shown]


def read_conversation(
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[Picture] = (),
    *,
    folder: Path | None = None,
    video: VideoSampling = _SAMPLING,
) -> Conversation:
    """Checks messages and takes their pictures out; a video becomes its frames, each after its time.

    Args:
        messages: see the module.
        images: of the image parts that carry none themselves.
        folder: to which paths are relative; None: the working directory.
        video: how frames are chosen.

    Raises:
        UserError: an unknown role or kind of content, a field of a wrong type, or more or fewer images than are asked for.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise UserError('a conversation is a list of one message or more, such as [{"role": "user", "content": "Hi"}]')
    if isinstance(images, str | bytes | Mapping) or not isinstance(images, Sequence):
        raise UserError(f"images must be a list, got {images!r:.80}")
    reader = _Reader(list(images), folder, video)
    read = [reader.message(message, f"message {i}") for i, message in enumerate(messages, 1)]
    if reader.given:
        raise UserError(f"{len(reader.given)} of {len(images)} images given have no place in the conversation")
    return Conversation(read, reader.pictures)


class _Reader:
    def __init__(self, given: list[Picture], folder: Path | None, video: VideoSampling):
        self.given, self.folder, self.video = given, folder, video
        self.pictures: list[Shown] = []

    def message(self, message: Mapping[str, Any], here: str) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise UserError(f"{here} must have a role and a content, got {message!r:.80}")
        if message.get("role") not in ROLES:
            raise UserError(f"{here} has the role {message.get('role')!r}, and the roles are {', '.join(ROLES)}")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list | tuple):
            raise UserError(f"{here}: tool_calls must be a list, got {calls!r:.80}")
        read = plain({key: value for key, value in message.items() if key not in ("content", "tool_calls")})
        read["content"] = self.content(message.get("content", "" if calls else None), here)
        if calls:
            read["tool_calls"] = [_tool_call(call, here) for call in calls]
        return read

    def content(self, content: Any, here: str) -> str | list[dict[str, Any]]:
        if isinstance(content, str):
            return plain(content)
        if not isinstance(content, list | tuple):
            raise UserError(f"{here}: the content must be a text or a list of parts, got {content!r:.80}")
        parts = [part for each in content for part in self.part(each, here)]
        if any(part["type"] != "text" for part in parts):
            return parts
        return "".join(part["text"] for part in parts)  # templates for text alone know no lists

    def part(self, part: Any, here: str) -> list[dict[str, Any]]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            return [{"type": "text", "text": plain(part["text"])}]
        if kind in ("image", "image_url"):
            self.pictures.append(Shown(self.picture(part, here)))
            return [{"type": "image"}]
        if kind == "video":
            return self.frames(part, here)
        if kind in ("audio", "input_audio"):
            raise UserError(f"{here} holds audio, which Llama 4 does not hear: leave it out, or write what is said as text")
        raise UserError(
            f"{here}: a part of the content must be of type text, image or video with its text or file, got {part!r:.80}"
        )

    def picture(self, part: Mapping[str, Any], here: str) -> Picture:
        if part["type"] == "image_url":
            url = part.get("image_url")
            return _from_url(url.get("url") if isinstance(url, Mapping) else url, here)
        if "base64" in part:
            return _from_base64(part["base64"], here)
        if "url" in part:
            return _from_url(part["url"], here)
        picture = part.get("path", part.get("image"))
        if picture is None:
            if not self.given:
                raise UserError(f"{here} has an image more than were given: name its file under 'path'")
            picture = self.given.pop(0)
        if isinstance(picture, Mapping | list | int | float):
            raise UserError(f"{here}: an image must be {_PICTURE}, got {picture!r:.80}")
        return self.place(picture) if isinstance(picture, str | Path) else picture

    def frames(self, part: Mapping[str, Any], here: str) -> list[dict[str, Any]]:
        file = part.get("path", part.get("video"))
        if not isinstance(file, str | Path):
            raise UserError(f"{here}: a video must be the path of a file, got {file!r:.80}")
        parts = []
        for frame in sample_frames(self.place(file), self.video):
            self.pictures.append(Shown(frame.image, self.video.max_tiles))
            parts += [{"type": "text", "text": time_label(frame.seconds)}, {"type": "image"}]
        return parts

    def place(self, path: str | Path) -> Path:
        return Path(path) if self.folder is None else self.folder / path


def _tool_call(call: Any, here: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise UserError(f"{here}: a tool call must be a function with a name and arguments, got {call!r:.80}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{here}: the arguments of the tool call {name} are not JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise UserError(f"{here}: the arguments of the tool call {name} must be an object, got {arguments!r:.80}")
    other = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
    return plain({"type": "function"} | other | {"function": {"name": name, "arguments": dict(arguments)}})


def _from_url(url: Any, here: str) -> bytes:
    head, _, content = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not (head.startswith("data:image/") and head.endswith(";base64")):
        raise UserError(
            f"{here}: an image's URL must begin with data:image/...;base64, for nothing is fetched; got {url!r:.60}"
        )
    return _from_base64(content, here)


def _from_base64(content: Any, here: str) -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except (TypeError, binascii.Error, ValueError) as error:
        raise UserError(f"{here}: an image is not in base64: {error}") from None


def read_tools(tools: Any) -> list[dict[str, Any]]:
    """Descriptions of tools as plain data. Raises UserError unless they are a list of objects, or None for no tools."""
    tools = plain([] if tools is None else tools)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"tools must be a list of JSON schemas of functions, got {tools!r:.80}")
    return tools


def plain(value: Any) -> Any:
    """A copy of JSON-like data that holds nothing but the plain types, for templates must not meet objects with methods."""
    if value is None or type(value) in (int, float, bool):
        return value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError("a text holds half of a surrogate pair, which no UTF-8 can express") from None
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    raise UserError(f"messages and tools hold text, numbers, lists and objects, not {type(value).__name__}")
