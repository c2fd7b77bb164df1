"""Batches, from requests to results: what a file may be, and what becomes of an upload."""

import asyncio
import base64
import contextlib
import datetime as dt
import io
import json
import ssl
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import anyio
import pytest
import trustme
from canned import IMAGE, client_of, refuses, replying
from PIL import Image
from programs import running
from raw_server import GoneError, RawServer, head, whole

import moondream_async as md
from moondream_async import BatchRequest, EncodedImage
from moondream_async.batch import wire as protocol
from moondream_async.batch.wire import Tally, check_lines
from moondream_async.simulator import Simulator

KEY = "a-key-of-some-length"
FULL_DISK = Path("/dev/full")  # which refuses all that is written to it
LINE = {"skill": "caption", "image": "QUJD"}


@pytest.fixture
async def simulator():
    """One that refuses whoever has no key, and at its storage whoever shows one."""
    async with Simulator(api_key=KEY) as simulator:
        yield simulator


@pytest.fixture
async def client(simulator):
    async with md.MoondreamClient(KEY, endpoint=simulator.endpoint) as client:
        yield client


def actions(simulator):
    """What was asked of the server, in its words."""
    return [request.query.get("action", request.method) for request in simulator.requests]


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


async def finished(client, requests, *, on_poll=None, **options):
    batch = await client.batches.create(requests, **options)
    return await client.batches.wait(batch, interval=0.001, on_poll=on_poll)


def picture(colour):
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "PNG")
    return file.getvalue()


async def collect(results):
    return {result.line_index: result async for result in results}


# -- requests -------------------------------------------------------------------------


def line_of(request, *images):
    return json.loads(request.line(images or [IMAGE]))


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (
            BatchRequest.caption(IMAGE, length="short", settings={"temperature": 0.5}, id="a"),
            {"id": "a", "skill": "caption", "length": "short", "settings": {"temperature": 0.5}},
        ),
        (
            BatchRequest.query(IMAGE, "How many?", reasoning=False, id=7),
            {"id": 7, "skill": "query", "question": "How many?", "reasoning": False},
        ),
        (BatchRequest.detect(IMAGE, "red car"), {"skill": "detect", "object": "red car"}),
        (BatchRequest.point(IMAGE, "door"), {"skill": "point", "object": "door"}),
    ],
    ids=["caption", "query", "detect", "point"],
)
def test_line_says_what_the_request_says_with_bare_base64(request_, expected):
    assert line_of(request_) == expected | {"image": base64.b64encode(IMAGE.data).decode()}


OTHER = EncodedImage(bytes(range(256)) * 9000, "image/png", 8, 8)


@pytest.mark.parametrize(
    "images", [[IMAGE], [IMAGE, OTHER], [EncodedImage(b"", "", 1, 1)] * 3], ids=len
)
def test_line_has_all_pictures(images):
    line = BatchRequest.query(images=images, question="é?", id="ü").line(images)
    assert line.endswith(b"}\n")
    sent = json.loads(line)
    assert [base64.b64decode(each) for each in sent["images"]] == [each.data for each in images]
    assert "image" not in sent


WRONG = {
    "text only": (lambda: BatchRequest.query(question="Why?"), "image"),
    "both": (lambda: BatchRequest.query(IMAGE, "Why?", images=[IMAGE]), "one of"),
    "none": (lambda: BatchRequest.query(question="Why?", images=[]), "image"),
    "no question": (lambda: BatchRequest.query(IMAGE), "question"),
    "no image": (lambda: BatchRequest.caption(None), "image"),
    "length": (lambda: BatchRequest.caption(IMAGE, length="tiny"), "length"),
    "bool id": (lambda: BatchRequest.caption(IMAGE, id=True), "id"),
    "list id": (lambda: BatchRequest.caption(IMAGE, id=[1]), "id"),
    "settings": (lambda: BatchRequest.caption(IMAGE, settings={"top_p": 2}), "top_p"),
    "blank object": (lambda: BatchRequest.detect(IMAGE, " "), "object"),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_request_that_cannot_be_right_is_refused_when_it_is_made(make, message):
    with pytest.raises(md.RequestError, match=message):
        make()


def test_request_does_not_show_its_pictures():
    assert repr(BatchRequest.caption(b"\xff" * 1000)).count("xff") == 0


# -- what a file may be ---------------------------------------------------------------


def check(*data):
    file, tally = io.BytesIO(b"".join(data)), Tally()
    while check_lines(file, tally, 1):
        pass


GOOD = b'{"skill": "caption", "image": "QUJD", "id": 1}'
TEXT_ONLY = b'{"skill": "query", "question": "Why?"'
TAKEN = {
    "no line break at the end": GOOD,
    "line break at the end": GOOD + b"\n",
    "CRLF": GOOD + b"\r\n" + GOOD.replace(b"1", b"2"),
    "UTF-8": '{"skill": "query", "image": "x", "question": "é\u2028"}'.encode(),
    "images": b'{"skill": "query", "images": ["x", "y"], "question": "?"}',
    "later server": b'{"skill": "dance", "id": {"a": [1]}, "new": null}',
    "no ids": b'{"skill": "point", "id": null}\n{"skill": "point"}',
    "ids of two types": b'{"skill": "point", "id": "1"}\n{"skill": "point", "id": 1}',
}
REFUSED = {
    "empty": (b"", "at least one"),
    "blank at the end": (GOOD + b"\n\n", "line 2 of the batch is blank"),
    "blank at the start": (b"\n" + GOOD, "line 1 of the batch is blank"),
    "only white space": (GOOD + b"\n \t\r\n", "line 2 of the batch is blank"),
    "cut": (GOOD + b"\n{", "line 2 of the batch is no request"),
    "no object": (b"[]", "line 1 of the batch is no request"),
    "no skill": (b'{"image": "x"}', "skill"),
    "no UTF-8": (b'{"skill": "point", "x": "\xff"}', "line 1 .*utf-8"),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, "line 1 .* no request"),
    "text only": (TEXT_ONLY + b"}", "without a picture"),
    "image null": (TEXT_ONLY + b', "image": null}', "without a picture"),
    "images empty": (TEXT_ONLY + b', "images": []}', "without a picture"),
    "id twice": (
        GOOD + b'\n{"skill": "point", "id": 2}\n' + GOOD,
        "line 3 of the batch has the id of line 1",
    ),
    "id in another spelling": (
        b'{"skill": "point", "id": "a"}\n{"skill": "point", "id": "\\u0061"}',
        "line 2 of the batch has the id of line 1",
    ),
}


