import json
import sys
import unittest.mock
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.errors import UserError
from llama4_jax.processing.chat import CONTROL, PYTHON_END, PYTHON_START, Llama4Format, parse_reply
from llama4_jax.processing.messages import read_conversation
from llama4_jax.processing.ranks import named_special_tokens
from llama4_jax.processing.tokenizer import Tokenizer

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_bpe(["How is the weather? It is sunny. " * 3], 400, named_special_tokens())


@pytest.fixture(scope="module")
def form(tokenizer):
    return Llama4Format(tokenizer)


def turn(role, content="", **extra):
    return {"role": role, "content": content, **extra}


def call(name, arguments):
    return {"function": {"name": name, "arguments": arguments}}


def text_of(tokenizer, form, messages, **options):
    return tokenizer.decode(form.encode(read_conversation(messages).messages, **options).tokens)


def test_a_conversation_reads_as_published(tokenizer, form):
    messages = [turn("system", "Be terse."), turn("user", "Hi"), turn("assistant", "Yo"), turn("user", " again\n")]
    assert text_of(tokenizer, form, messages, add_generation_prompt=True) == (
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe terse.<|eot|><|header_start|>user<|header_end|>\n\nHi<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\nYo<|eot|><|header_start|>user<|header_end|>\n\n again\n<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    )


def test_calls_and_results_end_the_message_and_not_the_turn(tokenizer, form):
    messages = [
        turn("user", "?"),
        turn("assistant", "Let me see. ", tool_calls=[call("weather", {"at": "Rome"}), call("brave_search", {"query": "sun"})]),
        turn("tool", "sunny"),
        turn("assistant", "Sunny."),
    ]
    assert text_of(tokenizer, form, messages).partition("assistant")[2] == (
        '<|header_end|>\n\nLet me see. {"type": "function", "name": "weather", "parameters": {"at": "Rome"}}'
        'brave_search.call(query="sun")<|eom|><|header_start|>ipython<|header_end|>\n\nsunny<|eom|>'
        "<|header_start|>assistant<|header_end|>\n\nSunny.<|eot|>"
    )


def test_tools_stand_before_the_users_first_words(tokenizer, form):
    text = text_of(tokenizer, form, [turn("system", "Be terse."), turn("user", " Hi ")], tools=[TOOL])
    assert "\n\nEnvironment: ipython\nBe terse.<|eot|>" in text
    assert "\n\nGiven the following functions, please respond" in text
    assert json.dumps(TOOL, indent=4) + "\n\nHi<|eot|>" in text
    pictured = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert text_of(tokenizer, form, pictured, tools=[TOOL]).endswith("\n\nHi<|eot|>")
    with pytest.raises(UserError, match="tools are described in the user's first message"):
        form.encode([turn("assistant", "Hi")], tools=[TOOL])


def test_the_assistants_turns_are_what_it_writes_itself(tokenizer, form):
    messages = [turn("user", "a"), turn("assistant", "b c"), turn("user", "d"), turn("assistant", "e")]
    encoded = form.encode(messages, add_generation_prompt=True)
    for number, text in enumerate(["b c<|eot|>", "e<|eot|>"]):
        here = [token for token, turn in zip(encoded.tokens, encoded.turns, strict=True) if turn == number]
        assert tokenizer.decode(here) == text
    assert set(encoded.turns) == {-1, 0, 1}


def test_pictures_take_their_places_in_order(tokenizer, form):
    messages = [turn("user", [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}])]
    tokens = form.encode(messages, [[1, 2], [3]]).tokens
    assert tokens[-5 - len(tokenizer.encode("or")) + 1 : -1] == [1, 2, *tokenizer.encode("or"), 3]


@pytest.mark.parametrize("role", ["developer"])
def test_a_role_that_llama_4_has_not_is_named(form, role):
    with pytest.raises(UserError, match="Llama 4 has no role 'developer'"):
        form.encode([turn(role, "x")])


@settings(deadline=None)
@given(st.lists(st.sampled_from([*CONTROL, PYTHON_START, "<|", "header", "eot|>", " ", "x"]), max_size=8).map("".join))
def test_no_content_becomes_a_control_token(tokenizer, form, content):
    plain = form.encode([turn("user", "x")], add_generation_prompt=True).tokens
    tokens = form.encode([turn("user", content)], add_generation_prompt=True).tokens
    controls = set(tokenizer.special_tokens.values())
    assert [t for t in tokens if t in controls] == [t for t in plain if t in controls]
    assert content in tokenizer.decode(tokens)


# ------------------------------------------------------------------------------------------------------------------------
# Replies


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('[f(x="a", y=[1, 2.5])]', [("f", {"x": "a", "y": [1, 2.5]})]),
        ("[f(on=true, off=False, none=null), g.h()]", [("f", {"on": True, "off": False, "none": None}), ("g.h", {})]),
        ('{"name": "f", "parameters": {"x": {"y": 1}}}', [("f", {"x": {"y": 1}})]),
        ('{"type": "function", "name": "f", "parameters": {}}<|eom|>', [("f", {})]),
        ('<function=f>{"x": {"y": 1}}</function>', [("f", {"x": {"y": 1}})]),
        ('brave_search.call(query="sun today")<|eom|>', [("brave_search", {"query": "sun today"})]),
        (f"{PYTHON_START}print(1 + 1){PYTHON_END}<|eom|>", [("code_interpreter", {"code": "print(1 + 1)"})]),
        (f"{PYTHON_START}[f(x=1)]{PYTHON_END}<|eot|>", [("f", {"x": 1})]),
    ],
)
def test_calls_are_read_in_every_form_that_the_model_writes(text, calls):
    message = parse_reply(text)
    found = [call["function"] for call in message["tool_calls"]]
    assert [(function["name"], function["arguments"]) for function in found] == calls
    assert [json.loads(function["arguments_json"]) for function in found] == [arguments for _, arguments in calls]
    assert message["content"] == "" and len({call["id"] for call in message["tool_calls"]}) == len(calls)


