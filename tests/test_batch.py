"""Batches, from requests to results: what a file may be, and what becomes of an upload."""

import asyncio
import base64
import contextlib
import datetime as dt
import json
import signal
import ssl
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import anyio
import pytest
import trustme
from canned import IMAGE, client_of, refuses, replying
from raw_server import GoneError, RawServer, head, whole

import moondream_async as md
from moondream_async.batch import wire as protocol
from moondream_async.batch.wire import FileChecker, Tally
from moondream_async.simulator import Simulator

KEY = "a-key-of-some-length"
FULL_DISK = Path("/dev/full")  # which refuses all that is written to it
LINE = {"skill": "caption", "image": "QUJD"}


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


async def finished(client, requests, **options):
    batch = await client.batches.create(requests, **options)
    return await client.batches.wait(batch, interval=0.001)


async def collect(results):
    return {result.line_index: result async for result in results}


# -- requests -------------------------------------------------------------------------


def line_of(request, *images):
    return json.loads(b"".join(request.line(images or [IMAGE])))


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        pytest.param(
            md.BatchRequest.caption(IMAGE, length="short", settings={"temperature": 0.5}, id="a"),
            {"id": "a", "skill": "caption", "length": "short", "settings": {"temperature": 0.5}},
            id="caption",
        ),
        pytest.param(
            md.BatchRequest.query(IMAGE, "How many?", reasoning=False, id=7),
            {"id": 7, "skill": "query", "question": "How many?", "reasoning": False},
            id="query",
        ),
        pytest.param(
            md.BatchRequest.detect(IMAGE, "red car"),
            {"skill": "detect", "object": "red car"},
            id="detect",
        ),
        pytest.param(
            md.BatchRequest.point(IMAGE, "door"), {"skill": "point", "object": "door"}, id="point"
        ),
    ],
)
def test_line_says_what_the_request_says_with_bare_base64(request_, expected):
    assert line_of(request_) == expected | {"image": base64.b64encode(IMAGE.data).decode()}


def test_query_about_several_pictures_sends_all_of_them():
    other = md.EncodedImage(bytes(range(256)) * 9000, "image/png", 8, 8)
    request = md.BatchRequest.query(images=[IMAGE, other], question="The same?")
    line = line_of(request, IMAGE, other)
    assert "image" not in line
    assert [base64.b64decode(each) for each in line["images"]] == [IMAGE.data, other.data]


@pytest.mark.parametrize(
    "images", [[IMAGE], [IMAGE, IMAGE], [md.EncodedImage(b"x", "", 1, 1)] * 3], ids=len
)
def test_length_of_a_line_is_known_before_it_is_written(images):
    line = md.BatchRequest.query(images=images, question="é?", id="ü").line(images)
    assert len(line) == len(b"".join(line))
    assert b"".join(line).endswith(b"}\n")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: md.BatchRequest.query(question="Why?"), "image", id="text only"),
        pytest.param(
            lambda: md.BatchRequest.query(IMAGE, "Why?", images=[IMAGE]), "one of", id="both"
        ),
        pytest.param(lambda: md.BatchRequest.query(question="Why?", images=[]), "image", id="none"),
        pytest.param(lambda: md.BatchRequest.query(IMAGE), "question", id="no question"),
        pytest.param(lambda: md.BatchRequest.caption(None), "image", id="no image"),
        pytest.param(lambda: md.BatchRequest.caption(IMAGE, length="tiny"), "length", id="length"),
        pytest.param(lambda: md.BatchRequest.caption(IMAGE, id=True), "id", id="bool id"),
        pytest.param(lambda: md.BatchRequest.caption(IMAGE, id=[1]), "id", id="list id"),
        pytest.param(
            lambda: md.BatchRequest.caption(IMAGE, settings={"top_p": 2}), "top_p", id="settings"
        ),
        pytest.param(lambda: md.BatchRequest.detect(IMAGE, " "), "object", id="blank object"),
    ],
)
def test_request_that_cannot_be_right_is_refused_when_it_is_made(make, message):
    with pytest.raises(md.RequestError, match=message):
        make()


def test_request_does_not_show_its_pictures():
    assert repr(md.BatchRequest.caption(b"\xff" * 1000)).count("xff") == 0


# -- what a file may be ---------------------------------------------------------------


def check(*data, every=None):
    checker = FileChecker()
    for each in data:
        for start in range(0, len(each), every or len(each) or 1):
            checker.feed(each[start : start + (every or len(each))])
    checker.close()