@pytest.mark.parametrize("data", TAKEN.values(), ids=TAKEN)
def test_file_that_the_server_takes_passes(data):
    check(data)


@pytest.mark.parametrize(("data", "message"), REFUSED.values(), ids=REFUSED)
def test_file_that_the_server_would_refuse_is_refused_by_line(data, message):
    with pytest.raises(md.RequestError, match=message):
        check(data)


def test_line_may_have_ten_megabytes():
    start, end = b'{"skill": "point", "image": "', b'"}'
    pad = b"A" * (protocol.MAX_LINE_BYTES - len(start + end))
    check(GOOD, b"\n", start, pad, end)
    with pytest.raises(md.RequestError, match=r"line 2 of the batch is .*10,000,000"):
        check(GOOD, b"\n", start, pad, b"A", end)


def test_line_is_read_no_further_than_its_limit():
    file = io.BytesIO(b"A" * 20_000_000)
    with pytest.raises(md.RequestError, match="line 1 of the batch is too long"):
        check_lines(file, Tally(), 1)
    assert file.tell() < 10_000_010


@pytest.mark.parametrize(
    ("count", "size", "message"),
    [
        (100_000, 100, r"line 100001 of the batch .*100,000"),
        (200, 10_000_000, r"line 201 of the batch .*2,000,000,000"),
    ],
    ids=["lines", "bytes"],
)
def test_file_may_have_a_hundred_thousand_lines_and_two_gigabytes(count, size, message):
    tally = Tally()
    for number in range(count):
        tally.add(size, number)
    with pytest.raises(md.RequestError, match=message):
        tally.add(1, None)


async def test_file_over_two_gigabytes_is_refused_unread(client, tmp_path, simulator):
    path = tmp_path / "large.jsonl"
    with path.open("wb") as file:
        file.truncate(2_000_000_001)  # takes no room
    with pytest.raises(md.RequestError, match="2,000,000,000"):
        await client.batches.create(path)
    assert simulator.requests == []


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "at least one"),
        (
            [BatchRequest.point(IMAGE, "a", id=1), BatchRequest.point(IMAGE, "b", id=1)],
            "line 2 of the batch has the id of line 1",
        ),
        (
            [BatchRequest.point(IMAGE, "a"), "photo.jpg"],
            "line 2 of the batch must be a BatchRequest",
        ),
        (b"photo.jpg", "line 1 of the batch must be"),
        (7, "iterable"),
        ("no such file.jsonl", "can't be opened"),
        ("nul\0.jsonl", "can't be opened"),
        (".", "not a regular file"),
    ],
    ids=lambda value: repr(value)[:12] if not isinstance(value, str) else value,
)
async def test_what_cannot_be_uploaded_is_refused_before_anything_is_sent(
    client, simulator, requests, message
):
    with pytest.raises(md.RequestError, match=message):
        await client.batches.create(requests)
    assert simulator.requests == []


ONE = [BatchRequest.caption(IMAGE)]
ASKED = [
    *[
        ("create", {"requests": ONE, "part_bytes": size}, "part_bytes")
        for size in (0, -1, 1.5, True, 100_000_000, None)
    ],
    *[("list", {"limit": limit}, "limit") for limit in (0, 101, True, "10")],
    *[(way, {"batch": given}, "id") for way in ("get", "wait") for given in ("", None, 7, b"id")],
]


@pytest.mark.parametrize(("method", "given", "message"), ASKED)
async def test_what_cannot_be_right_is_refused_before_anything_is_sent(
    client, simulator, method, given, message
):
    await refuses(getattr(client.batches, method), given, message)
    assert simulator.requests == []


