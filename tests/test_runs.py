"""How `bulk` and `watch` end, whoever ends them, and what both refuse: nothing is left behind."""

import asyncio
import gc
import io
import threading

import anyio.lowlevel
import pytest
from PIL import Image

import moondream_async as md
from moondream_async.simulator import Simulator


def picture():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "JPEG")
    return file.getvalue()


async def endless():
    while True:
        await anyio.lowlevel.checkpoint()
        yield picture()


@pytest.fixture(params=["bulk", "watch"])
def begin(request):
    """Begins a run of a client over pictures."""
    return lambda client, *args, **options: getattr(client, request.param)(*args, **options)


@pytest.fixture
def held(simulator):
    """The answer to all questions, which waits until it is released."""
    return simulator.script.caption("A picture.", hold_after=0, times=None)


async def begin_reading(run, simulator):
    """Read in a task of its own; return it when the server holds an answer."""
    reading = asyncio.create_task(anext(run))
    await simulator.wait_until(lambda: any(each.held for each in simulator.requests))
    return reading


def left():
    """The tasks and threads of runs."""
    tasks = [task for task in asyncio.all_tasks() if "moondream_async" in task.get_name()]
    return tasks + [each for each in threading.enumerate() if each.name == "moondream_async frames"]


async def nothing_left():
    """Wait until nothing of a run is left; the test's own time limit is the only one."""
    while left():
        await anyio.lowlevel.checkpoint()


# -- who ends it ----------------------------------------------------------------------


@pytest.mark.usefixtures("held")
async def test_leaving_ends_everything_at_once(begin, simulator, client):
    async with begin(client, endless()) as run:
        reading = await begin_reading(run, simulator)
        assert left()
    assert left() == []
    await simulator.wait_until(lambda: simulator.connections.open == 0)
    with pytest.raises(StopAsyncIteration):
        await reading
    await run.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(run)


@pytest.mark.parametrize(
    ("way", "source"),
    [("break", endless), ("drop", lambda: iter(picture, None))],
    ids=["break", "drop"],
)
async def test_a_break_ends_everything_without_the_cyclic_collector(
    begin, simulator, client, *, way, source
):
    gc.disable()
    try:
        if way == "break":
            async for each in begin(client, source()):
                assert each.ok
                break
        else:
            run = begin(client, source())
            await anext(run)
            del run
        await nothing_left()
    finally:
        gc.enable()
    await simulator.wait_until(lambda: all(r.ended.is_set() for r in simulator.requests))


async def test_cancelling_a_reader_inside_async_with_loses_nothing(begin, simulator, client, held):
    async with begin(client, [picture()]) as run:
        reading = await begin_reading(run, simulator)
        reading.cancel()
        await asyncio.wait([reading])
        held.release()
        assert [each.index async for each in run] == [0]


@pytest.mark.usefixtures("held")
async def test_cancelling_a_reader_outside_async_with_ends_the_run(begin, simulator, client):
    run = begin(client, endless())
    reading = await begin_reading(run, simulator)
    reading.cancel()
    await asyncio.wait([reading])
    assert left() == []
    with pytest.raises(StopAsyncIteration):
        await anext(run)


@pytest.mark.usefixtures("held")
async def test_a_client_that_is_closed_ends_the_run(begin, simulator, client):
    async with begin(client, endless()) as run:
        reading = await begin_reading(run, simulator)
        await client.aclose()
        with pytest.raises(md.ClientClosedError):
            await reading


async def test_a_wrong_key_ends_the_run(begin):
    async with (
        Simulator(api_key="right") as simulator,
        md.MoondreamClient("wrong", endpoint=simulator.endpoint) as client,
        begin(client, endless()) as run,
    ):
        with pytest.raises(md.AuthenticationError):
            await anext(run)
        with pytest.raises(StopAsyncIteration):
            await anext(run)
        assert left() == []


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_what_the_source_raises_comes_after_the_results_before_it(begin, client, kind):
    def pictures():
        yield picture()
        raise OSError("the camera is gone")

    async def later():
        for each in pictures():
            yield each

    async with begin(client, pictures() if kind == "plain" else later()) as run:
        assert (await anext(run)).ok
        with pytest.raises(OSError, match="the camera is gone"):
            await anext(run)


async def test_a_run_that_was_never_read_asks_nothing_and_needs_no_end(begin, simulator, client):
    begin(client, [picture()])
    run = begin(client, [picture()])
    await run.aclose()
    assert [each async for each in run] == simulator.requests == []


# -- what is refused, and what is told ------------------------------------------------

REFUSED = [
    ("photo.jpg", "caption", {}),
    (b"a picture", "caption", {}),
    (7, "caption", {}),
    ([], "chat", {}),
    ([], "caption", {"length": "huge"}),
    ([], "caption", {"lenght": "short"}),
    ([], "caption", {"question": "Why?"}),
    ([], "query", {"question": " "}),
    ([], "detect", {"object": " "}),
    ([], "caption", {"settings": {"temperature": -1}}),
]
OF_EACH = {
    "bulk": [{"concurrency": 0}, {"max_retries": -1}],
    "watch": [
        *({"in_flight": 0}, {"max_age": 0}, {"max_age": float("nan")}, {"on_error": "ignore"}),
        *({"stream": True, "skill": skill, "object": "cat"} for skill in ("detect", "point")),
    ],
}


@pytest.mark.parametrize("name", OF_EACH)
def test_an_argument_that_cannot_be_right_is_refused_at_once(name):
    begin = getattr(md.MoondreamClient(endpoint="http://127.0.0.1:9"), name)
    for items, skill, more in [*REFUSED, *(([], "caption", each) for each in OF_EACH[name])]:
        with pytest.raises(md.RequestError) as caught:
            begin(items, **({"skill": skill} | more))
        assert "lenght" not in more or "'length'" in str(caught.value)


async def test_a_bad_picture_is_a_result_with_its_error_which_holds_no_frames(
    begin, simulator, client
):
    (result,) = [each async for each in begin(client, [b"no picture"])]
    assert (type(result.error), result.ok, result.result) == (md.ImageError, False, None)
    assert result.error.__traceback__ is None
    assert simulator.requests == []


async def test_hooks_and_statistics_see_each_question(begin, simulator):
    ends = []
    async with md.MoondreamClient(
        endpoint=simulator.endpoint, hooks=md.Hooks(end=ends.append)
    ) as client:
        (result,) = [each async for each in begin(client, [picture()], "detect", object="red")]
        assert result.ok
        assert client.stats().requests == 1
    assert [(each.skill, each.completed) for each in ends] == [("detect", True)]