GOOD = b'{"skill": "caption", "image": "QUJD", "id": 1}'
TEXT_ONLY = b'{"skill": "query", "question": "Why?"'


@pytest.mark.parametrize("every", [None, 1, 7], ids=["whole", "byte by byte", "in sevens"])
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(GOOD, id="no line break at the end"),
        pytest.param(GOOD + b"\n", id="line break at the end"),
        pytest.param(GOOD + b"\r\n" + GOOD.replace(b"1", b"2"), id="CRLF"),
        pytest.param(
            '{"skill": "query", "image": "x", "question": "é\u2028"}'.encode(), id="UTF-8"
        ),
        pytest.param(b'{"skill": "query", "images": ["x", "y"], "question": "?"}', id="images"),
        pytest.param(b'{"skill": "dance", "id": {"a": [1]}, "new": null}', id="later server"),
        pytest.param(b'{"skill": "point", "id": null}\n{"skill": "point"}', id="no ids"),
    ],
)
def test_file_that_the_server_takes_passes(data, every):
    check(data, every=every)


@pytest.mark.parametrize("every", [None, 1, 7], ids=["whole", "byte by byte", "in sevens"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "at least one", id="empty"),
        pytest.param(GOOD + b"\n\n", "line 2 of the batch is blank", id="blank at the end"),
        pytest.param(b"\n" + GOOD, "line 1 of the batch is blank", id="blank at the start"),
        pytest.param(GOOD + b"\n \t\r\n", "line 2 of the batch is blank", id="only white space"),
        pytest.param(GOOD + b"\n{", "line 2 of the batch is no request", id="cut"),
        pytest.param(b"[]", "line 1 of the batch is no request", id="no object"),
        pytest.param(b'{"image": "x"}', "skill", id="no skill"),
        pytest.param(b'{"skill": "point", "x": "\xff"}', "line 1 .*utf-8", id="no UTF-8"),
        pytest.param(b"\xef\xbb\xbf" + GOOD, "line 1 .* no request", id="byte order mark"),
        pytest.param(TEXT_ONLY + b"}", "without a picture", id="text only"),
        pytest.param(TEXT_ONLY + b', "image": null}', "without a picture", id="image null"),
        pytest.param(TEXT_ONLY + b', "images": []}', "without a picture", id="images empty"),
        pytest.param(
            GOOD + b'\n{"skill": "point", "id": 2}\n' + GOOD,
            "line 3 of the batch has the id of line 1",
            id="id twice",
        ),
    ],
)
def test_file_that_the_server_would_refuse_is_refused_by_line(data, message, every):
    with pytest.raises(md.RequestError, match=message):
        check(data, every=every)


def test_id_is_the_same_however_it_is_written():
    with pytest.raises(md.RequestError, match="line 2 of the batch has the id of line 1"):
        check(b'{"skill": "point", "id": "a"}\n{"skill": "point", "id": "\\u0061"}')
    check(b'{"skill": "point", "id": "1"}\n{"skill": "point", "id": 1}')


def test_line_may_have_ten_megabytes():
    start, end = b'{"skill": "point", "image": "', b'"}'
    pad = b"A" * (protocol.MAX_LINE_BYTES - len(start + end))
    check(GOOD, b"\n", start, pad, end)
    with pytest.raises(md.RequestError, match=r"line 2 of the batch is .*10,000,000"):
        check(GOOD, b"\n", start, pad, b"A", end)


def test_line_without_end_is_refused_when_it_passes_the_limit():
    checker = FileChecker()
    for _ in range(10):
        checker.feed(b"A" * 1_000_000)
    with pytest.raises(md.RequestError, match="line 1 of the batch is too long"):
        checker.feed(b"A")


def test_file_may_have_a_hundred_thousand_lines():
    tally = Tally()
    for number in range(100_000):
        tally.add(100, number)
    with pytest.raises(md.RequestError, match=r"line 100001 of the batch .*100,000"):
        tally.add(100, None)


