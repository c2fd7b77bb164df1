"""Batches, from requests to results: what a file may be, and what becomes of an upload."""

import asyncio
import base64
import contextlib
import datetime as dt
import io
import json
import tracemalloc
from pathlib import Path

import anyio
import pytest
from canned import IMAGE, client_of, played, refuses, replying, rounds
from PIL import Image
from raw_server import whole

import moondream_async as md
from moondream_async import BatchRequest, EncodedImage
from moondream_async.batch import wire as protocol
from moondream_async.batch.wire import Tally, check_lines
from moondream_async.simulator import Simulator

KEY = "a-key-of-some-length"
FULL_DISK = Path("/dev/full")  # which refuses all that is written to it


@pytest.fixture
async def simulator():
    """One that refuses whoever has no key, and at its storage whoever shows one."""
    async with Simulator(api_key=KEY) as simulator:
        yield simulator


@pytest.fixture
async def client(simulator):
    async with md.MoondreamClient(KEY, endpoint=simulator.endpoint) as client:
        yield client


@pytest.fixture
def one(photo):
    return [BatchRequest.caption(photo)]


def actions(simulator):
    """What was asked of the server, in its words."""
    return [request.query.get("action", request.method) for request in simulator.requests]


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


async def finished(client, requests, *, on_poll=None, **options):
    batch = await client.batches.create(requests, **options)
    return await client.batches.wait(batch, interval=0.001, on_poll=on_poll)


def picture(colour, side=64):
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


async def collect(results):
    return {result.line_index: result async for result in results}


# -- requests -------------------------------------------------------------------------

OTHER = EncodedImage(bytes(range(256)) * 9000, "image/png", 8, 8)


def base64_of(image):
    return base64.b64encode(image.data).decode()


@pytest.mark.parametrize(
    ("request_", "images", "expected"),
    [
        (
            BatchRequest.caption(IMAGE, length="short", settings={"temperature": 0.5}, id="ü"),
            [IMAGE],
            {"id": "ü", "skill": "caption", "length": "short", "settings": {"temperature": 0.5}},
        ),
        (
            BatchRequest.query(IMAGE, "How many?", reasoning=False, id=7),
            [IMAGE],
            {"id": 7, "skill": "query", "question": "How many?", "reasoning": False},
        ),
        (BatchRequest.detect(IMAGE, "a car"), [IMAGE], {"skill": "detect", "object": "a car"}),
        (BatchRequest.point(IMAGE, "door"), [OTHER], {"skill": "point", "object": "door"}),
        (
            BatchRequest.query(images=[IMAGE, OTHER], question="é?"),
            [IMAGE, OTHER],
            {"skill": "query", "question": "é?", "images": [base64_of(IMAGE), base64_of(OTHER)]},
        ),
    ],
    ids=["caption", "query", "detect", "point", "two pictures"],
)
def test_line_says_what_the_request_says_with_bare_base64(request_, images, expected):
    line = request_.line(images)
    assert line.endswith(b"}\n")
    assert json.loads(line) == {
        **expected,
        **({} if "images" in expected else {"image": base64_of(images[0])}),
    }


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
    with refused(message):
        make()


# -- what a file may be ---------------------------------------------------------------


def check(*data):
    file, tally = io.BytesIO(b"".join(data)), Tally()
    while check_lines(file, tally, 1):
        pass


def refused(message):
    return pytest.raises(md.RequestError, match=message)


