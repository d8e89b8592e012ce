"""Llama 4's own chat format: conversations to tokens, and what the assistant writes back to a message.

A conversation is `<|begin_of_text|>` and then, of each message, `<|header_start|>role<|header_end|>`, an empty line, the content
and `<|eot|>`. A tool's result (role `ipython`) and an assistant's message that calls tools end in `<|eom|>` instead. The format is
Meta's: llama_models/llama4/chat_format.py and llama3/tool_utils.py; the words that introduce tools are those of the template
that comes with the published checkpoints.
"""

import ast
import dataclasses
import json
import re
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from llama4_jax.errors import UserError
from llama4_jax.processing.tokenizer import BEGIN, Tokenizer

HEADER_START, HEADER_END, EOT, EOM = "<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>"
PYTHON_START, PYTHON_END = "<|python_start|>", "<|python_end|>"
CONTROL = (BEGIN, HEADER_START, HEADER_END, EOT, EOM)

_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython", "ipython": "ipython"}
_ASKED_TOOLS = ("brave_search", "wolfram_alpha", "photogen")  # called as name.call(query="...")
_CODE_TOOL = "code_interpreter"
_TOOLS = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best answers "
    "the given prompt.\n\nRespond in the format "
    '{"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.\n\n'
)


@dataclasses.dataclass
class Encoded:
    """A conversation as tokens.

    Attributes:
        tokens: of all of it, pictures included.
        turns: of each token, which of the assistant's turns it is part of, from 0: what the assistant itself writes, the token
            that ends its turn included; -1 for all else.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    turns: list[int] = dataclasses.field(default_factory=list)

    def add(self, tokens: Sequence[int], turn: int = -1) -> None:
        self.tokens += tokens
        self.turns += [turn] * len(tokens)


class Llama4Format:
    """Encodes conversations for a tokenizer that has Llama 4's control tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids = {name: tokenizer.token_to_id(name) for name in CONTROL}

    @staticmethod
    def fits(tokenizer: Tokenizer) -> bool:
        """Whether the tokenizer has all the control tokens of the format."""
        return all(tokenizer.token_to_id(name) is not None for name in CONTROL)

    def encode(
        self,
        messages: Sequence[dict[str, Any]],
        layouts: Iterable[Sequence[int]] = (),
        *,
        tools: Sequence[dict[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> Encoded:
        """Tokens of messages as read_conversation gives them; `layouts` are the tokens of each picture.

        Raises UserError for a role that Llama 4 does not have, and for tools without a user's message to name them in.
        """
        encoded, layouts, turn = Encoded(), iter(layouts), -1
        encoded.add([self._ids[BEGIN]])
        for message in _with_tools(messages, tools) if tools else messages:
            role = message["role"]
            encoded.add(self._header(role))
            turn += role == "assistant"
            calls = message.get("tool_calls", ())
            here = turn if role == "assistant" else -1
            for part in [*self._content(message["content"], layouts), *(self._tokenizer.encode(_written(c)) for c in calls)]:
                encoded.add(part, here)
            encoded.add([self._ids[EOM if calls or _ROLES[role] == "ipython" else EOT]], here)
        if add_generation_prompt:
            encoded.add(self._header("assistant"))
        return encoded

    def _header(self, role: str) -> list[int]:
        if role not in _ROLES:
            raise UserError(f"Llama 4 has no role {role!r}, but {', '.join(_ROLES)}")
        encode = self._tokenizer.encode
        return [self._ids[HEADER_START], *encode(_ROLES[role]), self._ids[HEADER_END], *encode("\n\n")]

    def _content(self, content: str | list[dict[str, Any]], layouts) -> Iterable[Sequence[int]]:
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            yield self._tokenizer.encode(part["text"]) if part["type"] == "text" else next(layouts)


def _with_tools(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the tools described in the first one of a user."""
    messages = list(messages)
    first = 1 if messages[0]["role"] == "system" else 0
    if len(messages) == first or messages[first]["role"] != "user":
        raise UserError("tools are described in the user's first message, which must come first or after the system's")
    if first:
        messages[0] = messages[0] | {"content": _before("Environment: ipython\n", messages[0]["content"])}
    described = "".join(json.dumps(tool, indent=4, ensure_ascii=False) + "\n\n" for tool in tools)
    messages[first] = messages[first] | {"content": _before(_TOOLS + described, messages[first]["content"])}
    return messages


def _before(text: str, content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    return text + content.strip() if isinstance(content, str) else [{"type": "text", "text": text}, *content]


def _written(call: dict[str, Any]) -> str:
    """A tool call as the assistant writes it."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    if name in _ASKED_TOOLS and "query" in arguments:
        return f'{name}.call(query="{arguments["query"]}")'
    if name == _CODE_TOOL and isinstance(arguments.get("code"), str):
        return arguments["code"]
    return json.dumps({"type": "function", "name": name, "parameters": arguments})


# ------------------------------------------------------------------------------------------------------------------------
# The assistant's reply


def parse_reply(text: str) -> dict[str, Any]:
    """The assistant's message that this text is, tool calls taken out of it.

    Recognised are a JSON object with `name` and `parameters`, a list of calls in Python's syntax, `<function=name>{...}`,
    `tool.call(query="...")`, and code between `<|python_start|>` and `<|python_end|>`. Anything else is content. Nothing is
    evaluated. Arguments are dicts, and `arguments_json` is the same as JSON.
    """
    text = text.strip(" ").removesuffix(EOT).removesuffix(EOM)
    is_python = text.startswith(PYTHON_START)
    if is_python:
        text = text.removeprefix(PYTHON_START).replace(PYTHON_END, "")
    calls = _calls_in(text) or ([(_CODE_TOOL, {"code": text})] if is_python else [])
    if not calls:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": "", "tool_calls": [_tool_call(name, arguments) for name, arguments in calls]}


def _tool_call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments, "arguments_json": json.dumps(arguments)}
    return {"id": str(uuid.uuid4()), "type": "function", "function": function}


def _calls_in(text: str) -> list[tuple[str, dict[str, Any]]]:
    tagged = re.findall(r"<function=([^>}]+)>\s*(\{.*?\})\s*(?:</function>|$)", text, re.DOTALL)
    if tagged and all(_json_object(arguments) is not None for _, arguments in tagged):
        return [(name, _json_object(arguments)) for name, arguments in tagged]
    call = _json_object(text)
    if call is not None and isinstance(call.get("name"), str) and isinstance(call.get("parameters"), dict):
        return [(call["name"], call["parameters"])]
    if calls := _python_calls(text):
        return calls
    asked = re.search(r'\b(\w+)\.call\(query="([^"]*)"\)', text)
    return [(asked[1], {"query": asked[2]})] if asked else []


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _python_calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The calls of a list such as [f(x=1), g(y="a")], whose arguments are literals by name; none if it is anything else."""
    try:
        calls = ast.parse(text.strip(), mode="eval").body
        if not (isinstance(calls, ast.List) and all(isinstance(call, ast.Call) and not call.args for call in calls.elts)):
            return []
        return [
            (ast.unparse(call.func), {k.arg: ast.literal_eval(_Constants().visit(k.value)) for k in call.keywords})
            for call in calls.elts
        ]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return []


class _Constants(ast.NodeTransformer):
    """Reads JSON's constants as Python's."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        values = {"true": True, "false": False, "null": None}
        return ast.Constant(values[node.id]) if node.id in values else node