async def test_picture_that_cannot_be_read_is_named_with_its_line(client, simulator, photo):
    requests = [BatchRequest.caption(photo)] * 5 + [BatchRequest.caption("gone.jpg")]
    with pytest.raises(md.ImageError, match=r"line 6 of the batch: 'gone.jpg' does not exist"):
        await client.batches.create(requests)
    assert simulator.requests == []


async def test_more_parts_than_a_server_counts_are_refused(client, simulator):
    image = EncodedImage(bytes(9000), "image/jpeg", 8, 8)
    with pytest.raises(md.RequestError, match="10,000 parts"):
        await client.batches.create([BatchRequest.caption(image)], part_bytes=1)
    assert simulator.requests == []


# -- from requests to results ---------------------------------------------------------


async def test_batch_answers_as_the_calls_do(client, photo):
    batch = await finished(
        client,
        [
            BatchRequest.caption(photo, length="short", id="the caption"),
            BatchRequest.query(photo, "How bright?", reasoning=False, id=2),
            BatchRequest.detect(photo, "red"),
            BatchRequest.point(photo, "red"),
            BatchRequest.query(images=[photo, picture("blue")], question="How many red?"),
        ],
    )
    results = await collect(client.batches.results(batch))
    assert isinstance(batch.created_at, dt.datetime)
    assert batch.expires_at - batch.completed_at == dt.timedelta(days=7)
    assert [results[index].id for index in range(5)] == ["the caption", 2, None, None, None]
    assert results[0].result.caption == (await client.caption(photo, length="short")).caption
    assert results[1].result.answer == (await client.query(photo, "How bright?")).answer
    assert results[2].result.objects == (await client.detect(photo, "red")).objects
    assert results[3].result.points == (await client.point(photo, "red")).points
    assert results[4].result.answer == (
        "Picture 1: There is 1 red area. Picture 2: There are 0 red areas."
    )
    reasons = [results[index].result.reasoning for index in (1, 4)]
    assert [reasoning is None for reasoning in reasons] == [True, False], "it is on unless told"
    assert all(result.ok and result.usage.input_tokens for result in results.values())
    assert results[0]["result"]["caption"] == results[0].raw["result"]["caption"]


async def test_requests_from_an_asynchronous_iterable_go_through_the_stages(client, photo):
    async def requests():
        for number in range(25):
            await asyncio.sleep(0)
            yield BatchRequest.caption(photo, id=number)

    seen = []
    batch = await finished(client, requests(), on_poll=seen.append)
    assert [(state.status, state.progress.completed) for state in seen] == [
        ("chunking", 0),
        ("processing", 0),
        ("processing", 13),
        ("completed", 25),
    ]
    assert batch.progress == md.BatchProgress(total=25, completed=25, failed=0)
    assert (batch.model, batch.usage.input_tokens) == ("moondream3-preview", 25 * 735)
    assert [output.index for output in batch.outputs] == [0, 1, 2]
    ids = [(result.line_index, result.id) async for result in client.batches.results(batch.id)]
    assert ids != sorted(ids), "a client must not rely on the order"
    assert sorted(ids) == [(number, number) for number in range(25)]


async def test_batch_that_is_asked_for_four_times_at_once_goes_through_four_stages(client, photo):
    batch = await client.batches.create([BatchRequest.caption(photo) for _ in range(9)])
    seen = await asyncio.gather(*(client.batches.get(batch) for _ in range(4)))
    assert sorted(state.progress.completed for state in seen) == [0, 0, 5, 9]
    results = [result.line_index async for result in client.batches.results(batch.id)]
    assert sorted(results) == list(range(9))


async def test_file_goes_up_as_it_is(client, simulator, tmp_path, photo):
    data = base64.b64encode(photo.read_bytes()).decode()
    path = write(tmp_path / "requests.jsonl", {"skill": "caption", "image": data, "id": "é"})
    for given in (path, str(path)):
        batch = await finished(client, given, part_bytes=1000)
        assert (await collect(client.batches.results(batch)))[0].id == "é"
        parts = [each for each in simulator.requests if each.method == "PUT"]
        parts.sort(key=lambda part: int(part.query["partNumber"]))
        assert b"".join(part.body for part in parts) == path.read_bytes()
        assert {len(part.body) for part in parts[:-1]} == {1000}
        simulator.requests.clear()


async def test_line_that_fails_is_a_result_like_any_other(client, tmp_path, photo):
    data = base64.b64encode(photo.read_bytes()).decode()
    path = write(
        tmp_path / "requests.jsonl",
        {"skill": "caption", "image": data},
        {"skill": "caption", "image": "no picture", "id": "bad"},
        {"skill": "dance", "image": data},
    )
    batch = await finished(client, path)
    results = await collect(client.batches.results(batch))
    assert (batch.status, batch.progress.failed) == ("completed", 2)
    assert [results[index].ok for index in range(3)] == [True, False, False]
    assert results[1].id == "bad"
    assert results[1].error.code == "image_decode_failed"
    assert results[1].error.message
    assert results[1].result is None
    assert results[2].error.code == "unknown_skill"