@pytest.mark.parametrize(
    "text",
    ["Just words.", "[]", "[1, 2]", "[f(1)]", "[f(x=g())]", "[f(x=__import__('os'))]", '{"name": 1}', "{", "[f(x=1)", "[" * 9999,
     '{"a": 1}', "<function=f>{", "f(x=1)"],
)  # fmt: skip
def test_anything_else_is_content(text):
    assert parse_reply(text + "<|eot|>") == {"role": "assistant", "content": text}


def test_what_the_format_writes_reads_back(tokenizer, form):
    calls = [("weather", {"at": "Rome", "days": 3}), ("brave_search", {"query": "sun"}), ("weather", {"nested": {"a": [None]}})]
    for name, arguments in calls:
        messages = read_conversation([turn("assistant", tool_calls=[call(name, arguments)])]).messages
        encoded = form.encode(messages)
        reply = tokenizer.decode([t for t, turn in zip(encoded.tokens, encoded.turns, strict=True) if turn == 0])
        function = parse_reply(reply)["tool_calls"][0]["function"]
        assert (function["name"], function["arguments"]) == (name, arguments)


# ------------------------------------------------------------------------------------------------------------------------
# Beside Meta's own


@pytest.fixture(scope="module")
def meta():
    """Meta's ChatFormat and its tests. They import torch for pictures alone, which are not used here."""
    pytest.importorskip("llama_models")
    pytest.importorskip("tiktoken")
    pytest.importorskip("pydantic")
    stubs = {name: unittest.mock.MagicMock() for name in ("torch", "torchvision", "torchvision.transforms")}
    with unittest.mock.patch.dict(sys.modules, stubs):
        from llama_models import datatypes
        from llama_models.llama4.chat_format import ChatFormat
        from llama_models.llama4.tests.api import test_chat_format
        from llama_models.llama4.tokenizer import Tokenizer as MetaTokenizer

        yield SimpleNamespace(
            types=datatypes, format=ChatFormat(MetaTokenizer.get_instance()), tests=test_chat_format.TestChatFormatArgumentsJson
        )


@pytest.fixture(scope="module")
def published():
    return Tokenizer.load("llama4")


TEXTS = st.text(st.sampled_from("ab \n\t.'é中🦙0123<|>") | st.characters(exclude_categories=("Cs",)), max_size=20)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), TEXTS | st.sampled_from(["<|eot|>", "\n\nx"])),
        min_size=1,
        max_size=5,
    )
)
def test_conversations_are_encoded_as_by_meta(meta, published, messages):
    expected = meta.format.encode_dialog_prompt([meta.types.RawMessage(role=role, content=text) for role, text in messages])
    tokens = Llama4Format(published).encode([turn(r, t) for r, t in messages], add_generation_prompt=True).tokens
    assert tokens == expected.tokens


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("weather", {"at": "Rome", "hours": [1, 2], "é": None}),
        ("brave_search", {"query": "sun"}),
        ("wolfram_alpha", {"query": "1 + 1"}),
        ("photogen", {"query": "a llama"}),
        ("code_interpreter", {"code": "print('x')"}),
    ],
)
def test_calls_are_encoded_as_by_meta(meta, published, name, arguments):
    calls = [meta.types.ToolCall(call_id="1", tool_name=name, arguments=arguments)]
    raw = [
        meta.types.RawMessage(role="user", content="Go"),
        meta.types.RawMessage(role="assistant", content="Well: ", tool_calls=calls * 2),
        meta.types.RawMessage(role="tool", content="3"),
    ]
    messages = [turn("user", "Go"), turn("assistant", "Well: ", tool_calls=[call(name, arguments)] * 2), turn("tool", "3")]
    encoded = Llama4Format(published).encode(read_conversation(messages).messages, add_generation_prompt=True)
    assert encoded.tokens == meta.format.encode_dialog_prompt(raw).tokens


class OurFormat:
    """Ours behind the one method that Meta's tests call."""

    def __init__(self, types, mocks):
        self.types, self.mocks = types, mocks

    def decode_assistant_message_from_content(self, content, stop_reason):
        # Some tests put any words for a call that their mock then finds: write that call as the model would.
        name, query = self.mocks() or (None, None)
        content = content if name is None else f'{name}.call(query="{query}")'
        message = parse_reply(content)
        calls = [
            self.types.ToolCall(
                call_id=call["id"],
                tool_name=call["function"]["name"],
                arguments=call["function"]["arguments"],
                arguments_json=call["function"]["arguments_json"],
            )
            for call in message.get("tool_calls", [])
        ]
        return SimpleNamespace(content=message["content"], tool_calls=calls)


def test_metas_own_tests_pass_with_ours_in_its_place(meta):
    from llama_models.llama3.tool_utils import ToolUtils

    def found_by_mock():
        found = ToolUtils.maybe_extract_builtin_tool_call
        return found.return_value if isinstance(found, unittest.mock.Mock) else None

    class OnOurs(meta.tests):
        def setUp(self):
            self.chat_format = OurFormat(meta.types, found_by_mock)

    suite = unittest.defaultTestLoader.loadTestsFromTestCase(OnOurs)
    result = unittest.TestResult()
    suite.run(result)
    assert result.testsRun >= 5
    assert not result.errors and not result.failures, (result.errors + result.failures)[0][1]