GOOD = b'{"skill": "caption", "image": "QUJD", "id": 1}'
TEXT_ONLY = b'{"skill": "query", "question": "Why?"'
FILES = {  # and how each is refused, if it is
    "no line break at the end": (GOOD, None),
    "CRLF": (GOOD + b"\r\n" + GOOD.replace(b"1", b"2") + b"\n", None),
    "UTF-8": ('{"skill": "query", "image": "x", "question": "é\u2028"}'.encode(), None),
    "images": (b'{"skill": "query", "images": ["x", "y"], "question": "?"}', None),
    "later server": (b'{"skill": "dance", "id": {"a": [1]}, "new": null}', None),
    "no ids": (b'{"skill": "point", "id": null}\n{"skill": "point"}', None),
    "ids of two types": (b'{"skill": "point", "id": "1"}\n{"skill": "point", "id": 1}', None),
    "empty": (b"", "at least one"),
    "blank": (b"\n" + GOOD, "line 1 of the batch is blank"),
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


@pytest.mark.parametrize(("data", "message"), FILES.values(), ids=FILES)
def test_file_passes_unless_the_server_would_refuse_it_by_line(data, message):
    with contextlib.nullcontext() if message is None else refused(message):
        check(data)


def test_line_may_have_ten_megabytes_and_is_read_no_further():
    start, end = b'{"skill": "point", "image": "', b'"}'
    pad = b"A" * (protocol.MAX_LINE_BYTES - len(start + end))
    check(GOOD, b"\n", start, pad, end)
    with refused(r"line 2 of the batch is .*10,000,000"):
        check(GOOD, b"\n", start, pad, b"A", end)
    file = io.BytesIO(b"A" * 20_000_000)
    with refused("line 1 of the batch is too long"):
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
    with refused(message):
        tally.add(1, None)


LARGE = "more than two gigabytes"
CALLS = {
    "nothing": ("create", [[]], "at least one"),
    "id twice": (
        "create",
        [[BatchRequest.point(IMAGE, "a", id=1), BatchRequest.point(IMAGE, "b", id=1)]],
        "line 2 of the batch has the id of line 1",
    ),
    "no request": (
        "create",
        [[BatchRequest.point(IMAGE, "a"), "photo.jpg"]],
        "line 2 of the batch must be a BatchRequest",
    ),
    "bytes": ("create", [b"photo.jpg"], "line 1 of the batch must be"),
    "number": ("create", [7], "iterable"),
    "no such file": ("create", ["no such file.jsonl"], "can't be opened"),
    "no such name": ("create", ["nul\0.jsonl"], "can't be opened"),
    "folder": ("create", ["."], "not a regular file"),
    "large file": ("create", [LARGE], "2,000,000,000"),
    "no picture": (
        "create",
        [[BatchRequest.caption(IMAGE)] * 5 + [BatchRequest.caption("gone.jpg")]],
        r"line 6 of the batch: 'gone.jpg' does not exist",
    ),
    "no part": ("create", [[BatchRequest.caption(IMAGE)], 0], "part_bytes"),
    "large part": ("create", [[BatchRequest.caption(IMAGE)], 100_000_000], "part_bytes"),
    "too many parts": ("create", [[BatchRequest.caption(OTHER)], 1], "10,000 parts"),
    "empty page": ("list", [0], "limit"),
    "large page": ("list", [101], "limit"),
    "no id": ("get", [""], "id"),
    "a number as id": ("wait", [7], "id"),
}
OPTION = {"create": ("requests", "part_bytes"), "list": ("limit",)}


@pytest.mark.parametrize(("method", "given", "message"), CALLS.values(), ids=CALLS)
async def test_what_cannot_be_right_is_refused_before_anything_is_sent(
    client, simulator, tmp_path, method, *, given, message
):
    if given == [LARGE]:
        given = [tmp_path / "large.jsonl"]
        with given[0].open("wb") as file:
            file.truncate(2_000_000_001)  # takes no room
    named = dict(zip(OPTION.get(method, ("batch",)), given, strict=False))
    await refuses(getattr(client.batches, method), named, message)
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


async def test_poll_that_is_cancelled_while_the_simulator_works_has_it_work_once(client, simulator):
    requests = [BatchRequest.caption(picture(colour, 500)) for colour in ("red", "blue", "white")]
    client = client.with_options(max_retries=0)
    batch = await client.batches.create(requests)
    await client.batches.get(batch)
    simulator.requests.clear()
    cancelled = asyncio.create_task(client.batches.get(batch))
    await simulator.wait_until(lambda: simulator.requests)
    await rounds(10)  # the simulator begins on the first lines, in a thread
    cancelled.cancel()
    states = await asyncio.gather(*(client.batches.get(batch) for _ in range(3)))
    assert max(state.progress.completed for state in states) == 3
    results = [result.line_index async for result in client.batches.results(batch.id)]
    assert sorted(results) == [0, 1, 2]


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
        assert {part.headers["Content-Type"] for part in parts} == {"application/octet-stream"}
        completion = simulator.requests[actions(simulator).index("mpu-complete")].body
        numbers = [part["partNumber"] for part in completion["parts"]]
        assert numbers == list(range(1, len(parts) + 1))
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
    assert (results[1].id, results[1].result) == ("bad", None)
    codes = [results[index].error.code for index in (1, 2)]
    assert codes == ["image_decode_failed", "unknown_skill"]
    assert results[1].error.message


async def test_batch_that_failed_is_a_value_until_its_results_are_asked_for(client, one):
    begun = await client.batches.create(one, model="no-such-model")
    with pytest.raises(md.RequestError, match=r"wait\(\)"):
        await collect(client.batches.results(begun))
    batch = await client.batches.wait(begun, interval=0.001)
    assert (batch.status, batch.error.code, batch.done) == ("failed", "invalid_model", True)
    with pytest.raises(md.APIStatusError, match="no-such-model") as caught:
        await collect(client.batches.results(batch))
    assert caught.value.code == "invalid_model"


async def test_model_is_that_of_the_call_or_else_the_client(client, simulator, one):
    of_a_model = client.with_options(model="of-the-client")
    await client.batches.create(one)
    await of_a_model.batches.create(one)
    await of_a_model.batches.create(one, model="of-the-call")
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


async def test_list_goes_through_all_pages_newest_first(client, simulator, one):
    ids = [(await client.batches.create(one)).id for _ in range(5)]
    simulator.requests.clear()
    assert [batch.id async for batch in client.batches.list(limit=2)] == ids[::-1]
    assert len(simulator.requests) == 3


async def test_half_a_surrogate_pair_is_refused_as_anything_else_that_is_wrong(client, photo):
    half = "\ud83d"
    for request in (BatchRequest.query(photo, half), BatchRequest.caption(photo, id=half)):
        with refused("can't be sent as JSON"):
            await client.batches.create([request])
    for kind in (client.batches, client.tuning):
        with pytest.raises(md.NotFoundError):
            await kind.get(half)
        with pytest.raises(md.APIStatusError):
            _ = [each async for each in kind.list(cursor=half)]


# -- uploads --------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["status=503,retry_after=0", "hang_up=reset"])
async def test_part_that_fails_twice_is_sent_again(client, simulator, one, fault):
    simulator.faults.append(f"{fault},times=2,path=/batch/")
    assert (await finished(client, one)).status == "completed"
    assert actions(simulator)[:5] == ["mpu-create", *["mpu-uploadpart"] * 3, "mpu-complete"]
    assert len({each.body for each in simulator.requests[1:4]}) == 1


async def test_ids_and_etags_of_a_server_are_sent_back_as_they_are():
    made = {"fileId": "../f?1", "uploadId": "u&1", "key": "k"}
    server = replying(made, {"etag": '"e-1\\"'}, {"id": "../f?1", "status": "chunking"})
    async with server, client_of(server) as client:
        batch = await client.batches.create([BatchRequest.caption(IMAGE)])
        await client.batches.get(batch)
    targets = [request.target for request in server.requests]
    place = "/v1/batch/..%2Ff%3F1"
    assert targets[1] == f"{place}?action=mpu-uploadpart&uploadId=u%261&partNumber=1"
    assert targets[2:] == [f"{place}?action=mpu-complete&uploadId=u%261", place]
    assert server.requests[2].json["parts"] == [{"partNumber": 1, "etag": '"e-1\\"'}]


async def test_answer_to_the_completion_that_was_lost_is_asked_for():
    """The server has begun, but the connection breaks before it says so."""
    begun = asyncio.Event()

    async def play(peer):
        while True:
            request = await peer.request()
            if "mpu-complete" not in request.target:
                said = {"fileId": "f", "uploadId": "u", "etag": "e", "id": "f", "status": "begun"}
                await peer.send(whole(said))
            elif begun.is_set():
                await peer.send(whole({"error": "no such upload"}, status="404 Not Found"))
            else:
                begun.set()
                return peer.reset()

    async with played(play, max_retries=3) as (server, client):
        batch = await client.batches.create([BatchRequest.caption(IMAGE)])
    assert (batch.id, batch.status) == ("f", "begun")
    assert [request.method for request in server.requests][-3:] == ["POST", "POST", "GET"]


async def test_progress_ends_at_the_size_of_the_file_which_is_then_gone(
    client, one, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    told = []
    batch = await client.batches.create(
        one * 3, part_bytes=5000, on_progress=lambda *numbers: told.append(numbers)
    )
    assert told[-1] == (batch.size, batch.size)
    assert [sent for sent, _ in told] == sorted({sent for sent, _ in told})
    assert list(tmp_path.iterdir()) == []


def assert_aborted(simulator):
    assert actions(simulator)[-1] == "mpu-abort"
    assert simulator.requests[-1].status == 200
    assert simulator.requests[-1].headers["X-Moondream-Auth"] == KEY


async def test_upload_that_fails_is_aborted(client, simulator, one, tmp_path):
    simulator.faults.append("status=500,retry_after=0,times=3,path=/batch/")
    with pytest.raises(md.ServerError):
        await client.with_options(max_retries=2).batches.create(one)
    assert actions(simulator)[1:-1] == ["mpu-uploadpart"] * 3
    assert_aborted(simulator)

    def stop(_sent, _total):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        await client.batches.create(one, on_progress=stop)
    assert_aborted(simulator)

    path = write(tmp_path / "requests.jsonl", *[{"skill": "caption", "image": "A" * 50_000}] * 3)

    def shorten(_sent, _total):
        with path.open("r+b") as file:
            file.truncate(25_000)

    with pytest.raises(md.RequestError, match="shorter"):
        await client.batches.create(path, part_bytes=25_000, on_progress=shorten)
    assert_aborted(simulator)


@pytest.mark.parametrize("leave", ["task", "scope", "client"])
async def test_upload_that_is_left_is_aborted(simulator, client, one, leave):
    simulator.faults.append("slow_start=3600,path=/batch/")  # the part comes, and is not answered
    scope = anyio.CancelScope()

    async def upload():
        with scope:
            await client.batches.create(one)

    task = asyncio.create_task(upload())
    await simulator.wait_until(lambda: "mpu-uploadpart" in actions(simulator))
    if leave == "client":
        await client.aclose()
    else:
        (task if leave == "task" else scope).cancel()
    await asyncio.wait([task])
    assert task.cancelled() == (leave == "task")
    assert leave != "client" or isinstance(task.exception(), md.ClientClosedError)
    assert scope.cancelled_caught == (leave == "scope")
    assert_aborted(simulator)


async def test_abort_that_is_refused_hides_no_error(client, simulator, one):
    simulator.faults.extend(["status=400,path=/batch/", "status=400,path=/batch/"])
    with pytest.raises(md.BadRequestError):
        await client.batches.create(one)
    assert actions(simulator)[-1] == "mpu-abort"


async def test_20_megabytes_go_up_in_parts_and_cost_less_than_15_of_memory(tmp_path):
    sizes = []

    async def play(peer):
        while True:
            _, target, headers = await peer.request_head()
            left = int(headers.get("content-length", 0))
            if "mpu-uploadpart" in target:
                sizes.append(left)
            while left:
                left -= len(await peer._reader.read(min(left, 1 << 20)))
            said = {"fileId": "f", "uploadId": "u", "etag": "e", "id": "f"}
            await peer.send(whole(said))

    path = write(tmp_path / "large.jsonl", *[{"skill": "caption", "image": "A" * 2_000_000}] * 10)
    made = (
        BatchRequest.caption(EncodedImage(bytes(1_500_000), "image/jpeg", 8, 8)) for _ in range(10)
    )
    async with played(play) as (_, client):
        for source in (path, made):
            sizes.clear()
            tracemalloc.start()
            try:
                await client.batches.create(source, part_bytes=4_000_000)
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert sorted(sizes)[1:] == [4_000_000] * 5
            assert 20_000_000 < sum(sizes) < 21_000_000
            assert peak < 15_000_000


@pytest.mark.skipif(not FULL_DISK.exists(), reason="has no /dev/full")
async def test_full_disk_is_an_error_of_ours(client, simulator, one, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: FULL_DISK.open("r+b", buffering=0))
    with pytest.raises(md.MoondreamError, match="No space left"):
        await client.batches.create(one)
    assert simulator.requests == []