async def test_batch_that_failed_is_a_value_until_its_results_are_asked_for(client, photo):
    batch = await finished(client, [BatchRequest.caption(photo)], model="no-such-model")
    assert (batch.status, batch.error.code, batch.done) == ("failed", "invalid_model", True)
    with pytest.raises(md.APIStatusError, match="no-such-model") as caught:
        await collect(client.batches.results(batch))
    assert caught.value.code == "invalid_model"


async def test_results_of_a_batch_that_goes_on_are_refused(client, photo):
    batch = await client.batches.create([BatchRequest.caption(photo)])
    with pytest.raises(md.RequestError, match=r"wait\(\)"):
        await collect(client.batches.results(batch))


async def test_model_is_that_of_the_call_or_else_the_client(client, simulator, photo):
    requests = [BatchRequest.caption(photo)]
    of_a_model = client.with_options(model="of-the-client")
    await client.batches.create(requests)
    await of_a_model.batches.create(requests)
    await of_a_model.batches.create(requests, model="of-the-call")
    bodies = [each.body for each in simulator.requests if each.query["action"] == "mpu-complete"]
    expected = ["moondream3-preview", "of-the-client", "of-the-call"]
    assert [body["model"] for body in bodies] == expected


async def test_pictures_too_large_for_a_line_are_made_smaller(client, simulator, monkeypatch):
    assert protocol.MAX_IMAGE_BYTES * 4 / 3 < protocol.MAX_LINE_BYTES - 100_000
    monkeypatch.setattr("moondream_async.batch.uploads.MAX_IMAGE_BYTES", 100_000)
    noise = Image.effect_noise((400, 400), 100)
    batch = await finished(client, [BatchRequest.query(images=[noise] * 2, question="Same?")])
    assert (await collect(client.batches.results(batch)))[0].ok
    sent = sum(len(each.body) for each in simulator.requests if each.method == "PUT")
    assert 50_000 < sent <= 100_000 * 4 / 3 + 1000


async def test_list_goes_through_all_pages_newest_first(client, simulator, photo):
    ids = [(await client.batches.create([BatchRequest.caption(photo)])).id for _ in range(5)]
    simulator.requests.clear()
    assert [batch.id async for batch in client.batches.list(limit=2)] == ids[::-1]
    assert len(simulator.requests) == 3


async def test_id_cannot_leave_its_place_in_the_path(client, simulator):
    with pytest.raises(md.NotFoundError):
        await client.batches.get("../caption?x=1#y")
    assert simulator.requests[0].params["id"] == "../caption?x=1#y"


# -- parts ----------------------------------------------------------------------------


class Uploads:
    """A server that takes uploads, notes how they come, and forgets their bytes."""

    def __init__(self, *, lose_completion=False):
        self.asked_for, self.completed, self.parts, self.kinds = [], [], {}, set()
        self.server = RawServer(self._play)
        self._lose_completion = lose_completion

    @contextlib.asynccontextmanager
    async def asked(self):
        async with self.server, client_of(self.server, max_retries=3) as client:
            yield client

    async def _play(self, peer):
        while True:
            method, target, headers = await peer.request_head()
            self.asked_for.append(target)
            query = parse_qs(urlsplit(target).query)
            size = int(headers.get("content-length", 0))
            body = await self._read(peer, size, keep="mpu-complete" in target)
            if method == "PUT":
                number = int(query["partNumber"][0])
                self.parts[number] = size
                self.kinds.add(headers["content-type"])
                await peer.send(whole({"partNumber": number, "etag": f'"e-{number}\\"'}))
            elif "mpu-create" in target:
                self.parts.clear()
                await peer.send(whole({"fileId": "f/1", "uploadId": "u&1", "key": "k"}))
            elif method == "GET":
                assert target == "/v1/batch/f%2F1"
                await peer.send(whole({"id": "f/1", "status": "processing"}))
            elif self._lose_completion and self.completed:
                await peer.send(whole({"error": "no such upload"}, status="404 Not Found"))
            else:
                self.completed.append((target, body))
                if self._lose_completion:
                    return peer.reset()
                size = sum(self.parts.values())
                await peer.send(whole({"id": "f/1", "status": "chunking", "size": size}))

    async def _read(self, peer, left, *, keep):
        kept = b""
        while left:
            data = await peer._reader.read(min(left, 1 << 20))
            if not data:
                raise GoneError
            left -= len(data)
            kept += data * keep
        return kept


@pytest.mark.parametrize(
    "fault", ["status=503,retry_after=0", "status=429,retry_after=0", "hang_up=reset"]
)
async def test_part_that_fails_twice_is_sent_again(client, simulator, photo, fault):
    simulator.faults.append(f"{fault},times=2,path=/batch/")
    batch = await finished(client, [BatchRequest.caption(photo)])
    assert batch.status == "completed"
    assert actions(simulator)[:5] == ["mpu-create", *["mpu-uploadpart"] * 3, "mpu-complete"]
    assert len({each.body for each in simulator.requests[1:4]}) == 1