def test_file_may_have_two_gigabytes():
    tally = Tally()
    for _ in range(200):
        tally.add(10_000_000, None)
    with pytest.raises(md.RequestError, match=r"line 201 of the batch .*2,000,000,000"):
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
        pytest.param([], "at least one", id="none"),
        pytest.param(
            [md.BatchRequest.point(IMAGE, "a", id=1), md.BatchRequest.point(IMAGE, "b", id=1)],
            "line 2 of the batch has the id of line 1",
            id="id twice",
        ),
        pytest.param(
            [md.BatchRequest.point(IMAGE, "a"), "photo.jpg"],
            "line 2 of the batch must be a BatchRequest",
            id="no request",
        ),
        pytest.param(b"photo.jpg", "line 1 of the batch must be", id="bytes"),
        pytest.param(7, "iterable", id="nothing to iterate over"),
        pytest.param("no such file.jsonl", "can't be opened", id="no file"),
        pytest.param("nul\0.jsonl", "can't be opened", id="NUL"),
        pytest.param(".", "not a regular file", id="directory"),
    ],
)
async def test_what_cannot_be_uploaded_is_refused_before_anything_is_sent(
    client, simulator, requests, message
):
    with pytest.raises(md.RequestError, match=message):
        await client.batches.create(requests)
    assert simulator.requests == []


ONE = [md.BatchRequest.caption(IMAGE)]
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
    requests = [md.BatchRequest.caption(photo)] * 5 + [md.BatchRequest.caption("gone.jpg")]
    with pytest.raises(md.ImageError, match=r"line 6 of the batch: 'gone.jpg' does not exist"):
        await client.batches.create(requests)
    assert simulator.requests == []


async def test_more_parts_than_a_server_counts_are_refused(client, simulator):
    image = md.EncodedImage(bytes(9000), "image/jpeg", 8, 8)
    with pytest.raises(md.RequestError, match="10,000 parts"):
        await client.batches.create([md.BatchRequest.caption(image)], part_bytes=1)
    assert simulator.requests == []


# -- from requests to results ---------------------------------------------------------


async def test_batch_answers_as_the_calls_do(client, photo):
    batch = await finished(
        client,
        [
            md.BatchRequest.caption(photo, length="short", id="the caption"),
            md.BatchRequest.query(photo, "How bright?", reasoning=False, id=2),
            md.BatchRequest.detect(photo, "red"),
            md.BatchRequest.point(photo, "red"),
        ],
    )
    results = await collect(client.batches.results(batch))
    assert batch.status == "completed"
    assert batch.progress.completed == batch.progress.total == 4
    assert isinstance(batch.created_at, dt.datetime)
    assert batch.expires_at - batch.completed_at == dt.timedelta(days=7)
    assert [results[index].id for index in range(4)] == ["the caption", 2, None, None]
    assert results[0].result.caption == (await client.caption(photo, length="short")).caption
    assert results[1].result.answer == (await client.query(photo, "How bright?")).answer
    assert results[2].result.objects == (await client.detect(photo, "red")).objects
    assert results[3].result.points == (await client.point(photo, "red")).points
    assert all(result.ok and result.usage.input_tokens for result in results.values())
    assert results[0]["result"]["caption"] == results[0].raw["result"]["caption"]


async def test_requests_may_come_from_an_asynchronous_iterable(client, photo):
    async def requests():
        for number in range(23):
            await asyncio.sleep(0)
            yield md.BatchRequest.caption(photo, id=number)

    batch = await finished(client, requests())
    results = await collect(client.batches.results(batch.id))
    assert {index: result.id for index, result in results.items()} == dict(enumerate(range(23)))


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
    batch = await finished(client, [md.BatchRequest.caption(photo)], model="no-such-model")
    assert (batch.status, batch.error.code, batch.done) == ("failed", "invalid_model", True)
    with pytest.raises(md.APIStatusError, match="no-such-model") as caught:
        await collect(client.batches.results(batch))
    assert caught.value.code == "invalid_model"


async def test_results_of_a_batch_that_goes_on_are_refused(client, photo):
    batch = await client.batches.create([md.BatchRequest.caption(photo)])
    with pytest.raises(md.RequestError, match=r"wait\(\)"):
        await collect(client.batches.results(batch))


async def test_model_is_that_of_the_call_or_else_the_client(simulator, photo):
    requests = [md.BatchRequest.caption(photo)]
    async with md.MoondreamClient(endpoint=simulator.endpoint, model="of-the-client") as client:
        await client.batches.create(requests)
        await client.batches.create(requests, model="of-the-call")
    async with md.MoondreamClient(endpoint=simulator.endpoint) as client:
        await client.batches.create(requests)
    bodies = [each.body for each in simulator.requests if each.query["action"] == "mpu-complete"]
    assert [body["model"] for body in bodies] == [
        "of-the-client",
        "of-the-call",
        "moondream3-preview",
    ]


