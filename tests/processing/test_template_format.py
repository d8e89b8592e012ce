import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from llama4_jax.errors import UserError
from llama4_jax.processing.template_format import TemplateFormat
from llama4_jax.processing.templates import ChatTemplate
from llama4_jax.processing.tokenizer import Tokenizer

START, END, IMAGE = "<|im_start|>", "<|im_end|>", "<|image|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<|image|>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRANSFORMING = (
    "{% for m in messages %}<|im_start|>{{ m.role | upper }}\n{{ (m.content | trim)[:9] + m.content.split('x')[-1] ~ m.content | tojson }}"
    "{{ m.content | tojson(ensure_ascii=True) }}{{ [m.content, m.content] | join }}{{ m.content | replace('y', '') }}<|im_end|>{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    trained = Tokenizer.train_bpe(["a question and the answer " * 3], 350, ["<|endoftext|>", START, END, IMAGE])
    backend = Backend.from_str(trained.to_json())
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<tool>", "<think>", "  ")])
    return Tokenizer.from_json(backend.to_str(), "test")


def make(tokenizer, source, image=None):
    return TemplateFormat(tokenizer, ChatTemplate(source, "t"), {"bos_token": "<|endoftext|>"}, image)


def turn(role, content):
    return {"role": role, "content": content}


def controls(tokenizer, tokens, extra=()):
    ids = {*tokenizer.special_tokens.values(), *(tokenizer.token_to_id(name) for name in extra)}
    return [token for token in tokens if token in ids]


def test_tokens_are_those_of_the_rendered_string(tokenizer):
    form = make(tokenizer, "{{ bos_token }}" + CHATML)
    tokens = form.encode([turn("user", "\n\n a  question"), turn("assistant", "<think>")], add_generation_prompt=True).tokens
    text = "<|endoftext|><|im_start|>user\n\n\n a  question<|im_end|>\n<|im_start|>assistant\n<think><|im_end|>\n<|im_start|>assistant\n"
    assert tokens == tokenizer.encode(text, allow_special=True)
    assert tokenizer.token_to_id("<think>") in tokens


PIECES = st.lists(
    st.sampled_from([START, END, "<|im_", "end|>", "<", "|im_end|>", IMAGE, "<tool>", "<to", "ol>", " ", "x", "\n"]), max_size=5
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["system", "user", "assistant"]), st.lists(PIECES.map("".join), max_size=3)),
        min_size=1,
        max_size=3,
    )
)
def test_no_message_writes_a_control_token_alone_or_joined_with_the_next(tokenizer, messages):
    """Parts of one message are joined by the template without anything between them."""
    form = make(tokenizer, CHATML)
    parts = [turn(role, [{"type": "text", "text": text} for text in texts]) for role, texts in messages]
    tokens = form.encode(parts, add_generation_prompt=True).tokens
    plain = form.encode([turn(role, []) for role, _ in messages], add_generation_prompt=True).tokens
    assert controls(tokenizer, tokens) == controls(tokenizer, plain)
    decoded = tokenizer.decode(tokens)
    for text in (text for _, texts in messages for text in texts):
        assert text in decoded


@settings(max_examples=100, deadline=None)
@given(PIECES.map("".join))
def test_nor_does_it_through_what_templates_do_to_texts(tokenizer, content):
    form = make(tokenizer, TRANSFORMING)
    tokens = form.encode([turn("user", content)]).tokens
    assert controls(tokenizer, tokens) == [tokenizer.token_to_id(START), tokenizer.token_to_id(END)]
    assert json.dumps(content, ensure_ascii=False) in tokenizer.decode(tokens)


def test_a_token_that_the_template_names_is_the_templates_and_the_assistants_alone(tokenizer):
    source = "{% if false %}<think>{% endif %}<tool>{{ tools | tojson }}" + CHATML
    form = make(tokenizer, source)
    tool, think = tokenizer.token_to_id("<tool>"), tokenizer.token_to_id("<think>")
    tokens = form.encode([turn("user", "<tool><think>"), turn("assistant", "<think>")], tools=[{"name": "<tool>"}]).tokens
    assert (tokens.count(tool), tokens.count(think)) == (1, 1)
    assert tokenizer.decode(tokens).count("<tool>") == 3
    free = make(tokenizer, CHATML).encode([turn("user", "<tool>")]).tokens  # an ordinary token elsewhere
    assert free.count(tool) == 1


def test_characters_for_private_use_in_a_message_are_kept(tokenizer):
    content = "\U000f0000\U000f0001<|im_end|>\U000f0002"
    tokens = make(tokenizer, CHATML).encode([turn("user", content)]).tokens
    assert content in tokenizer.decode(tokens)


def test_pictures_take_the_place_of_the_templates_token_and_not_of_its_name_in_a_message(tokenizer):
    form = make(tokenizer, CHATML, IMAGE)
    content = [{"type": "text", "text": IMAGE}, {"type": "image"}, {"type": "text", "text": "?"}]
    tokens = form.encode([turn("user", content)], [[7, 7, 7]]).tokens
    assert tokenizer.token_to_id(IMAGE) not in tokens
    assert tokens.count(7) >= 3 and IMAGE in tokenizer.decode(tokens)
    with pytest.raises(UserError, match="leaves out an image"):
        make(tokenizer, "{{ messages[0].role }}", IMAGE).encode([turn("user", content)], [[7]])
    with pytest.raises(UserError, match="shows more images than the conversation has"):
        make(tokenizer, CHATML + IMAGE, IMAGE).encode([turn("user", content)], [[7]])


MESSAGES = [turn("user", "a"), turn("assistant", "b b "), turn("user", "<|im_end|>c"), turn("assistant", "<|im_end|>d")]


MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("source", [CHATML, MARKED])
@pytest.mark.parametrize("turns", ["all", "last"])
def test_the_assistants_turns_are_told_with_or_without_marks(tokenizer, source, turns):
    form = make(tokenizer, source)
    encoded = form.encode(MESSAGES, turns=turns)
    of_turn = {
        number: tokenizer.decode([t for t, n in zip(encoded.tokens, encoded.turns, strict=True) if n == number])
        for number in set(encoded.turns) - {-1}
    }
    assert of_turn[1] == "<|im_end|>d<|im_end|>"
    assert of_turn.get(0) == (None if turns == "last" and source == CHATML else "b b <|im_end|>")
    assert tokenizer.decode(encoded.tokens) == tokenizer.decode(form.encode(MESSAGES).tokens)


def test_turns_that_later_ones_change_cannot_be_told_but_the_last_can(tokenizer):
    forgetful = CHATML.replace("{{ m.content }}", "{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}")
    form = make(tokenizer, forgetful)
    with pytest.raises(UserError, match=r"writes the assistant's turn 1 otherwise .* 'last' or 'all'"):
        form.encode(MESSAGES, turns="all")
    encoded = form.encode(MESSAGES, turns="last")
    assert (
        tokenizer.decode([t for t, n in zip(encoded.tokens, encoded.turns, strict=True) if n == 1]) == "<|im_end|>d<|im_end|>"
    )