async def test_part_that_keeps_failing_aborts_the_upload(simulator, photo):
    simulator.faults.append("status=500,retry_after=0,times=3,path=/batch/")
    async with md.MoondreamClient(KEY, endpoint=simulator.endpoint, max_retries=2) as client:
        with pytest.raises(md.ServerError):
            await client.batches.create([BatchRequest.caption(photo)])
    assert actions(simulator) == ["mpu-create", *["mpu-uploadpart"] * 3, "mpu-abort"]
    assert simulator.requests[-1].status == 200


async def test_parts_are_completed_in_their_order_with_their_etags_verbatim(photo):
    uploads = Uploads()
    async with uploads.asked() as client:
        batch = await client.batches.create([BatchRequest.caption(photo)], part_bytes=2000)
    [(target, body)] = uploads.completed
    assert batch.id == "f/1"
    assert len(uploads.parts) > 3
    assert json.loads(body)["parts"] == [
        {"partNumber": number, "etag": f'"e-{number}\\"'} for number in sorted(uploads.parts)
    ]
    assert uploads.kinds == {"application/octet-stream"}
    assert "/batch/f%2F1?" in target
    assert "uploadId=u%261" in target


async def test_progress_ends_at_the_size_of_the_file(client, photo):
    told = []
    requests = [BatchRequest.caption(photo)] * 3
    batch = await client.batches.create(
        requests, part_bytes=5000, on_progress=lambda *numbers: told.append(numbers)
    )
    assert told[-1] == (batch.size, batch.size)
    assert [sent for sent, _ in told] == sorted({sent for sent, _ in told})


async def test_what_on_progress_raises_ends_the_upload(client, simulator, photo):
    def stop(_sent, _total):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        await client.batches.create([BatchRequest.caption(photo)], on_progress=stop)
    assert actions(simulator)[-1] == "mpu-abort"


async def test_answer_to_the_completion_that_was_lost_is_asked_for(photo):
    """The server has begun, but the connection breaks before it says so."""
    uploads = Uploads(lose_completion=True)
    async with uploads.asked() as client:
        batch = await client.batches.create([BatchRequest.caption(photo)])
    assert (batch.id, batch.status) == ("f/1", "processing")
    assert not any("mpu-abort" in target for target in uploads.asked_for)


async def test_file_that_becomes_shorter_meanwhile_aborts_the_upload(client, tmp_path):
    path = tmp_path / "requests.jsonl"
    line = json.dumps(LINE | {"image": "A" * 2_000_000}) + "\n"
    path.write_text(line * 3)

    def shorten(_sent, _total):
        with path.open("r+b") as file:
            file.truncate(1_000_000)

    with pytest.raises(md.RequestError, match="shorter"):
        await client.batches.create(path, part_bytes=1_000_000, on_progress=shorten)


# -- uploads that are broken off ------------------------------------------------------

STALL = "slow_start=3600,path=/batch/"  # the first part is received, and never answered


async def until_a_part_is_up(simulator):
    await simulator.wait_until(lambda: "mpu-uploadpart" in actions(simulator))


def assert_aborted(simulator):
    assert actions(simulator)[-1] == "mpu-abort"
    assert simulator.requests[-1].status == 200
    assert simulator.requests[-1].headers["X-Moondream-Auth"] == KEY


@pytest.mark.parametrize("leave", ["task", "scope", "client"])
async def test_upload_that_is_left_is_aborted(simulator, client, photo, leave):
    simulator.faults.append(STALL)
    scope = anyio.CancelScope()

    async def upload():
        with scope:
            await client.batches.create([BatchRequest.caption(photo)])

    task = asyncio.create_task(upload())
    await until_a_part_is_up(simulator)
    if leave == "client":
        await client.aclose()
    else:
        (task if leave == "task" else scope).cancel()
    await asyncio.wait([task])
    assert task.cancelled() == (leave == "task")
    assert leave != "client" or isinstance(task.exception(), md.ClientClosedError)
    assert scope.cancelled_caught == (leave == "scope")
    assert_aborted(simulator)


async def test_abort_that_is_refused_hides_no_error(simulator, photo):
    simulator.faults.extend(["status=400,path=/batch/", "status=500,path=/batch/,times=always"])
    async with md.MoondreamClient(KEY, endpoint=simulator.endpoint, max_retries=0) as client:
        with pytest.raises(md.BadRequestError):
            await client.batches.create([BatchRequest.caption(photo)])
    assert "mpu-abort" in actions(simulator)


async def test_upload_of_an_interrupted_program_is_aborted(simulator, photo, interruptible):
    simulator.faults.append(STALL)
    command = ("moondream-async", "batch", "create", photo)
    environment = {"MOONDREAM_ENDPOINT": simulator.endpoint, "MOONDREAM_API_KEY": KEY}
    async with running(*command, **environment) as program:
        await until_a_part_is_up(simulator)
        program.interrupt()
        status, _, errors = await program.end()
    assert (status, "Traceback" in str(errors), "Warning" in str(errors)) == (130, False, False)
    assert_aborted(simulator)


