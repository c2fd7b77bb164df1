"""Other people's programs: two clients against our simulator, our client against a server.

They are the official package `moondream`, the package `openai`, and the server of
`moondream-station` with a stand-in for its model (`station.py`). None of them
shares a line with this project, so none shares its mistakes.
"""

import asyncio
import subprocess
import sys
import urllib.error
from functools import partial
from pathlib import Path

import anyio
import pytest
from PIL import Image
from spoken import SAMPLE

import moondream_async as md
from moondream_async.simulator import DIALECTS, Simulator

pytestmark = pytest.mark.slow  # they say the same on every Python

INSTALL = "python -m pip install --no-deps -r tests/foreign.txt"
QUESTION = "Where is the red circle?"
MODEL = "moondream3-preview"
SETTINGS = {"temperature": 0.5, "max_tokens": 5}


async def in_thread(function, *args, **kwargs):
    return await anyio.to_thread.run_sync(partial(function, *args, **kwargs))


# -- the official client --------------------------------------------------------------


@pytest.fixture
def official():
    # Its cloud client needs Pillow only; torch is loaded with its local one.
    return pytest.importorskip("moondream", reason=f"needs: {INSTALL}")


@pytest.fixture
def theirs(official, simulator):
    return official.vl(endpoint=simulator.endpoint)


@pytest.fixture
def picture(photo):
    with Image.open(photo) as image:
        image.load()
    return image


@pytest.fixture
def messages():
    picture = {"type": "image_url", "image_url": {"url": SAMPLE}}
    return [{"role": "user", "content": [{"type": "text", "text": QUESTION}, picture]}]


def sent_picture(simulator):
    """Return the picture of the latest request: the official client encodes it anew."""
    return simulator.requests[-1].body["image_url"]


def read(answer):
    """Read an answer of the official client, streamed or not, to its end."""
    return answer if isinstance(answer, (str, dict)) else "".join(answer)


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_official_client_reads_answers_and_finds_places_as_we_do(
    theirs, client, simulator, picture
):
    for stream in (False, True):
        said = await in_thread(
            lambda stream=stream: read(theirs.caption(picture, "short", stream)["caption"])
        )
        assert simulator.requests[-1].stream is stream
        same = sent_picture(simulator)
        assert said == (await client.caption(same, length="short")).caption
        said = await in_thread(
            lambda stream=stream: read(theirs.query(picture, QUESTION, stream)["answer"])
        )
        assert said == (await client.query(same, QUESTION)).answer

    found = await in_thread(theirs.detect, picture, "shape", settings={"max_objects": 2})
    ours = await client.detect(same, "shape", settings={"max_objects": 2})
    assert found["objects"] == [dict(box) for box in ours["objects"]]
    assert len(found["objects"]) == 2
    found = await in_thread(theirs.point, picture, "shape", spatial_refs=[[0.2, 0.5]])
    ours = await client.point(same, "shape", spatial_refs=[[0.2, 0.5]])
    assert found["points"] == [dict(point) for point in ours["points"]]
    assert found["points"]


async def test_official_client_gets_reasoning_and_settings_through_and_needs_no_picture(
    official, simulator, client, picture
):
    theirs = official.vl(endpoint=simulator.endpoint, model=MODEL)
    options = {"reasoning": True, "spatial_refs": [[0.2, 0.5]], "settings": SETTINGS}
    said = await in_thread(theirs.query, picture, QUESTION, **options)
    ours = await client.query(sent_picture(simulator), QUESTION, model=MODEL, **options)
    assert said["answer"] == ours.answer
    assert len(said["answer"].split()) == 5
    assert said["reasoning"] == ours.raw["reasoning"]
    their_request, our_request = (request.body for request in simulator.requests)
    assert their_request == our_request

    said = await in_thread(theirs.query, question=QUESTION)
    assert said == {"answer": (await client.query(question=QUESTION)).answer}


@pytest.mark.parametrize("dialect", ["cloud", "kestrel"])
async def test_official_client_outlines_the_same_object(theirs, client, simulator, picture):
    plain = await in_thread(theirs.segment, picture, "red circle")
    same = sent_picture(simulator)
    ours = await client.segment(same, "red circle")
    assert plain == {"path": ours.path, "bbox": dict(ours.bbox)}

    def stream():
        return list(theirs.segment(picture, "red circle", stream=True))

    bbox, *deltas, final = await in_thread(stream)
    async with client.segment(same, "red circle", stream=True) as stream:
        updates = [update async for update in stream]
    assert updates[0]["bbox"] == stream.bbox == md.Region(**bbox["bbox"])
    assert updates[1:-1] == deltas
    assert updates[-1] == final | {"bbox": stream.bbox}
    assert final == {"path": stream.path, "bbox": dict(stream.bbox), "completed": True}


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
async def test_official_client_chats(theirs, client, simulator, messages, stream):
    messages = [{"role": "system", "content": "Be brief."}, *messages]
    options = {"settings": SETTINGS, "reasoning": False, "stream": stream}
    answer = await in_thread(theirs.chat, messages, **options)
    said = await in_thread(read, answer["message"])
    ours = await client.chat(messages, settings=SETTINGS, reasoning=False)
    words = ours.message.content
    assert said == (words if stream else {"role": "assistant", "content": words})
    assert answer.get("finish_reason") == (None if stream else ours.finish_reason)
    assert "red" in words
    their_request, our_request = (dict(request.body) for request in simulator.requests)
    del their_request["stream"], our_request["stream"]
    assert their_request == our_request


