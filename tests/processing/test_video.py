import numpy as np
import pytest
from PIL import Image

from llama4_jax.errors import UserError
from llama4_jax.processing.video import VideoSampling, sample_frames, time_label

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Three seconds at ten frames a second; frame i has the shade 8 * i."""
    path = tmp_path_factory.mktemp("video") / "shades.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.bit_rate = 4_000_000
        for i in range(30):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 32), (8 * i,) * 3))
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def shades(frames):
    return [round(float(np.asarray(frame.image).mean()) / 8) for frame in frames]


@pytest.mark.parametrize(
    ("rate", "numbers"),
    [(1.0, [0, 10, 20]), (2.0, [0, 5, 10, 15, 20, 25]), (3.0, [0, 3, 6, 10, 13, 16, 20, 23, 26]), (0.5, [0, 20]), (0.01, [0])],
)
def test_frames_are_those_shown_at_the_rate(video, rate, numbers):
    frames = sample_frames(video, VideoSampling(rate=rate))
    assert shades(frames) == numbers
    assert [frame.seconds for frame in frames] == pytest.approx([i / rate for i in range(len(numbers))])
    assert all(frame.image.size == (64, 32) and frame.image.mode == "RGB" for frame in frames)


def test_a_rate_above_the_files_own_gives_each_frame_once(video):
    assert shades(sample_frames(video, VideoSampling(rate=25, max_frames=100))) == list(range(30))


def test_a_limit_on_frames_spreads_them_over_the_whole_video(video):
    frames = sample_frames(video, VideoSampling(rate=10, max_frames=3))
    assert shades(frames) == [0, 10, 20]
    assert [frame.seconds for frame in frames] == pytest.approx([0, 1, 2])


@pytest.mark.parametrize(
    ("seconds", "label"),
    [(0, "[00:00.0]"), (3.5, "[00:03.5]"), (59.96, "[01:00.0]"), (754.25, "[12:34.2]"), (6000, "[100:00.0]")],
)
def test_times_are_minutes_seconds_and_tenths(seconds, label):
    assert time_label(seconds) == label


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_pixels": 2000}, r"a frame of the video .*shades\.mp4 has 2,048 pixels"),
        ({"max_seconds": 2}, r"shades\.mp4 lasts 3 s"),
    ],
)
def test_limits_are_kept_before_decoding(video, limits, message):
    with pytest.raises(UserError, match=message):
        sample_frames(video, VideoSampling(**limits))


def test_what_is_no_video_is_named(tmp_path, video):
    with pytest.raises(UserError, match=r"no video at .*none\.mp4"):
        sample_frames(tmp_path / "none.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"\0\0\0\x18ftypmp42 nothing more")
    with pytest.raises(UserError, match=r"cannot decode the video .*bad\.mp4"):
        sample_frames(tmp_path / "bad.mp4")
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:500])
    with pytest.raises(UserError, match=r"cut\.mp4"):
        sample_frames(tmp_path / "cut.mp4")


def test_a_file_of_sound_alone_holds_no_video(tmp_path):
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    with pytest.raises(UserError, match=r"sound\.wav holds no video"):
        sample_frames(tmp_path / "sound.wav")


def test_sampling_checks_itself():
    with pytest.raises(UserError, match=r"VideoSampling\.rate must be positive, got 0"):
        VideoSampling(rate=0)