# -- waiting --------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def batches_of(*states):
    """The batches of a server that answers with these states, the last one for ever."""
    states = [each if isinstance(each, bytes) else {"id": "b", **each} for each in states]
    async with replying(*states) as server, client_of(server) as client:
        yield client.batches, server


@pytest.mark.parametrize(
    "end",
    [
        pytest.param({"status": "expired", "completed_at": "2026-01-15T00:00:00Z"}, id="ended"),
        pytest.param({"status": "cancelled", "error": {"code": "cancelled"}}, id="error"),
        pytest.param({"status": "failed", "error": "a mere string"}, id="error as text"),
    ],
)
async def test_status_of_a_later_server_is_told_and_does_not_raise(end):
    async with batches_of({"status": "pondering"}, {"status": None}, end) as (batches, _):
        batch = await batches.wait("b", interval=0.001)
    assert batch.status == end["status"]
    assert batch.done


async def test_state_is_read_as_far_as_it_makes_sense():
    odd = {
        "status": 7,
        "progress": {"total": "many", "completed": 3, "new": 1},
        "usage": [],
        "outputs": {"index": 0},
        "created_at": "yesterday",
        "model": {"name": "x"},
    }
    async with batches_of(odd) as (batches, _):
        batch = await batches.get("b")
    assert (batch.id, batch.status, batch.done) == ("b", "unknown", False)
    assert batch.progress == md.BatchProgress(completed=3)
    assert (batch.usage, batch.outputs, batch.created_at, batch.model) == (None, [], None, None)
    assert batch.raw == {"id": "b", **odd}


async def test_wait_overlooks_a_server_that_is_away_for_a_while():
    away = whole({"error": "away"}, status="503 Service Unavailable")
    async with batches_of(
        away, away, {"status": "chunking"}, *[away] * 5, {"status": "completed"}
    ) as (batches, _):
        assert (await batches.wait("b", interval=0.001)).status == "completed"


async def test_wait_gives_up_on_a_server_that_stays_away():
    away = whole({"error": "away"}, status="503 Service Unavailable")
    async with batches_of(away) as (batches, server):
        with pytest.raises(md.ServerError, match="away"):
            await batches.wait("b", interval=0.001)
        assert len(server.requests) == 6


async def test_wait_ends_with_its_time():
    async with batches_of({"status": "processing"}) as (batches, _):
        with pytest.raises(md.APITimeoutError, match=r"within 0.05 seconds") as caught:
            await batches.wait("b", interval=0.001, timeout=0.05)
    assert caught.value.phase == "total"


async def test_wait_for_an_unknown_batch_raises_at_once(client):
    with pytest.raises(md.NotFoundError):
        await client.batches.wait("no-such-batch")


# -- results --------------------------------------------------------------------------


def output_line(index, **more):
    return json.dumps({"line_index": index, "status": "ok", "result": {"caption": "x"}} | more)


class Storage:
    """An object store on an origin of its own, with the API in front of it.

    `answers` are what it plays for each download, the last one for ever.
    """

    def __init__(self, *answers, play=None, **options):
        self.answers = list(answers)
        self.server = RawServer(play or self._play_storage, **options)
        self.api = RawServer(self._play_api)
        self.signature = 0

    async def _play_api(self, peer):
        while True:
            await peer.request()
            self.signature += 1
            url = f"{self.server.origin}/out%2F0.jsonl?sig=%7E{self.signature}+a%2Bb"
            outputs = [{"index": 0, "url": url}]
            await peer.send(whole({"id": "b", "status": "completed", "outputs": outputs}))

    async def _play_storage(self, peer):
        while True:
            await peer.request()
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            await peer.send(answer)
            if b"Content-Length: 1000000\r\n" in answer:
                return

    async def __aenter__(self):
        await self.server.__aenter__()
        await self.api.__aenter__()
        return self

    async def __aexit__(self, *exc_info):
        await self.api.__aexit__(*exc_info)
        await self.server.__aexit__(*exc_info)

    async def results(self, **options):
        async with md.MoondreamClient(KEY, endpoint=self.api.endpoint, **options) as client:
            return [result async for result in client.batches.results("b")]


def file(*lines):
    return whole("".join(f"{line}\n" for line in lines).encode(), kind="application/octet-stream")


def cut(*lines):
    """Answer with the beginning of a file that is longer."""
    data = "".join(lines).encode()
    return head("Content-Length: 1000000") + data


async def test_results_are_fetched_without_the_key_from_the_address_as_it_is():
    async with Storage(file(output_line(0))) as storage:
        results = await storage.results(headers={"X-Team": "birds"})
        assert [result.line_index for result in results] == [0]
        [request] = storage.server.requests
    assert request.target == "/out%2F0.jsonl?sig=%7E1+a%2Bb"
    assert KEY not in str(request.headers)
    assert not {"authorization", "x-moondream-auth", "x-team"} & set(request.headers)
    sent = storage.api.requests[0].headers
    assert (sent["x-moondream-auth"], sent["x-team"]) == (KEY, "birds")


