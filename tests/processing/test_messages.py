import base64
import io

import numpy as np
import pytest
from PIL import Image

from llama4_jax.errors import UserError
from llama4_jax.processing.messages import read_conversation


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def png(shade=0):
    stream = io.BytesIO()
    Image.new("RGB", (2, 2), (shade,) * 3).save(stream, "PNG")
    return stream.getvalue()


def test_text_parts_alone_become_one_text_and_other_keys_stay():
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"}]
    assert read_conversation(messages).messages == [{"role": "user", "content": "ab", "name": "Ann"}]


def test_pictures_are_taken_out_in_order_wherever_they_are_written(tmp_path):
    content, array = png(), np.zeros((2, 2, 3), np.uint8)
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    messages = user(
        {"type": "image", "path": "a.png"},
        {"type": "text", "text": "and"},
        {"type": "image"},
        {"type": "image", "image": array},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image", "base64": base64.b64encode(content).decode()},
        {"type": "image"},
    )
    read = read_conversation(messages, ["given.png", content], folder=tmp_path)
    picture, text = {"type": "image"}, {"type": "text", "text": "and"}
    assert read.messages[0]["content"] == [picture, text, *[picture] * 5]
    pictures = [shown.picture for shown in read.pictures]
    assert pictures[:2] == [tmp_path / "a.png", tmp_path / "given.png"]
    assert pictures[2] is array and pictures[3:] == [content] * 3


def test_arguments_of_tool_calls_are_objects_however_they_are_written():
    expected = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, None]}}}
    for call in (
        {"function": {"name": "f", "arguments": {"x": [1, None]}}},
        {"type": "function", "function": {"name": "f", "arguments": '{"x": [1, null]}'}},
        {"name": "f", "arguments": {"x": (1, None)}},
    ):
        assert read_conversation([{"role": "assistant", "tool_calls": [call]}]).messages[0]["tool_calls"] == [expected]
    with_id = {"id": "7", "function": {"name": "f", "arguments": {"x": [1, None]}}}
    assert read_conversation([{"role": "assistant", "tool_calls": [with_id]}]).messages[0]["tool_calls"] == [
        {"id": "7"} | expected
    ]


class Sly(str):
    def method(self):
        raise AssertionError


def test_only_plain_data_reaches_a_template():
    message = read_conversation([{"role": Sly("user"), "content": Sly("x"), "extra": {"y": (Sly("z"), 1)}}]).messages[0]
    assert message == {"role": "user", "content": "x", "extra": {"y": ["z", 1]}}
    assert {type(message["role"]), type(message["content"]), type(message["extra"]["y"][0])} == {str}


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "a conversation is a list of one message or more"),
        ("Hi", "a conversation is a list"),
        ({"role": "user", "content": "x"}, "a conversation is a list"),
        (["Hi"], "message 1 must have a role and a content, got 'Hi'"),
        (
            [{"role": "user", "content": "x"}, {"role": "wizard", "content": "x"}],
            "message 2 has the role 'wizard', and the roles are",
        ),
        ([{"content": "x"}], "message 1 has the role None"),
        ([{"role": "user"}], "the content must be a text or a list of parts, got None"),
        ([{"role": "user", "content": 3}], "got 3"),
        (user({"type": "smell"}), "must be of type text, image or video"),
        (user({"type": "text", "text": None}), "must be of type text, image or video"),
        (user("bare"), "must be of type text, image or video"),
        (user({"type": "audio", "path": "a.wav"}), "audio, which Llama 4 does not hear"),
        (user({"type": "input_audio"}), "audio, which Llama 4 does not hear"),
        (user({"type": "image"}), "message 1 has an image more than were given"),
        (user({"type": "image", "image": 3}), "an image must be a path"),
        (user({"type": "image", "url": "https://example.org/a.png"}), "nothing is fetched; got 'https"),
        (user({"type": "image_url"}), "nothing is fetched; got None"),
        (user({"type": "image", "base64": "???"}), "not in base64"),
        (user({"type": "video"}), "a video must be the path of a file"),
        ([{"role": "assistant", "tool_calls": 3}], "tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": ["f"]}], "a tool call must be a function with a name"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], "arguments of the tool call f are not JSON"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}], "must be an object, got \\[1\\]"),
        ([{"role": "user", "content": "\ud800"}], "half of a surrogate pair"),
        ([{"role": "user", "content": "x", "extra": object()}], "not object"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(messages, error):
    with pytest.raises(UserError, match=error) as raised:
        read_conversation(messages)
    assert "\n" not in str(raised.value)


def test_more_images_than_places_are_refused():
    with pytest.raises(UserError, match="1 of 2 images given have no place"):
        read_conversation(user({"type": "image"}), [png(), png()])


def test_a_video_becomes_its_frames_each_after_its_time(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (32, 32)))))
        container.mux(stream.encode())
    read = read_conversation(user({"type": "video", "path": "v.mp4"}, {"type": "text", "text": "?"}), folder=tmp_path)
    assert [part.get("text") for part in read.messages[0]["content"]] == ["[00:00.0]", None, "[00:01.0]", None, "?"]
    assert [(shown.picture.size, shown.max_tiles) for shown in read.pictures] == [((32, 32), 1)] * 2
