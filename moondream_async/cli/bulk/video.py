"""Videos as pictures of bulk: each frame has a line, with its time, and captions are subtitles."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from moondream_async.cli._files import replacing
from moondream_async.errors import RequestError
from moondream_async.frames import check_video, decode_video

from .lines import text_of
from .shards import check_shards, is_shard
from .sources import Contents, Found

SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"),
    *(".mts", ".m2ts", ".wmv", ".flv", ".ogv", ".3gp"),
)
SUBTITLES = ("vtt", "srt")
_QUALITY = 92  # of JPEG
_LAST = 2.0  # seconds that the only caption is shown


def is_video(name: str) -> bool:
    """Tell whether a file's name is that of a video.

    >>> is_video("clip.MP4"), is_video("photo.jpg")
    (True, False)
    """
    return name.lower().endswith(SUFFIXES)


def check_sources(
    paths: Sequence[str], lists: Sequence[str], form: str, skill: str, via: str
) -> None:
    """Refuse what can't be done with videos, before anything is asked.

    Raises:
        RequestError: Subtitles of something else, or a video for the Batch API.
        MissingExtraError: PyAV is not installed.
    """
    videos = [each for each in paths if is_video(each)]
    one = len(videos) == len(paths) == 1 and not lists
    if form in SUBTITLES and not (one and skill in ("caption", "query")):
        raise RequestError(f"'-o .{form}' is for '--skill caption' or query, and one video")
    if videos and via != "requests":
        raise RequestError("'--via batch-api' takes no videos")
    if videos:
        check_video()
    if any(map(is_shard, paths)):
        check_shards()


def find_frames(path: str, every: float | None) -> Iterator[Found]:
    """Yield the frames of a video as pictures, in order, each with its own timestamp.

    Raises:
        MissingExtraError: PyAV is not installed.
        OSError: It can't be read, or no further.
    """
    check_video()
    try:
        status = os.stat(path)  # noqa: PTH116 - a string, as it stands in lines
        contents = Contents(status.st_size, status.st_mtime_ns, _digest(path, status.st_mtime_ns))
        stem = os.path.splitext(os.path.basename(path))[0]  # noqa: PTH119, PTH122 - likewise
        decoded = decode_video(path, threading.Event(), every=every)
        for frame in filter(None, decoded):
            at = f"{frame.time:.6f}".rstrip("0").rstrip(".")
            yield Found(
                f"{path}#t={at}",
                f"{stem}/{at}.jpg",
                time=frame.time,
                data=_encode(frame.image),
                contents=contents,
            )
    except OSError:
        raise
    except Exception as error:  # PyAV's have many kinds
        raise OSError(str(error)) from error


def write_subtitles(records: Callable[[], Iterable[dict[str, Any]]], path: str) -> None:
    """Write the answers as subtitles, WebVTT or SubRip; each stays until the next frame's.

    Raises:
        OSError: It can't be written; what was there stays.
    """
    cues = sorted(
        (max(0.0, float(record["time"])), text)
        for record in records()
        if isinstance(record.get("time"), (int, float)) and (text := text_of(record))
    )
    times = [start for start, _ in cues]
    ends = [*times[1:]]
    if times:
        ends.append(times[-1] + (times[-1] - times[-2] if len(times) > 1 else _LAST))
    vtt = path.lower().endswith(".vtt")
    with replacing(path) as file:
        if vtt:
            file.write(b"WEBVTT\n\n")
        for number, ((start, text), end) in enumerate(zip(cues, ends, strict=True), 1):
            if vtt:
                said = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
                cue = f"{_clock(start, '.')} --> {_clock(end, '.')}\n{said}\n\n"
            else:
                said = text.replace("-->", "\N{RIGHTWARDS ARROW}")
                cue = f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{said}\n\n"
            file.write(cue.encode())


def _clock(seconds: float, point: str) -> str:
    whole, milliseconds = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{point}{milliseconds:03}"


def _encode(image: Any) -> bytes:
    from PIL import Image  # noqa: PLC0415 - --help does without

    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


@lru_cache(maxsize=8)
def _digest(path: str, _mtime_ns: int) -> str:
    with open(path, "rb") as file:  # noqa: PTH123 - a string, as it stands in lines
        return hashlib.file_digest(file, "sha256").hexdigest()