async def test_redirect_of_results_is_followed_to_another_origin_without_the_key():
    async def play(peer):
        await peer.request()
        await peer.send(file(output_line(0)))

    async with RawServer(play, name="localhost") as other:
        redirect = head(
            f"Location: {other.origin}/moved?sig=a%2Bb",
            "Content-Length: 0",
            status="307 Temporary Redirect",
        )
        async with Storage(redirect) as storage:
            assert [result.line_index for result in await storage.results()] == [0]
        [request] = other.requests
    assert request.target == "/moved?sig=a%2Bb"
    assert not {"authorization", "x-moondream-auth"} & set(request.headers)
    assert KEY not in str(request.headers)


async def test_redirect_of_results_that_would_leave_tls_is_not_followed():
    authority = trustme.CA()
    serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(serving)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    elsewhere = head("Location: http://127.0.0.1:9/", "Content-Length: 0", status="302 Found")
    async with Storage(elsewhere, ssl_context=serving) as storage:
        with pytest.raises(md.APIStatusError, match="without TLS"):
            await storage.results(ssl_context=trusting)


async def test_results_are_read_as_they_arrive():
    sent = asyncio.Event()

    async def play(peer):
        await peer.request()
        lines = [f"{output_line(index)}\n".encode() for index in range(2)]
        await peer.send(head(f"Content-Length: {sum(map(len, lines))}"), lines[0])
        await sent.wait()
        await peer.send(lines[1])

    async with Storage(play=play) as storage, client_of(storage.api) as client:
        results = client.batches.results("b")
        assert (await anext(results)).line_index == 0
        sent.set()
        assert (await anext(results)).line_index == 1
        assert await anext(results, None) is None


SOME = [output_line(index) for index in range(3)]
NAMED = [json.dumps({"id": name, "result": {"caption": "x"}}) for name in "abc"]
EXPIRED = whole(b"<Error>AccessDenied</Error>", status="403 Forbidden", kind="application/xml")
BROKEN = {
    "twice": (
        [cut(SOME[0], "\n", SOME[1][:20]), cut(SOME[1], "\n", SOME[0], "\n"), file(*SOME)],
        SOME,
    ),
    "without line indices": ([cut(NAMED[0], "\n"), file(*NAMED)], NAMED),
    "in its last line": ([whole(SOME[0][:-10].encode()), whole(SOME[0].encode())], SOME[:1]),
    "address expired": ([EXPIRED, file(*SOME)], SOME),
}


@pytest.mark.parametrize(("answers", "lines"), BROKEN.values(), ids=BROKEN)
async def test_download_that_breaks_off_is_begun_again_and_gives_each_result_once(answers, lines):
    async with Storage(*answers) as storage:
        results = await storage.results()
    assert [result.raw for result in results] == [json.loads(line) for line in lines]
    assert "sig=%7E1" in storage.server.requests[0].target
    if answers[0] is EXPIRED:
        assert "sig=%7E2" in storage.server.requests[1].target


LONG = "x" * (protocol.MAX_RESULT_BYTES + 1)
FAILING = {
    "always broken off": (cut(SOME[0], "\n"), md.APIConnectionError, "lost", 3),
    "always refused": (EXPIRED, md.PermissionDeniedError, "AccessDenied", 2),
    "too long a line": (file(SOME[0], LONG), md.APIConnectionError, "limit of 16777216 bytes", 1),
}


@pytest.mark.parametrize(("answer", "kind", "message", "requests"), FAILING.values(), ids=FAILING)
async def test_download_that_keeps_failing_is_an_error(answer, kind, message, requests):
    async with Storage(answer) as storage:
        with pytest.raises(kind, match=message):
            await storage.results(max_retries=2)
        assert len(storage.server.requests) == requests


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({}, "no results"),
        *[
            ({"outputs": [{"index": 0, "url": url}]}, "no valid address")
            for url in ("", "ftp://host/x", "file:///etc/passwd", "http://a/b c", "//x")
        ],
    ],
    ids=str,
)
async def test_completed_batch_that_says_no_place_of_its_results_is_an_error(outputs, message):
    async with batches_of({"status": "completed", **outputs}) as (batches, _):
        with pytest.raises(md.ServerError, match=message):
            await collect(batches.results("b"))


async def test_line_that_is_no_result_is_an_error():
    async with Storage(file(output_line(0), "not JSON", output_line(1))) as storage:
        results = await storage.results()
        assert [each.ok for each in results] == [True, False, True]


async def test_download_that_stalls_ends_with_the_idle_limit():
    async def play(peer):
        await peer.request()
        await peer.send(cut(output_line(0), "\n"))
        await peer.until_gone()

    async with Storage(play=play) as storage:
        with pytest.raises(md.APITimeoutError) as caught:
            await storage.results(timeout=md.Timeout(idle=0.05))
    assert caught.value.phase == "idle"