@pytest.mark.slow
async def test_picture_too_large_for_a_line_is_made_smaller(client, simulator):
    from PIL import Image

    noise = Image.effect_noise((2400, 2400), 100)
    batch = await finished(client, [md.BatchRequest.query(images=[noise] * 2, question="Same?")])
    result = (await collect(client.batches.results(batch)))[0]
    assert result.ok
    sent = sum(len(each.body) for each in simulator.requests if each.method == "PUT")
    assert 1_000_000 < sent <= protocol.MAX_LINE_BYTES


async def test_list_goes_through_all_pages_newest_first(client, simulator, photo):
    ids = [(await client.batches.create([md.BatchRequest.caption(photo)])).id for _ in range(5)]
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


@pytest.mark.parametrize("fault", ["status=503,retry_after=0", "status=429,retry_after=0"])
async def test_part_that_fails_twice_is_sent_again(client, simulator, photo, fault):
    simulator.faults.append(f"{fault},times=2,path=/batch/")
    batch = await finished(client, [md.BatchRequest.caption(photo)])
    assert batch.status == "completed"
    assert actions(simulator)[:5] == ["mpu-create", *["mpu-uploadpart"] * 3, "mpu-complete"]
    assert len({each.body for each in simulator.requests[1:4]}) == 1


async def test_part_whose_connection_breaks_twice_is_sent_again(simulator, photo):
    simulator.faults.append("hang_up=reset,times=2,path=/batch/")
    async with md.MoondreamClient(endpoint=simulator.endpoint) as client:
        assert (await finished(client, [md.BatchRequest.caption(photo)])).status == "completed"
    assert actions(simulator).count("mpu-uploadpart") == 3


async def test_part_that_keeps_failing_aborts_the_upload(simulator, photo):
    simulator.faults.append("status=500,retry_after=0,times=3,path=/batch/")
    async with md.MoondreamClient(endpoint=simulator.endpoint, max_retries=2) as client:
        with pytest.raises(md.ServerError):
            await client.batches.create([md.BatchRequest.caption(photo)])
    assert actions(simulator) == ["mpu-create", *["mpu-uploadpart"] * 3, "mpu-abort"]
    assert simulator.requests[-1].status == 200


async def test_parts_are_completed_in_their_order_with_their_etags_verbatim(photo):
    uploads = Uploads()
    async with uploads.asked() as client:
        batch = await client.batches.create([md.BatchRequest.caption(photo)], part_bytes=2000)
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
    requests = [md.BatchRequest.caption(photo)] * 3
    batch = await client.batches.create(
        requests, part_bytes=5000, on_progress=lambda *numbers: told.append(numbers)
    )
    assert told[-1] == (batch.size, batch.size)
    assert [sent for sent, _ in told] == sorted({sent for sent, _ in told})


async def test_what_on_progress_raises_ends_the_upload(client, simulator, photo):
    def stop(_sent, _total):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        await client.batches.create([md.BatchRequest.caption(photo)], on_progress=stop)
    assert actions(simulator)[-1] == "mpu-abort"


async def test_answer_to_the_completion_that_was_lost_is_asked_for(photo):
    """The server has begun, but the connection breaks before it says so."""
    uploads = Uploads(lose_completion=True)
    async with uploads.asked() as client:
        batch = await client.batches.create([md.BatchRequest.caption(photo)])
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
            await client.batches.create([md.BatchRequest.caption(photo)])

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
    async with md.MoondreamClient(endpoint=simulator.endpoint, max_retries=0) as client:
        with pytest.raises(md.BadRequestError):
            await client.batches.create([md.BatchRequest.caption(photo)])
    assert "mpu-abort" in actions(simulator)