async def test_official_client_shows_its_key_where_we_do(official, picture):
    async with (
        Simulator(api_key="a-key") as simulator,
        md.MoondreamClient("a-key", endpoint=simulator.endpoint) as client,
    ):
        theirs = official.vl(api_key="a-key", endpoint=simulator.endpoint)
        messages = [{"role": "user", "content": QUESTION}]
        await in_thread(theirs.detect, picture, "circle")
        await in_thread(theirs.chat, messages)
        await client.detect(picture, "circle")
        await client.chat(messages)
        keys = [
            (headers.get("X-Moondream-Auth"), headers.get("Authorization"))
            for headers in (request.headers for request in simulator.requests)
        ]
        assert keys == [("a-key", None), (None, "Bearer a-key")] * 2
        stranger = official.vl(api_key="another", endpoint=simulator.endpoint)
        with pytest.raises(urllib.error.HTTPError) as caught:
            await in_thread(stranger.detect, picture, "circle")
        caught.value.close()
        assert caught.value.code == 401


async def test_official_client_tunes(official, simulator, picture):
    tuning = f"{simulator.endpoint}/tuning"

    def tune():
        finetune = official.ft("a-key", name="circles", rank=8, endpoint=tuning)
        rolled = finetune.rollouts(
            "point",
            image=picture,
            object="red circle",
            num_rollouts=2,
            ground_truth={"points": [{"x": 0.22, "y": 0.54}]},
        )
        group = {"mode": "rl", "request": rolled["request"], "rewards": rolled["rewards"]}
        step = finetune.train_step([{**group, "rollouts": rolled["rollouts"]}])["step"]
        finetune.log_metrics(step, {"mine": 1.0})
        finetune.save_checkpoint()
        again = official.ft("a-key", finetune_id=finetune.finetune_id, endpoint=tuning)
        assert (again.name, again.rank) == ("circles", 8)
        steps = [each["step"] for each in again.list_checkpoints()["checkpoints"]]
        again.delete()
        return rolled["rewards"], step, steps

    assert await in_thread(tune) == ([1.0, 1.0], 1, [1])


# -- openai ---------------------------------------------------------------------------


async def test_openai_client_chats_lists_models_and_understands_a_refusal(
    client, simulator, messages
):
    openai = pytest.importorskip("openai", reason="needs the extra foreign")
    asked = {"model": MODEL, "messages": messages, "extra_body": {"reasoning": True}}
    async with openai.AsyncOpenAI(
        base_url=simulator.endpoint, api_key="a-key", max_retries=0
    ) as openai_client:
        theirs = await openai_client.chat.completions.create(**asked)
        stream = await openai_client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
        async with stream:
            chunks = [chunk async for chunk in stream]
        models = [model.id async for model in openai_client.models.list()]
        simulator.faults.append("status=429")
        with pytest.raises(openai.RateLimitError) as refused:
            await openai_client.chat.completions.create(**asked)

    ours = await client.chat(messages, reasoning=True)
    assert theirs.object == "chat.completion"
    [choice] = theirs.choices
    assert choice.message.role == ours.message.role == "assistant"
    assert choice.message.content == ours.message.content
    assert choice.message.model_extra["reasoning"] == ours.reasoning.text
    assert choice.finish_reason == ours.finish_reason == "stop"
    assert theirs.usage.to_dict() == dict(ours.usage)

    async with client.chat(messages, stream=True, reasoning=True) as ours:
        text = await ours.text()
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == text
    thought = "".join((delta.model_extra or {}).get("reasoning", "") for delta in deltas)
    assert thought == ours.reasoning.text
    assert chunks[-2].choices[0].finish_reason == ours.finish_reason == "stop"
    assert chunks[-1].usage.to_dict() == dict(ours.usage)

    assert models == [model.id for model in await client.models()]
    assert refused.value.type == "rate_limit_exceeded"
    assert refused.value.body["message"] == "Simulated error 429"


# -- Moondream Station ----------------------------------------------------------------


@pytest.fixture(scope="module")
def station():
    pytest.importorskip("moondream_station", reason=f"needs: {INSTALL}")
    pytest.importorskip("fastapi", reason="needs the extra foreign")
    program = [sys.executable, Path(__file__).with_name("station.py")]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        port = int(process.stdout.readline())
        process.endpoint = f"http://127.0.0.1:{port}/v1"
        yield process
        process.stdin.close()