DOWNLOADS = {  # what is played, and whether each call has completed and has an error
    "whole": ([file(*SOME[:2])], [(True, False), (True, False)]),
    "left": ([cut(SOME[0], "\n", SOME[1])], [(True, False), (False, False)]),
    "failed": ([file(SOME[0], "no JSON")], [(True, False), (True, False)]),
    "expired": (
        [whole(b"", status="403 Forbidden"), file(SOME[0])],
        [(True, False), (False, True), (True, False), (True, False)],
    ),
}


@pytest.mark.parametrize("end", DOWNLOADS)
async def test_hooks_are_told_of_the_end_of_each_download(end):
    answers, expected = DOWNLOADS[end]
    ends = []
    async with (
        Storage(*answers) as storage,
        client_of(storage.api, hooks=md.Hooks(end=ends.append)) as client,
        contextlib.aclosing(client.batches.results("b")) as results,
    ):
        async for _ in results:
            if end == "left":
                break
    assert [(event.completed, event.error is not None) for event in ends] == expected


async def test_reader_that_breaks_off_frees_the_connection():
    gone = asyncio.Event()

    async def play(peer):
        await peer.request()
        await peer.send(cut(output_line(0), "\n"))
        await peer.until_gone()
        gone.set()

    async with Storage(play=play) as storage, client_of(storage.api) as client:
        async for _ in client.batches.results("b"):
            break
        await gone.wait()
        assert client.stats().open_streams == 0


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"result": {"caption": "x"}}, md.CaptionResult),
        ({"result": {"answer": "x", "reasoning": {"text": "y"}}}, md.QueryResult),
        ({"result": {"objects": []}}, md.DetectResult),
        ({"result": {"points": [{"x": 1, "y": 0}]}}, md.PointResult),
        ({"result": {"dance": 1}}, md.Result),
        ({"result": {"caption": 7}}, md.Result),
        ({"result": "x"}, md.Result),
        ({}, md.Result),
    ],
    ids=str,
)
def test_answer_is_typed_by_what_it_holds_and_never_lost(line, expected):
    result = protocol.read_batch_result(json.dumps(line).encode())
    assert type(result.result) is expected
    assert result.raw == line
    assert result.ok


@pytest.mark.parametrize(
    ("line", "failure"),
    [
        ({"status": "error", "error": {"code": "c", "message": "m"}}, ("c", "m")),
        ({"status": "error", "error": "m"}, (None, "m")),
        ({"status": "error"}, (None, "the server does not say why")),
        ({"error": {"message": "m"}}, (None, "m")),
    ],
    ids=str,
)
def test_error_of_a_line_is_a_value(line, failure):
    result = protocol.read_batch_result(json.dumps(line).encode())
    assert (result.error.code, result.error.message) == failure
    assert result.result is None
    assert not result.ok


def test_addresses_of_results_are_not_shown():
    batch = protocol.read_batch({"id": "b", "outputs": [{"index": 0, "url": "https://x/?sig=s"}]})
    assert batch.outputs[0].url == "https://x/?sig=s"
    assert "sig" not in repr(batch)


# -- size -----------------------------------------------------------------------------

MEASURED = """
import asyncio, re, sys
import moondream_async as md

def peak():
    # Not getrusage: what that tells of a new program includes the one it was started by.
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1]) * 1024

def requests(count, size):
    for number in range(count):
        image = md.EncodedImage(bytes([number]) * size, "image/jpeg", 8, 8)
        yield md.BatchRequest.caption(image, id=number)

async def main(endpoint, file):
    async with md.MoondreamClient(endpoint=endpoint) as client:
        await client.batches.create(requests(1, 1000))  # everything is loaded
        before = peak()
        for source in (file, requests(30, 1_500_000)):
            batch = await client.batches.create(source, part_bytes=12_500_000)
            print(batch.size, peak() - before, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="has no /proc to measure with")
async def test_60_megabytes_go_up_in_parts_and_cost_less_than_45_of_memory(tmp_path):
    uploads = Uploads()
    path = tmp_path / "requests.jsonl"
    path.write_text((json.dumps(LINE | {"image": "A" * 2_000_000}) + "\n") * 30)
    async with uploads.server as server:
        command = [sys.executable, "-c", MEASURED, server.endpoint, path]
        done = await anyio.run_process(command)
    for line in done.stdout.splitlines():
        size, growth = map(int, line.split())
        assert 60_000_000 < size < 61_000_000
        assert growth < 45_000_000
    assert size == sum(uploads.parts.values())
    assert set(uploads.parts) == set(range(1, 6))
    assert max(uploads.parts.values()) == 12_500_000


async def test_temporary_file_is_gone_afterwards(client, photo, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    await client.batches.create([BatchRequest.caption(photo)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not FULL_DISK.exists(), reason="has no /dev/full")
async def test_full_disk_is_an_error_of_ours(client, simulator, photo, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: FULL_DISK.open("r+b", buffering=0))
    with pytest.raises(md.MoondreamError, match="No space left"):
        await client.batches.create([BatchRequest.caption(photo)])
    assert simulator.requests == []
