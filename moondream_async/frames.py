"""Sources of moving pictures for `MoondreamClient.watch`: files, cameras, screens.

::

    async with frames.camera(0) as pictures, client.watch(pictures, "detect", object="cat") as run:
        async for each in run:
            print(each.frame.time, each.result)

Each source is an asynchronous context manager and yields `Frame`s. A thread decodes, and keeps
at most one frame until it is taken: of a live source the newest, of a file the next. Leaving
closes the device. The extra ``video`` brings PyAV (and mss, for `screen`).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from .errors import APIConnectionError, ImageError, MissingExtraError, RequestError
from .watch.items import Frame

if TYPE_CHECKING:
    import os
    import ssl

__all__ = ["Frame", "Source", "bgr", "camera", "mjpeg", "screen", "video"]

_NETWORK_TIMEOUT = 10.0  # seconds for opening an address, and between two of its packets
_GOODBYE = 5.0  # seconds that leaving waits for a device to close
_LIVE = ("rtsp:", "rtsps:", "rtmp:", "rtmps:", "rtp:", "udp:", "srt:")
_EPSILON = 1e-6

_Produce = Callable[[threading.Event], Iterator[Frame | None]]


class Source:
    """Moving pictures, as an asynchronous iterator of `Frame`s and a context manager.

    Entering opens the device or the file, and leaving closes it and waits until it is closed,
    for 5 seconds at most. The iterator ends with the pictures, and when the source is left.
    Cancelling a read loses no frame.

    Raises:
        ImageError: The source can't be opened, or not be read further.
    """

    def __init__(self, produce: _Produce, name: str, *, live: bool) -> None:
        self._produce = produce
        self._name = name
        self._live = live
        self._closing = threading.Event()
        self._taken = threading.Semaphore(0)
        self._thread = threading.Thread(
            target=self._run, name="moondream_async source", daemon=True
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        self._frame: Frame | None = None
        self._failure: Exception | None = None
        self._opened = False
        self._over = False

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        try:
            while not self._opened and not self._over:
                await self._change()
        except BaseException:
            self._closing.set()
            raise
        if self._failure is not None:
            self._thread.join()  # it has only to end
        self._raise_failure()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._closing.set()
        self._taken.release()
        self._frame = None
        ends = self._loop.time() + _GOODBYE if self._loop is not None else 0.0
        while not self._over:
            left = ends - asyncio.get_running_loop().time()
            if left <= 0:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._change(), left)
        self._thread.join()  # it has only to end

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Frame:
        """Return the next frame; of a live source, the newest one that was not taken yet."""
        if self._loop is None:
            raise RequestError(f"{self._name} is not open: use it with 'async with'")
        while not self._closing.is_set():
            frame, self._frame = self._frame, None
            if frame is not None:
                self._taken.release()
                return frame
            if self._over:
                self._raise_failure()
                break
            await self._change()
        raise StopAsyncIteration

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is None:
            return
        if isinstance(failure, RequestError):
            raise failure
        raise ImageError(f"{self._name} can't be read: {failure}") from failure

    # -- the thread ---------------------------------------------------------------------

    def _run(self) -> None:
        failure = None
        try:
            with contextlib.closing(self._produce(self._closing)) as frames:  # type: ignore[type-var]
                for frame in frames:
                    self._report(partial(self._keep, frame))
                    if frame is not None and not self._live:
                        self._taken.acquire()
                    if self._closing.is_set():
                        break
        except Exception as error:  # noqa: BLE001 - raised where frames are awaited
            failure = error
        self._report(partial(self._end, failure))

    def _report(self, what: Callable[[], None]) -> None:
        assert self._loop is not None  # noqa: S101 - for the type checker
        with contextlib.suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(what)

    def _keep(self, frame: Frame | None) -> None:
        self._opened = True
        if not self._closing.is_set():
            self._frame = frame
        self._changed.set()

    def _end(self, failure: Exception | None) -> None:
        self._failure = failure
        self._over = True
        self._changed.set()


def video(
    source: str | os.PathLike[str],
    *,
    every: float | None = None,
    fps: float | None = None,
    keyframes: bool = False,
    live: bool | None = None,
    format: str | None = None,  # noqa: A002 - PyAV's word
    options: dict[str, str] | None = None,
) -> Source:
    """Open a video: a file, or an address as ``rtsp://...``.

    Frames are RGB arrays, upright, and their `time` is the file's own timestamp.

    Args:
        source: The path or address.
        every: Seconds between two frames; None is for all frames.
        fps: The same, as frames a second.
        keyframes: Whether only key frames are decoded, which is fast.
        live: Whether the video plays at its own speed, and a frame that was not taken is
            superseded by the next; else every frame waits to be taken. None is True for
            addresses of streams (RTSP, RTMP, ...) alone.
        format: The container's format, where PyAV can't detect it.
        options: Options of PyAV's ``open``.

    Raises:
        RequestError: An argument can't be right.
        MissingExtraError: PyAV is not installed.
    """
    if (every is not None) + (fps is not None) + keyframes > 1:
        raise RequestError("a video takes one of every, fps and keyframes")
    for name, value in (("every", every), ("fps", fps)):
        if value is not None and not 0 < value < float("inf"):
            raise RequestError(f"{name} must be over 0, not {value!r}")
    check_video()
    path = str(source)
    is_stream = path.lower().startswith(_LIVE)
    live = is_stream if live is None else live
    decode = partial(
        decode_video,
        path,
        every=1 / fps if fps else every,
        keyframes=keyframes,
        paced=live and not is_stream and format is None,
        format=format,
        options=options,
    )
    return Source(decode, _shown(path), live=live)


def camera(
    index: int = 0, *, fps: float | None = None, size: tuple[int, int] | None = None
) -> Source:
    """Open a camera of this computer; on Linux, ``/dev/video{index}``.

    Args:
        index: The camera's number, from 0.
        fps: The most frames a second; None is for all frames.
        size: Width and height in pixels to ask the camera for.

    Raises:
        MissingExtraError: PyAV is not installed.
    """
    import sys  # noqa: PLC0415 - only cameras need it

    devices = {"linux": (f"/dev/video{index}", "v4l2"), "darwin": (str(index), "avfoundation")}
    device, kind = devices.get(sys.platform, (f"video={index}", "dshow"))
    options = {"video_size": f"{size[0]}x{size[1]}"} if size else {}
    if sys.platform == "darwin":
        options["framerate"] = "30"  # PyAV's default is below what cameras there offer
    return video(device, fps=fps, live=True, format=kind, options=options)


def screen(*, monitor: int = 1, fps: float = 10.0) -> Source:
    """Open the screen, by mss.

    Args:
        monitor: The screen's number, from 1; 0 is all screens.
        fps: Frames a second.

    Raises:
        MissingExtraError: mss is not installed.
    """
    _load("mss", "mss")
    return Source(partial(_grab, monitor, 1 / fps), f"screen {monitor}", live=True)


def mjpeg(url: str, *, ssl_context: ssl.SSLContext | None = None) -> MJPEGSource:
    """Open a network camera that sends Motion JPEG over HTTP; no extra is needed.

    A frame's image is the JPEG file as it came. The address may have a user and a password in
    it, and may be in a private network.
    """
    return MJPEGSource(url, ssl_context)


class MJPEGSource:
    """A camera's Motion JPEG; it is entered, read and left as a `Source` is.

    Raises:
        APIConnectionError: The camera can't be reached.
        ImageError: The camera sends something else.
    """

    def __init__(self, url: str, ssl_context: ssl.SSLContext | None) -> None:
        self._url = url
        self._ssl_context = ssl_context
        self._stack = contextlib.AsyncExitStack()
        self._frames: AsyncIterator[list[bytes]] | None = None
        self._began = 0.0
        self._index = 0

    async def __aenter__(self) -> Self:
        from ._protocol.mjpeg import MJPEGParser  # noqa: PLC0415 - other sources do without
        from ._transport.fetching import fetch  # noqa: PLC0415 - loads aiohttp

        body = await self._stack.enter_async_context(
            fetch(self._url, allows=lambda _: True, ssl_context=self._ssl_context)
        )
        kind = body.headers.get("Content-Type", "")
        name, _, boundary = kind.partition("boundary=")
        if body.status != 200 or "multipart/" not in name.lower() or not boundary:
            await self._stack.aclose()
            instead = f"status {body.status}" if body.status != 200 else kind or "nothing"
            raise ImageError(f"{_shown(self._url)} gives no Motion JPEG, but {instead}")
        parser = MJPEGParser(boundary.partition(";")[0])

        async def pictures() -> AsyncIterator[list[bytes]]:
            async for data in body:
                yield parser.feed(data)

        self._frames = pictures()
        self._began = time.monotonic()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Frame:
        """Return the newest picture that has arrived; wait for one if there is none.

        Raises:
            ImageError: The connection was lost, or the camera sent no Motion JPEG.
        """
        if self._frames is None:
            raise RequestError(f"{_shown(self._url)} is not open: use it with 'async with'")
        try:
            async for found in self._frames:
                self._index += len(found)
                if found:
                    at = time.monotonic() - self._began
                    return Frame(image=found[-1], time=at, index=self._index - 1)
        except APIConnectionError as error:
            raise ImageError(f"{_shown(self._url)} can't be read: {error}") from error
        raise StopAsyncIteration


def bgr(array: Any) -> Any:
    """Return a view of an OpenCV picture (blue, green, red) as RGB; nothing is copied.

    >>> import numpy
    >>> bgr(numpy.array([[[255, 0, 1]]], numpy.uint8)).tolist()
    [[[1, 0, 255]]]
    """
    return array[..., ::-1]


def decode_video(
    path: str,
    closing: threading.Event,
    *,
    every: float | None = None,
    keyframes: bool = False,
    paced: bool = False,
    format: str | None = None,  # noqa: A002 - PyAV's word
    options: dict[str, str] | None = None,
) -> Iterator[Frame | None]:
    """Yield None once the container is open, then its frames. Closing this closes it."""
    import av  # noqa: PLC0415 - an extra
    import numpy as np  # noqa: PLC0415 - likewise

    timeout = _NETWORK_TIMEOUT if "://" in path or format else None
    with av.open(path, format=format, options=options or {}, timeout=timeout) as container:
        if not container.streams.video:
            raise ImageError(f"{_shown(path)} has no pictures in it")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        if keyframes:
            stream.codec_context.skip_frame = "NONKEY"
        yield None
        began, first, due, index = time.monotonic(), None, 0.0, 0
        for number, picture in enumerate(container.decode(stream)):
            if closing.is_set():
                return
            at = float(number if picture.time is None else picture.time)
            first = at if first is None else first
            if paced and closing.wait(max(0.0, at - first - (time.monotonic() - began))):
                return
            if every is not None:
                if at - first < due - _EPSILON:
                    continue
                due = ((at - first + _EPSILON) // every + 1) * every
            image: Any = picture.to_ndarray(format="rgb24")
            if turns := round(picture.rotation / 90) % 4:
                image = np.ascontiguousarray(np.rot90(image, turns))
            yield Frame(image=image, time=at, index=index)
            index += 1


def _grab(monitor: int, interval: float, closing: threading.Event) -> Iterator[Frame | None]:
    import mss  # noqa: PLC0415 - an extra

    with mss.mss() as shooter:
        if monitor >= len(shooter.monitors):
            raise ImageError(f"There is no screen {monitor}")
        yield None
        began, index = time.monotonic(), 0
        while not closing.is_set():
            at = time.monotonic() - began
            yield Frame(image=rgb(shooter.grab(shooter.monitors[monitor])), time=at, index=index)
            index += 1
            closing.wait(max(0.0, began + index * interval - time.monotonic()))


def rgb(shot: Any) -> Any:
    """Return a screenshot of mss, which has blue first and a fourth channel, as an RGB array."""
    import numpy as np  # noqa: PLC0415 - an extra

    return np.ascontiguousarray(np.asarray(shot)[..., 2::-1])


def check_video() -> None:
    """Raise MissingExtraError where PyAV is not installed."""
    _load("av", "PyAV")


def _load(module: str, name: str) -> None:
    from importlib.util import find_spec  # noqa: PLC0415 - only these sources need it

    if find_spec(module) is None:
        raise MissingExtraError(f"{name} is needed: pip install 'moondream-async[video]'")


def _shown(path: str) -> str:
    from ._transport.addresses import shown  # noqa: PLC0415 - most sources are files

    return shown(path) if "://" in path else repr(path)
