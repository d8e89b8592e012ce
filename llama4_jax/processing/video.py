"""Pictures out of a video file, at a chosen rate, with their times. Its sound is left aside."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from llama4_jax.errors import UserError

_EARLY = 1e-6  # seconds by which a frame's rounded time may miss a moment


@dataclasses.dataclass(frozen=True)
class VideoSampling:
    """Which frames of a video are read, and how much a file may ask for."""

    rate: float = 1.0  # frames a second
    max_frames: int = 32  # a longer video is sampled more thinly, evenly over its whole length
    max_tiles: int = 1  # of a frame
    max_pixels: int = 1 << 25  # of a frame; 8K has them
    max_seconds: float = 4 * 3600.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not 0 < getattr(self, field.name) < float("inf"):
                raise UserError(f"VideoSampling.{field.name} must be positive, got {getattr(self, field.name)}")


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    seconds: float  # from the start of the video
    image: Image.Image


def sample_frames(path: str | Path, sampling: VideoSampling = VideoSampling()) -> list[Frame]:
    """The frames that are shown at 0, 1 / rate, 2 / rate ... seconds, upright, at most `max_frames` of them.

    Of a file that does not say how long it is, these are the first ones. The whole file is decoded.

    Raises:
        UserError: no file, no video in it, one that cannot be decoded, or one beyond the limits of `sampling`.
    """
    try:
        import av
    except ImportError:
        raise UserError(f"{path} needs PyAV: pip install 'llama4-jax[video]'") from None
    try:
        with av.open(str(Path(path).expanduser())) as container:
            if not container.streams.video:
                raise UserError(f"{path} holds no video")
            stream = container.streams.video[0]
            _require_pixels(stream.width * stream.height, path, sampling)
            length = _length(container, stream)
            if length > sampling.max_seconds:
                raise UserError(
                    f"the video {path} lasts {length:.0f} s, and at most {sampling.max_seconds:.0f} s are read: cut it"
                )
            rate = min(sampling.rate, sampling.max_frames / length) if length else sampling.rate
            frames = list(_at_rate(_decode(container, stream, path, sampling), rate, sampling.max_frames))
    except FileNotFoundError:
        raise UserError(f"no video at {path}") from None
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot decode the video {path}: {getattr(error, 'strerror', None) or error}") from None
    if not frames:
        raise UserError(f"the video {path} holds no frame")
    return frames


def time_label(seconds: float) -> str:
    """How a frame's time is written before it: `[01:02.5]`, minutes, seconds and tenths."""
    tenths = round(seconds * 10)
    return f"[{tenths // 600:02d}:{tenths // 10 % 60:02d}.{tenths % 10}]"


def _length(container, stream) -> float:
    """Seconds, or 0 where the file does not say."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration else 0.0


def _decode(container, stream, path: str | Path, sampling: VideoSampling) -> Iterator[tuple[float, Any]]:
    """Every frame with its time from the first, then the end of the last with None."""
    start, end = None, None
    for frame in container.decode(stream):
        time = frame.time if frame.time is not None else 0.0
        start = time if start is None else start
        _require_pixels(frame.width * frame.height, path, sampling)
        if time - start > sampling.max_seconds:
            raise UserError(f"the video {path} lasts longer than the {sampling.max_seconds:.0f} s that are read: cut it")
        yield time - start, frame
        end = time - start + float((frame.duration or 0) * (frame.time_base or 0) or 1e-3)
    if end is not None:
        yield end, None


def _at_rate(frames: Iterator[tuple[float, Any]], rate: float, most: int) -> Iterator[Frame]:
    """At each moment the frame that is shown then; one that is shown at several moments comes at the first."""
    taken, moment = 0, 0
    for (_, frame), (following, _) in itertools.pairwise(frames):
        if moment / rate >= following - _EARLY:
            continue
        image, turn = frame.to_image(), round(getattr(frame, "rotation", 0) / 90) * 90 % 360
        yield Frame(moment / rate, image.rotate(turn, expand=True) if turn else image)
        taken += 1
        if taken == most:
            return
        moment = math.ceil((following - _EARLY) * rate)


def _require_pixels(pixels: int, path: str | Path, sampling: VideoSampling) -> None:
    if pixels > sampling.max_pixels:
        raise UserError(f"a frame of the video {path} has {pixels:,} pixels, and at most {sampling.max_pixels:,} are read")