INTERRUPTED = """
import asyncio, sys
import moondream_async as md

async def main():
    async with md.MoondreamClient(sys.argv[1], endpoint=sys.argv[2]) as client:
        await client.batches.create([md.BatchRequest.caption(sys.argv[3])])

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT can't be sent to one process there")
async def test_upload_of_an_interrupted_program_is_aborted(simulator, photo, interruptible):
    simulator.faults.append(STALL)
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-c", INTERRUPTED, KEY, simulator.endpoint, photo, stderr=-1
    )
    await until_a_part_is_up(simulator)
    program.send_signal(signal.SIGINT)
    _, errors = await program.communicate()
    assert b"KeyboardInterrupt" in errors
    assert b"Warning" not in errors
    assert_aborted(simulator)


# -- waiting --------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def batches_of(*states):
    """The batches of a server that answers with these states, the last one for ever."""
    states = [each if isinstance(each, bytes) else {"id": "b", **each} for each in states]
    async with replying(*states) as server, client_of(server) as client:
        yield client.batches, server


async def test_wait_tells_each_state_it_sees():
    states = [{"status": "chunking"}, {"status": "processing"}, {"status": "completed"}]
    seen = []
    async with batches_of(*states) as (batches, _):
        batch = await batches.wait("b", interval=0.001, on_poll=seen.append)
    assert [each.status for each in seen] == ["chunking", "processing", "completed"]
    assert seen[-1] == batch


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


async def test_download_that_breaks_off_is_begun_again_and_gives_each_result_once():
    lines = [output_line(index) for index in range(3)]
    async with Storage(
        cut(f"{lines[0]}\n", lines[1][:20]), cut(f"{lines[1]}\n{lines[0]}\n"), file(*lines)
    ) as storage:
        results = await storage.results()
    assert [result.line_index for result in results] == [0, 1, 2]


async def test_download_that_keeps_breaking_off_is_an_error():
    async with Storage(cut(output_line(0), "\n")) as storage:
        with pytest.raises(md.APIConnectionError, match="lost"):
            await storage.results(max_retries=2)
        assert len(storage.server.requests) == 3


async def test_results_without_a_line_index_come_once_too():
    lines = [json.dumps({"id": name, "result": {"caption": "x"}}) for name in "abc"]
    async with Storage(cut(f"{lines[0]}\n"), file(*lines)) as storage:
        assert [result.id for result in await storage.results()] == ["a", "b", "c"]


async def test_last_line_that_is_cut_is_fetched_again():
    short = whole(output_line(0)[:-10].encode())
    async with Storage(short, whole(output_line(0).encode())) as storage:
        assert [result.line_index for result in await storage.results()] == [0]


async def test_address_that_has_expired_is_asked_for_again():
    expired = whole(b"<Error>AccessDenied</Error>", status="403 Forbidden", kind="application/xml")
    async with Storage(expired, file(output_line(0))) as storage:
        assert [result.line_index for result in await storage.results()] == [0]
        assert ["sig=%7E1" in each.target for each in storage.server.requests] == [True, False]
        assert "sig=%7E2" in storage.server.requests[1].target


async def test_address_that_is_always_refused_is_an_error():
    refusal = whole(b"<Error>AccessDenied</Error>", status="403 Forbidden", kind="application/xml")
    async with Storage(refusal) as storage:
        with pytest.raises(md.PermissionDeniedError, match="AccessDenied"):
            await storage.results()
        assert len(storage.server.requests) == 2


@pytest.mark.parametrize("url", ["", "ftp://host/x", "file:///etc/passwd", "http://a/b c", "//x"])
async def test_address_that_is_none_is_refused(url):
    completed = {"status": "completed", "outputs": [{"index": 0, "url": url}]}
    async with batches_of(completed) as (batches, _):
        with pytest.raises(md.ServerError, match="no valid address"):
            await collect(batches.results("b"))


async def test_completed_batch_without_files_is_an_error_and_no_empty_result():
    async with batches_of({"status": "completed"}) as (batches, _):
        with pytest.raises(md.ServerError, match="no results"):
            await collect(batches.results("b"))


async def test_line_of_results_has_a_limit():
    async with Storage(file(output_line(0), "x" * (protocol.MAX_RESULT_BYTES + 1))) as storage:
        with pytest.raises(md.APIConnectionError, match="limit of 16777216 bytes"):
            await storage.results()
        assert len(storage.server.requests) == 1


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


@pytest.mark.parametrize("end", ["whole", "broken off", "failed", "expired"])
async def test_hooks_are_told_of_the_end_of_each_download(end):
    answers = {
        "whole": [file(output_line(0), output_line(1))],
        "broken off": [cut(output_line(0), "\n", output_line(1))],
        "failed": [file(output_line(0), "no JSON")],
        "expired": [whole(b"", status="403 Forbidden"), file(output_line(0))],
    }[end]
    ends = []
    async with Storage(*answers) as storage:
        hooks = md.Hooks(end=ends.append)
        async with md.MoondreamClient(endpoint=storage.api.endpoint, hooks=hooks) as client:
            with contextlib.suppress(md.ServerError):
                async with contextlib.aclosing(client.batches.results("b")) as results:
                    async for _ in results:
                        if end == "broken off":
                            break
    told = [(event.completed, event.error is not None) for event in ends]
    assert (
        told
        == {
            "whole": [(True, False), (True, False)],  # what the batch is, and its results
            "broken off": [(True, False), (False, False)],
            "failed": [(True, False), (True, False)],
            "expired": [(True, False), (False, True), (True, False), (True, False)],
        }[end]
    )


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
        pytest.param({"result": {"caption": "x"}}, md.CaptionResult, id="caption"),
        pytest.param(
            {"result": {"answer": "x", "reasoning": {"text": "y"}}}, md.QueryResult, id="q"
        ),
        pytest.param({"result": {"objects": []}}, md.DetectResult, id="detect"),
        pytest.param({"result": {"points": [{"x": 1, "y": 0}]}}, md.PointResult, id="point"),
        pytest.param({"result": {"dance": 1}}, md.Result, id="later skill"),
        pytest.param({"result": {"caption": 7}}, md.Result, id="odd caption"),
        pytest.param({"result": "x"}, md.Result, id="no object"),
        pytest.param({}, md.Result, id="nothing"),
    ],
)
def test_answer_is_typed_by_what_it_holds_and_never_lost(line, expected):
    result = protocol.read_batch_result(json.dumps(line).encode())
    assert type(result.result) is expected
    assert result.raw == line
    assert result.ok


@pytest.mark.parametrize(
    ("line", "failure"),
    [
        pytest.param(
            {"status": "error", "error": {"code": "c", "message": "m"}}, ("c", "m"), id="documented"
        ),
        pytest.param({"status": "error", "error": "m"}, (None, "m"), id="text"),
        pytest.param({"status": "error"}, (None, "the server does not say why"), id="bare"),
        pytest.param({"error": {"message": "m"}}, (None, "m"), id="without status"),
    ],
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

async def main(endpoint, source):
    async with md.MoondreamClient(endpoint=endpoint) as client:
        await client.batches.create(requests(1, 1000))  # everything is loaded
        before = peak()
        batch = await client.batches.create(source or requests(30, 6_000_000))
        print(batch.size, peak() - before)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="has no /proc to measure with")
@pytest.mark.parametrize("source", ["requests", "file"])
async def test_240_megabytes_go_up_in_parts_and_cost_less_than_120_of_memory(tmp_path, source):
    uploads = Uploads()
    path = tmp_path / "requests.jsonl"
    if source == "file":
        line = json.dumps(LINE | {"image": "A" * 8_000_000}) + "\n"
        with path.open("w") as file:
            file.writelines([line] * 30)
    given = str(path) if source == "file" else ""
    async with uploads.server as server:
        command = [sys.executable, "-c", MEASURED, server.endpoint, given]
        done = await anyio.run_process(command)
    path.unlink(missing_ok=True)
    size, growth = map(int, done.stdout.split())
    assert size == sum(uploads.parts.values()) > 240_000_000
    assert set(uploads.parts) == set(range(1, 6))
    assert max(uploads.parts.values()) == 50_000_000
    assert growth < 120_000_000


async def test_temporary_file_is_gone_afterwards(client, photo, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    await client.batches.create([md.BatchRequest.caption(photo)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not FULL_DISK.exists(), reason="has no /dev/full")
async def test_full_disk_is_an_error_of_ours(client, simulator, photo, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: FULL_DISK.open("r+b", buffering=0))
    with pytest.raises(md.MoondreamError, match="No space left"):
        await client.batches.create([md.BatchRequest.caption(photo)])
    assert simulator.requests == []


async def test_simulator_refuses_a_key_at_its_storage(photo):
    """Which is why all the tests above would fail, were it sent."""
    async with (
        Simulator(rate=0, api_key=KEY) as simulator,
        md.MoondreamClient(KEY, endpoint=simulator.endpoint) as client,
    ):
        batch = await finished(client, [md.BatchRequest.caption(photo)])
        assert len(await collect(client.batches.results(batch))) == 1
        storage = [each for each in simulator.requests if each.path.startswith("/storage")]
        assert [each.status for each in storage] == [200]