@pytest.fixture
async def guest(station):
    async with md.MoondreamClient(endpoint=station.endpoint) as client:
        yield client


@pytest.fixture
async def image(guest, photo):
    return await guest.encode_image(photo)


async def test_station_captions_answers_and_thinks_in_plain_answers_only(guest, image):
    text = f"A short “résumé” of {len(image.data)} bytes."
    plain = await guest.caption(image, length="short")
    stream = await guest.caption(image, length="short", stream=True)
    pieces = [piece async for piece in stream.chunk]
    assert plain.caption == "".join(pieces) == text
    assert len(pieces) == 6
    assert plain.metrics["tokens"] == stream.metrics["tokens"] == 6
    assert plain.raw == {"caption": text, "_stats": plain.metrics}

    thought = md.Reasoning(
        "I count bytes.", [md.Grounding(start_idx=8, end_idx=13, points=[[0.5, 0.5]])]
    )
    for reasoning in (None, thought):
        options = {"reasoning": reasoning is not None}
        plain = await guest.query(image, "Why?", **options)
        stream = await guest.query(image, "Why?", **options, stream=True)
        assert plain.answer == await stream.text() == f"Why? I see {len(image.data)} bytes."
        assert (plain.reasoning, stream.reasoning, stream.completed) == (reasoning, None, True)


async def test_station_finds(guest, image):
    boxes = await guest.detect(image, "heron")
    assert boxes.objects == [md.Region(0.1, 0.2, 0.5, 0.6)]
    points = await guest.point(image, "heron")
    assert points.points == [md.Point(0.3, 0.4)]
    assert points.raw["count"] == 1
    assert (await guest.detect(image, "stork")).objects == []
    assert (await guest.point(image, "stork")).points == []


async def test_station_that_answers_whole_or_says_nothing_in_a_stream_has_completed_it(guest):
    for question, pieces in (("Whole.", ["Whole. I see 0 bytes."]), ("Say nothing.", [])):
        stream = await guest.query(question=question, stream=True)
        assert [piece async for piece in stream] == pieces
        assert stream.completed


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
async def test_station_failure_with_status_200_is_an_error_and_not_retried(guest, stream):
    before = (await guest.server_stats()).requests_processed
    with pytest.raises(md.ServerError, match="bad thing") as caught:
        await guest.query(question="Fail.", stream=stream)
    assert caught.value.status == 200
    assert caught.value.body == {"error": "bad thing", "status": "error"}
    assert (await guest.server_stats()).requests_processed == before + 1


async def test_station_failure_within_a_stream_is_an_interruption(guest):
    stream = await guest.query(question="Break off.", stream=True)
    with pytest.raises(md.StreamInterruptedError) as caught:
        await stream.text()
    assert caught.value.partial == "Half an "


async def test_station_lacks_outlines_and_chat(guest, image):
    hello = [{"role": "user", "content": "Hello."}]
    for name, asked in {"segment": (image, "heron"), "chat": (hello,)}.items():
        for stream in (False, True):
            with pytest.raises(md.NotFoundError, match=f"Function '{name}' not available"):
                await getattr(guest, name)(*asked, stream=stream)


async def test_station_whose_queue_is_full_is_asked_again(station, image):
    async with (
        md.MoondreamClient(endpoint=station.endpoint, max_retries=10) as patient,
        md.MoondreamClient(endpoint=station.endpoint, max_retries=0) as hasty,
    ):

        async def until(**wanted):
            while True:
                stats = dict(await hasty.server_stats())
                if all(stats[name] == value for name, value in wanted.items()):
                    return stats["requests_processed"]

        working = asyncio.ensure_future(hasty.query(image, "Wait."))
        await until(processing=1)
        queued = asyncio.ensure_future(hasty.query(image, "Wait."))
        processed = await until(processing=1, queue_size=1)
        with pytest.raises(md.ServerError, match="Queue is full") as caught:
            await hasty.caption(image)
        assert caught.value.body["status"] == "rejected"
        rejected = asyncio.ensure_future(patient.caption(image))
        while (await hasty.server_stats()).requests_processed < processed + 2:
            pass
        station.stdin.write(b"\n\n")
        station.stdin.flush()
        answers = await asyncio.gather(working, queued)
        assert all(answer.answer.startswith("Wait.") for answer in answers)
        assert (await rejected).caption.startswith("A normal")


async def test_station_tells_of_itself(guest):
    assert await guest.health() == md.Health(
        ok=True, status="ok", raw={"status": "ok", "server": "moondream-station"}
    )
    (model,) = await guest.models()
    assert (model.id, model.name, model.description, model.version) == (
        "stand-in",
        "Stand-in",
        "No model at all",
        "1.2",
    )
    stats = await guest.server_stats()
    assert (stats.status, stats.model, stats.workers) == ("running", "stand-in", 1)
    assert (stats.max_queue_size, stats.default_timeout) == (1, 30.0)
    assert stats.requests_processed == stats.raw["requests_processed"]
