"""Videos in ``bulk``: each frame is a picture with a line of its own, and has a time."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from moondream_async.errors import RequestError
from moondream_async.frames import check_video, decode_video

from .shards import check_shards, is_shard
from .sources import Contents, Found

SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"),
    *(".mts", ".m2ts", ".wmv", ".flv", ".ogv", ".3gp"),
)
SUBTITLES = ("vtt", "srt")
_QUALITY = 92  # of JPEG


def is_video(name: str) -> bool:
    """Tell whether a file's name is that of a video.

    >>> is_video("clip.MP4"), is_video("photo.jpg")
    (True, False)
    """
    return name.lower().endswith(SUFFIXES)


def check_sources(
    paths: Sequence[str], lists: Sequence[str], form: str, skill: str, via: str
) -> None:
    """Refuse, before anything is asked, what can't be done with videos and shards.

    Raises:
        RequestError: Subtitles without exactly one video, or a video for the Batch API.
        MissingExtraError: The library for videos or shards is not installed.
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
    """Yield the frames of a video as pictures, in order; OSError ends a damaged video."""
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


def _encode(image: Any) -> bytes:
    from PIL import Image  # noqa: PLC0415 - --help does without

    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


@lru_cache(maxsize=8)
def _digest(path: str, _mtime_ns: int) -> str:
    with open(path, "rb") as file:  # noqa: PTH123 - a string, as it stands in lines
        return hashlib.file_digest(file, "sha256").hexdigest()
