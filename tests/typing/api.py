"""The surface as a caller uses it, for type checkers to read. It is never run.

Each ``type: ignore`` is a mistake that a type checker must find: under ``--strict``, one
that it does not need is an error.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import moondream_async as md
from moondream_async import frames

if TYPE_CHECKING:
    from typing import assert_type  # noqa: TC004 - it is never run

    import PIL.Image


# -- stream=True, stream=False, and a bool -------------------------------------------------


async def caption(client: md.MoondreamClient, image: bytes, *, stream: bool) -> None:
    assert_type(await client.caption(image), md.CaptionResult)
    assert_type(await client.caption(image, stream=False), md.CaptionResult)
    assert_type(await client.caption(image, stream=True), md.CaptionStream)
    assert_type(await client.caption(image, stream=stream), md.CaptionResult | md.CaptionStream)


async def query(client: md.MoondreamClient, image: bytes, *, stream: bool) -> None:
    assert_type(await client.query(image, "How many?"), md.QueryResult)
    assert_type(await client.query(question="Why?", stream=False), md.QueryResult)
    assert_type(await client.query(image, "How many?", stream=True), md.QueryStream)
    assert_type(
        await client.query(image, "How many?", stream=stream), md.QueryResult | md.QueryStream
    )


async def segment(client: md.MoondreamClient, image: bytes, *, stream: bool) -> None:
    assert_type(await client.segment(image, "boat"), md.SegmentResult)
    assert_type(await client.segment(image, "boat", stream=True), md.SegmentStream)
    assert_type(
        await client.segment(image, "boat", stream=stream), md.SegmentResult | md.SegmentStream
    )


async def chat(client: md.MoondreamClient, *, stream: bool) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    assert_type(await client.chat(messages), md.ChatResult)
    assert_type(await client.chat(messages, stream=True), md.ChatStream)
    assert_type(await client.chat(messages, stream=stream), md.ChatResult | md.ChatStream)


async def union_is_told_apart(client: md.MoondreamClient, image: bytes, *, stream: bool) -> str:
    answer = await client.caption(image, stream=stream)
    if isinstance(answer, md.CaptionStream):
        return await answer.text()
    return answer.caption


async def entered(client: md.MoondreamClient, image: bytes) -> None:
    async with client.caption(image, stream=True) as caption:
        assert_type(caption, md.CaptionStream)
    async with client.caption(image):  # type: ignore[attr-defined] # a result has no end
        pass


async def made_a_task(client: md.MoondreamClient, image: bytes) -> None:
    result = asyncio.create_task(client.caption(image))
    stream = asyncio.create_task(client.caption(image, stream=True))
    assert_type(await result, md.CaptionResult)
    assert_type(await stream, md.CaptionStream)
    many = await asyncio.gather(*[client.query(image, "?", stream=True) for _ in range(9)])
    assert_type(many, list[md.QueryStream])
    kept: Coroutine[Any, Any, md.CaptionResult] = client.caption(image)
    await kept


# -- the other calls -----------------------------------------------------------------------


async def others(client: md.MoondreamClient, image: md.EncodedImage) -> None:
    assert_type(await client.detect(image, "boat"), md.DetectResult)
    assert_type(await client.point(image, "boat", spatial_refs=[(0.5, 0.5)]), md.PointResult)
    assert_type(await client.models(), list[md.Model])
    assert_type(await client.health(), md.Health)
    assert_type(await client.server_stats(), md.ServerStats)
    assert_type(await client.encode_image("photo.jpg"), md.EncodedImage)
    assert_type(client.stats(), md.ClientStats)
    assert_type(client.endpoint, str)
    await client.aclose()
    await client.aclose(grace=5.0)


async def clients() -> None:
    async with md.MoondreamClient("key") as client:
        assert_type(client, md.MoondreamClient)
    async with md.vl(api_key="key") as client:
        assert_type(client, md.MoondreamClient)
    limits = md.Timeout(first_event=30, idle=None)
    md.MoondreamClient(model="m", timeout=limits, max_retries=0, max_connections=8, rate_limit=2)
    md.MoondreamClient(timeout=5)
    md.MoondreamClient("key", "model")


# -- arguments -----------------------------------------------------------------------------


class Pixels:
    """What a numpy array has."""

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {}


async def pictures(
    client: md.MoondreamClient, path: os.PathLike[str], opened: PIL.Image.Image
) -> None:
    await client.caption("photo.jpg")
    await client.caption(Path("photo.jpg"))
    await client.caption(path)
    await client.caption(b"")
    await client.caption(bytearray())
    await client.caption(memoryview(b""))
    await client.caption(opened)
    await client.caption(Pixels())
    await client.caption(await client.encode_image(opened))
    with open(path, "rb") as file:  # noqa: ASYNC230, PTH123 - it is never run
        await client.caption(file)
    await client.caption(5)  # type: ignore[call-overload] # no picture
    await client.caption(None)  # type: ignore[call-overload] # needs one
    image: md.ImageInput = "photo.jpg"
    await client.query(image, "How many?")


async def settings(client: md.MoondreamClient, image: bytes) -> None:
    await client.caption(image, settings={"temperature": 0.5, "max_tokens": 99})
    await client.caption(image, settings={"temprature": 0.5})  # type: ignore[call-overload]
    await client.query(image, "?", settings={"top_k": 9})  # type: ignore[call-overload]
    await client.detect(image, "boat", settings={"max_object": 5})  # type: ignore[arg-type]
    await client.chat([], settings={"max_tokens": "many"})  # type: ignore[call-overload]
    client.bulk([image], settings={"temprature": 0.5})  # type: ignore[call-overload]
    client.watch([image], settings={"temprature": 0.5})  # type: ignore[call-overload]
    await client.caption(image, settings=cast("md.Settings", {"unknown": [1, 2]}))
    typed: md.Settings = {"temperature": 0.5, "top_p": 1}
    await client.query(image, "How many?", settings=typed, stream=True)
    await client.detect(image, "boat", settings=typed)
    wrong: md.Settings = {"temprature": 0.5}  # type: ignore[typeddict-unknown-key]
    await client.caption(image, settings=wrong)
    await client.caption(image, settings="hot")  # type: ignore[call-overload]


async def options(client: md.MoondreamClient, image: bytes) -> None:
    await client.caption(image, length="short", model="moondream3-preview")
    await client.caption(image, length="tiny")  # type: ignore[call-overload]
    await client.caption(image, "short", False, {"temperature": 0.5})
    assert_type(await client.caption(image, "short", True), md.CaptionStream)
    assert_type(await client.query(image, "?", True), md.QueryStream)
    assert_type(await client.segment(image, "boat", [(0.5, 0.5)], True), md.SegmentStream)
    assert_type(await client.chat([], True), md.ChatStream)
    await client.caption(image, "short", False, None, "model")  # type: ignore[call-overload]
    await client.query(image, "?", reasoning=True, spatial_refs=[[0.5, 0.5], (0, 0, 1, 1)])
    await client.query(image, "?", reasoning="yes")  # type: ignore[call-overload]
    await client.detect(image)  # type: ignore[call-arg] # what?
    await client.detect(image, "boat", stream=True)  # type: ignore[call-arg] # can't


# -- results -------------------------------------------------------------------------------


async def by_attribute(client: md.MoondreamClient, image: bytes) -> None:
    caption = await client.caption(image)
    assert_type(caption.caption, str)
    assert_type(caption.request_id, str | None)
    assert_type(caption.finish_reason, str | None)
    assert_type(caption.metrics, dict[str, Any] | None)
    assert_type(caption.raw, dict[str, Any])
    caption.answer  # type: ignore[attr-defined] # noqa: B018 - that is a query's
    caption.caption = "mine"  # type: ignore[misc] # frozen

    answer = await client.query(image, "How many?", reasoning=True)
    assert_type(answer.answer, str)
    assert_type(answer.reasoning, md.Reasoning | None)
    if answer.reasoning is not None:
        assert_type(answer.reasoning.text, str)
        assert_type(answer.reasoning.grounding, list[md.Grounding])

    detected = await client.detect(image, "boat")
    assert_type(detected.objects[0].x_max, float)
    pointed = await client.point(image, "boat")
    assert_type(pointed.points[0].to_pixels(640, 480), tuple[float, float])
    outline = await client.segment(image, "boat")
    assert_type(outline.path, str)
    assert_type(outline.bbox, md.Region | None)
    assert_type(outline.to_mask(640, 480), "PIL.Image.Image")
    turn = await client.chat([{"role": "user", "content": ["What is this?", image]}])
    assert_type(turn.message.content, str)
    assert_type(turn.usage, md.Usage | None)


async def by_item(client: md.MoondreamClient, image: bytes) -> None:
    caption = await client.caption(image)
    assert_type(caption["caption"], str)
    assert_type(caption["metrics"], dict[str, Any])
    assert_type(caption["finish_reason"], str)
    caption["captoin"]  # type: ignore[call-overload]
    caption["mine"]  # type: ignore[call-overload]
    assert_type(caption.get("mine"), Any | None)
    text: str = caption["caption"]
    detected = await client.detect(image, "boat")
    assert_type(detected["objects"], list[md.Region])
    detected["objects"][0]["x_mim"]  # type: ignore[call-overload]
    answer = await client.query(image, "How many?")
    assert_type(answer["answer"], str)
    assert_type(answer["reasoning"], md.Reasoning)
    assert_type(answer["reasoning"]["grounding"][0]["points"], list[list[float]])
    outline = await client.segment(image, "boat")
    assert_type(outline["bbox"]["x_min"], float)
    turn = await client.chat([])
    assert_type(turn["message"]["content"], str)
    assert_type(turn["usage"]["total_tokens"], int)
    assert_type((await client.batches.get("id"))["status"], str)
    (await client.batches.get("id"))["stauts"]  # type: ignore[call-overload]
    x_max = detected["objects"][0]["x_max"]
    assert_type(x_max, float)
    md.Region(0, 0, 1)  # type: ignore[call-arg]
    md.CaptionResult(captoin="a boat")  # type: ignore[call-arg]
    assert_type("caption" in caption, bool)
    assert_type(dict(caption), dict[str, Any])
    row: dict[str, Any] = caption | {"mine": 1}
    row.update(detected)
    every: list[md.Result] = [caption, answer, detected, outline, turn]
    assert_type(every[0]["request_id"], str)
    await client.query(image, text, spatial_refs=[(x_max, x_max)])
    stream = await client.caption(image, stream=True)
    async for piece in stream["caption"]:
        assert_type(piece, Any)


async def in_bulk(client: md.MoondreamClient, paths: list[Path], skill: str) -> None:
    assert_type(client.bulk(paths), md.BulkRun[Path, md.CaptionResult])
    assert_type(client.bulk(paths, "query", question="?"), md.BulkRun[Path, md.QueryResult])
    assert_type(client.bulk(paths, "point", object="boat"), md.BulkRun[Path, md.PointResult])
    assert_type(client.bulk(paths, "segment", object="boat"), md.BulkRun[Path, md.SegmentResult])
    assert_type(client.bulk(paths, skill), md.BulkRun[Path, Any])
    assert_type(client.caption_many(paths, length="short"), md.BulkRun[Path, md.CaptionResult])
    client.bulk(paths, "detect", objct="boat")  # type: ignore[call-overload]
    async for done in client.bulk(paths, "detect", object="boat", ordered=True):
        assert_type(done.item, Path)
        if done.ok:
            assert_type(done.result.objects, list[md.Region])
            done.result.caption  # type: ignore[attr-defined] # noqa: B018
        else:
            assert_type(done.error, md.MoondreamError | None)


# -- streams -------------------------------------------------------------------------------


async def read(client: md.MoondreamClient, image: bytes) -> None:
    stream = await client.query(image, "How many?", stream=True)
    assert_type(stream.chunk, AsyncIterator[str])
    async for piece in stream:
        assert_type(piece, str)
    async for piece in stream.chunk:
        assert_type(piece, str)
    assert_type(await anext(stream), str)
    assert_type(await stream.text(), str)
    assert_type(stream.completed, bool)
    assert_type(stream.ttft, float | None)
    assert_type(stream.request_id, str | None)
    assert_type(stream.reasoning, md.Reasoning | None)
    assert_type(stream.usage, md.Usage | None)
    stream.caption  # type: ignore[attr-defined] # noqa: B018 - a stream has pieces
    list(stream)  # type: ignore[call-overload] # only asynchronously
    async with stream as same:
        assert_type(same, md.QueryStream)
    await stream.aclose()


async def events(client: md.MoondreamClient, image: bytes) -> None:
    stream = await client.segment(image, "boat", stream=True)
    assert_type(stream.bbox, md.Region | None)
    assert_type(stream.path, str | None)
    async for event in stream.events:
        assert_type(event, md.StreamEvent)
        assert_type(event.chunk, str)
        match event:
            case md.ChunkEvent(chunk=chunk):
                assert_type(chunk, str)
            case md.BboxEvent(bbox=bbox):
                assert_type(bbox, md.Region)
            case md.ReasoningEvent(text=text):
                assert_type(text, str)
            case md.MetricsEvent(metrics=metrics):
                assert_type(metrics, dict[str, Any])
            case md.UnknownEvent(event=name):
                assert_type(name, str)
            case _:
                assert_type(event.raw, dict[str, Any])


# -- moving pictures -----------------------------------------------------------------------


async def moving(client: md.MoondreamClient, pictures: list[bytes], skill: str) -> None:
    async with frames.video("clip.mp4", every=1) as clip:
        async with client.watch(clip, "detect", object="cat") as found:
            async for each in found:
                assert_type(each.frame, frames.Frame)
                assert_type(each.error, md.MoondreamError | None)
                assert_type(each.age, float)
                if each.ok:
                    assert_type(each.result.objects, list[md.Region])
        async for said in client.watch(clip):
            assert_type(said.result, md.CaptionResult)
    async for answer in client.watch(pictures, "query", question="Who?", max_age=1.0):
        assert_type(answer.frame, bytes)
        assert_type(answer.result, md.QueryResult)
    async for written in client.watch(pictures, "caption", stream=True, length="short"):
        assert_type(written.result, md.CaptionStream)
    assert_type(client.watch(pictures, "point", object="cat"), md.Watch[bytes, md.PointResult])
    assert_type(client.watch(pictures, skill), md.Watch[bytes, Any])
    client.watch(pictures, "point", objct="cat")  # type: ignore[call-overload]


# -- errors --------------------------------------------------------------------------------


async def failures(client: md.MoondreamClient, image: bytes) -> None:
    try:
        await client.caption(image)
    except md.RateLimitError as error:
        assert_type(error.retry_after, float | None)
    except md.APIStatusError as error:
        assert_type(error.status, int)
        assert_type(error.message, str)
        assert_type(error.request_id, str | None)
    except md.StreamError as error:
        assert_type(error.partial, str)
    except md.APITimeoutError as error:
        if error.phase == "first_event":
            raise
        if error.phase == "never":  # type: ignore[comparison-overlap] # no such limit
            raise
