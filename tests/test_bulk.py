"""Many pictures through one client: what comes out, how fast it goes, and what is left behind."""

import asyncio
import heapq
import io
import math
import re
import weakref

import anyio
import anyio.lowlevel
import pytest
from bulk_runs import picture
from own_clock import OwnClock
from tqdm.asyncio import tqdm

import moondream_async as md
from moondream_async.bulk import BulkItem, BulkResult, Control
from moondream_async.bulk.progress import BulkProgress


@pytest.fixture
async def impatient(simulator):
    """A client whose failed calls are over at once."""
    async with md.MoondreamClient(endpoint=simulator.endpoint, max_retries=0) as client:
        yield client


# -- results ------------------------------------------------------------------------


async def test_every_item_comes_out_once_with_its_own_answer(client):
    pictures = [picture(number) for number in range(60)]
    expected = [(await client.caption(each)).caption for each in pictures]
    results = [result async for result in client.bulk(pictures)]
    assert sorted(result.index for result in results) == list(range(60))
    assert all(result.item is pictures[result.index] for result in results)
    assert all(result.result.caption == expected[result.index] for result in results)
    assert all(result.ok and result.tries == 1 and result.seconds > 0 for result in results)


async def test_ordered_results_come_in_the_order_of_the_items(simulator, client):
    simulator.faults.append("slow_start=0.05,times=3")
    results = [each async for each in client.bulk(map(picture, range(30)), ordered=True)]
    assert [result.index for result in results] == list(range(30))


async def test_results_come_as_they_finish(simulator, client):
    simulator.faults.append("slow_start=30")
    async with client.bulk(map(picture, range(9))) as run:
        first = {(await anext(run)).index for _ in range(8)}
    assert len(first) == 8  # and not the ninth, which takes half a minute


async def test_caption_many_takes_a_length(client):
    (short,) = [each async for each in client.caption_many([picture()], length="short")]
    assert short.result.caption == (await client.caption(picture(), length="short")).caption


SKILLS = {
    "caption": ({"settings": {"max_tokens": 5}}, "caption"),
    "query": ({"question": "How wide is it?"}, "answer"),
    "detect": ({"object": "red"}, "objects"),
    "point": ({"object": "red"}, "points"),
    "segment": ({"object": "red"}, "path"),
}


async def test_every_skill_of_one_picture_is_there(client, photo):
    for skill, (arguments, field) in SKILLS.items():
        async with client.bulk([photo], skill, **arguments) as run:
            (result,) = [each async for each in run]
        assert result.error is None
        assert result.result[field]


async def test_an_item_may_bring_its_own_question_and_id(simulator, client, photo):
    items = [
        {"image": photo, "question": "What colour is it?", "id": 7, "of_mine": "kept"},
        BulkItem(image=photo, question="How bright is it?", id="b"),
        BulkItem(image=photo),
    ]
    run = client.bulk(items, "query", question="How wide is it?", ordered=True)
    results = [each async for each in run]
    assert [each.id for each in results] == [7, "b", None]
    asked = [request.body["question"] for request in simulator.requests]
    assert sorted(asked) == ["How bright is it?", "How wide is it?", "What colour is it?"]
    assert results[0].item["of_mine"] == "kept"


async def test_items_may_come_from_an_asynchronous_iterable(client):
    async def pictures():
        for number in range(5):
            await anyio.lowlevel.checkpoint()
            yield picture(number)

    assert len([each async for each in client.bulk(pictures())]) == 5


async def test_what_is_done_and_read_is_held_no_more_while_the_run_goes_on(client, photo):
    """Arrays and Pillow's images would fill the memory, with as many requests as may be open."""

    class Photo(str):
        __slots__ = ("__weakref__",)

    held = []

    async def photos():
        for _ in range(20):
            path = Photo(photo)
            held.append(weakref.ref(path))
            yield path
            del path
        await anyio.sleep_forever()

    async with client.bulk(photos()) as run:
        for _ in range(20):
            assert (await anext(run)).ok
        while run.in_flight:
            await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
        assert [ref for ref in held if ref() is not None] == []


async def test_a_run_closed_before_it_began_ends_for_those_who_wait(client, photo):
    run = client.bulk([photo])
    waiting = [asyncio.ensure_future(anext(run)) for _ in range(2)]
    await anyio.lowlevel.checkpoint()  # they wait now, and the task of the run is next
    await run.aclose()
    with anyio.fail_after(30):
        ended = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(each) for each in ended] == [StopAsyncIteration] * 2


async def test_no_items_are_no_results(simulator, client):
    assert [each async for each in client.bulk([])] == []
    assert simulator.requests == []


# -- errors -------------------------------------------------------------------------


async def test_a_bad_picture_is_a_result_with_its_error_and_without_a_request(
    simulator, client, photo, tmp_path
):
    run = client.bulk([photo, b"no picture", tmp_path / "missing.jpg", photo], ordered=True)
    results = [each async for each in run]
    assert [(type(each.error), each.tries) for each in results] == [
        (type(None), 1),
        *[(md.ImageError, 0)] * 2,
        (type(None), 1),
    ]
    assert "missing.jpg" in str(results[2].error)
    assert len(simulator.requests) == 2


async def test_a_refused_request_is_a_result_with_its_error(simulator, impatient, photo):
    simulator.faults.extend(["status=413", "status=500"])
    results = [each async for each in impatient.bulk([photo] * 5)]
    failed = {(type(each.error), each.tries) for each in results if each.error}
    assert failed == {(md.PayloadTooLargeError, 1), (md.ServerError, 1)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "question"),
        ({"questoin": "?"}, r"'questoin' \(did you mean 'question'\?\)"),
    ],
    ids=["missing", "misspelt"],
)
async def test_an_item_without_its_question_fails_alone(simulator, client, photo, wrong, message):
    items = [{"image": photo, **wrong}, {"image": photo, "question": "How wide is it?"}]
    async with client.bulk(items, "query", ordered=True) as run:
        failed, right = [each async for each in run]
    assert isinstance(failed.error, md.RequestError)
    assert re.search(message, str(failed.error))
    assert (failed.tries, right.ok, len(simulator.requests)) == (0, True, 1)


async def test_what_can_pass_is_tried_again_and_counted(simulator, client, photo):
    simulator.faults.extend(["status=500", "status=503"])
    (result,) = [each async for each in client.bulk([photo])]
    assert result.ok
    assert result.tries == 3
    session = client._caller.session
    assert (session.slots.taken, session.preparing.taken) == (0, 0)


async def test_only_the_statuses_of_an_overload_lower_the_limit(simulator, impatient, photo):
    limits = {}
    for status in (400, 500, 502, 503, 504, *range(520, 525)):
        simulator.faults.append(f"status={status}")
        run = impatient.bulk([photo])
        assert [each.ok async for each in run] == [False]
        limits[status] = run.limit
    assert limits == {status: 4 if status <= 500 else 2 for status in limits}


@pytest.mark.slow
async def test_refusals_fail_nothing_while_others_are_let_in(simulator, client):
    simulator.faults.extend(["status=429,times=3"])
    async with client.bulk(map(picture, range(12)), max_retries=1) as run:
        results = [each async for each in run]
    assert all(each.ok for each in results)


@pytest.mark.slow
async def test_retry_after_holds_up_all_of_the_run(simulator, client):
    simulator.faults.append("status=429,retry_after=0.3")
    results = [each async for each in client.bulk(map(picture, range(12)), concurrency=1)]
    assert all(each.ok for each in results)
    first = simulator.requests[0]
    assert all(each.ended_at - first.ended_at >= 0.28 for each in simulator.requests[1:])


# -- bounds -------------------------------------------------------------------------


class Source:
    """A source without an end, which counts what was taken from it."""

    def __init__(self):
        self.taken = 0

    def __iter__(self):
        while True:
            self.taken += 1
            yield picture()


async def test_nothing_is_taken_ahead_of_a_server_that_is_busy(simulator, client):
    simulator.faults.append("slow_start=30,times=always")
    source = Source()
    async with client.bulk(source, concurrency=3) as run, anyio.create_task_group() as group:
        group.start_soon(anext, run)
        await simulator.wait_until(lambda: len(simulator.requests) == 3)
        await anyio.wait_all_tasks_blocked()
        assert source.taken == 6
        assert len(simulator.requests) == 3
        group.cancel_scope.cancel()


async def test_nothing_is_taken_ahead_of_a_reader_that_is_busy(client):
    source = Source()
    async with client.bulk(source, concurrency=3) as run:
        for taken in range(1, 20):
            await anext(run)
            while run.in_flight:  # nobody reads meanwhile
                await anyio.sleep(0.001)
            assert source.taken <= taken + 6


@pytest.mark.parametrize(("connections", "concurrency"), [(5, None), (100, 5)])
async def test_no_more_are_open_than_was_said(simulator, connections, concurrency):
    most = 0

    def look(_event):
        nonlocal most
        most = max(most, simulator.connections.open)

    hooks = md.Hooks(end=look)
    async with md.MoondreamClient(
        endpoint=simulator.endpoint, max_connections=connections, hooks=hooks
    ) as client:
        # What can't be read was not under way, and its end makes no room.
        items = [b"no picture" if number % 3 == 0 else picture(number) for number in range(200)]
        results = [each async for each in client.bulk(items, concurrency=concurrency)]
    assert len(results) == 200
    assert 1 < most <= 5


async def test_a_run_that_never_asks_for_all_it_may_keeps_its_limit(client):
    read = anyio.Semaphore(1)

    async def one_by_one():
        for number in range(40):
            await read.acquire()
            yield picture(number)

    run = client.bulk(one_by_one())
    limit = run.limit
    async for _ in run:
        read.release()
    assert run.limit == limit


# -- its end ------------------------------------------------------------------------


async def test_stop_takes_no_more_and_finishes_what_is_under_way(client):
    source = Source()
    async with client.bulk(source) as run:
        seen = [await anext(run)]
        run.stop()
        taken = source.taken
        seen += [each async for each in run]
    assert source.taken == taken == len(seen)
    assert all(each.ok for each in seen)


# -- how much a server takes: arithmetic, with a clock of its own ---------------------


def test_the_limit_grows_only_where_all_places_are_taken():
    control = Control(40)
    for answer in range(400):
        control.succeeded(answer / 100, 0.5, full=False)
    assert control.limit == 4


def test_the_limit_falls_by_half_once_for_all_that_was_sent_before():
    control = Control(64)
    for _ in range(60):
        control.succeeded(0, 0.5, full=True)
    assert control.limit == 64
    for _ in range(10):
        control.overloaded(1.0, sent_at=0.5)
    assert control.limit == 32
    control.overloaded(2.0, sent_at=1.0)
    assert control.limit == 16
    for moment in range(3, 30):
        control.overloaded(moment, sent_at=moment)
    assert control.limit == 1


def test_after_a_fall_the_limit_grows_by_one_a_round():
    control = Control(64)
    for _ in range(28):
        control.succeeded(0, 0.5, full=True)
    control.overloaded(1.0, sent_at=0.5)
    assert control.limit == 16
    for _ in range(17):
        control.succeeded(2, 0.5, full=True)
    assert control.limit == 17


def test_the_limit_falls_when_answers_take_longer_and_recovers():
    control = Control(64)
    for _ in range(60):
        control.succeeded(0, 0.05, full=True)
    limits = []
    for _ in range(300):
        control.succeeded(1, 0.5, full=True)
        limits.append(control.limit)
    assert 51 in limits  # a fall by a fifth
    slow = control.limit
    assert 4 <= slow < 40
    for _ in range(3000):
        control.succeeded(2, 0.05, full=True)
    assert control.limit > slow


def test_a_good_minute_is_forgotten():
    """A server that will never again be as fast as it was is not held to that for ever."""
    control = Control(64)
    for _ in range(60):
        control.succeeded(0, 0.1, full=True)
    for _ in range(40 * 64):
        control.succeeded(1, 0.35, full=True)
    assert control.limit == 64


def test_one_slow_answer_among_eight_says_nothing():
    control = Control(64)
    for _ in range(20):
        for seconds in [*[0.5] * 7, 4.0]:
            control.succeeded(0, seconds, full=True)
    assert control.limit == 64


@pytest.mark.parametrize(("accepted", "rate"), [([], 1.0), ([0.0, 0.8, 0.9], 8.0)], ids=str)
def test_the_first_rate_is_what_the_server_took_just_before_it_refused(accepted, rate):
    control = Control(10)
    for moment in accepted:
        control.took(moment)
    control.refused(1.0, sent_at=0.5)
    assert control.rate == rate
    assert control.delay(1.0) == 1 / rate


def test_the_rate_falls_more_with_each_refusal_in_a_row_but_for_what_was_sent_before():
    control = Control(10)
    rates = []
    for moment in range(8):
        control.refused(moment, sent_at=moment)
        control.refused(moment, sent_at=moment - 0.5)
        rates.append(control.rate)
    falls = [0.96, 0.92, 0.84, 0.68, 0.5]
    assert rates[:6] == pytest.approx([math.prod(falls[:count]) for count in range(6)])
    assert rates[6:] == [0.2, 0.2]


def test_the_rate_grows_only_while_it_holds_requests_up():
    control = Control(10)
    control.refused(0.0, sent_at=0.0)
    control.started(1.1)  # a little late: it may be made up for
    assert (control.rate, control.delay(1.1)) == (2.0, pytest.approx(0.9))
    control.started(50.0)
    assert (control.rate, control.delay(50.0)) == (2.0, 0.375)


def test_the_rate_grows_the_faster_the_longer_the_server_has_refused_nothing():
    control, now = Control(10), 1.0
    control.refused(0.0, sent_at=0.0)
    control.refused(now, sent_at=now)
    while now < 30.0:
        now += control.delay(now)
        before = control.rate
        control.started(now)
        growth = min(0.006 * 2 ** max(0.0, now - 16.0), 1 / before)
        assert control.rate / before - 1 == pytest.approx(growth)


def test_retry_after_is_kept():
    control = Control(10)
    control.refused(5.0, sent_at=4.5, retry_after=7.0)
    assert control.delay(5.0) == 7.0
    assert control.delay(12.0) == 0.0


def throughput(*, allowed, burst, seconds, items):
    """Run items against a server that allows so many a second; return its accepted per second,
    counted over the second half of them, and how many were refused."""
    control, now, refilled, tokens = Control(100), 0.0, 0.0, burst
    under_way, again, waiting, done, refusals, half = [], 0, items, 0, 0, 0.0
    while done < items:
        while (waiting or again) and len(under_way) < control.limit and not control.delay(now):
            control.started(now)
            waiting, again = (waiting, again - 1) if again else (waiting - 1, again)
            tokens, refilled = min(burst, tokens + (now - refilled) * allowed), now
            let_in = tokens >= 1
            tokens -= let_in
            heapq.heappush(under_way, (now + (seconds if let_in else 0.001), let_in, now))
        soonest = [under_way[0][0]] if under_way else []
        if (waiting or again) and len(under_way) < control.limit:
            soonest.append(now + control.delay(now))
        now = min(soonest)
        while under_way and under_way[0][0] <= now:
            full = len(under_way) >= control.limit
            _, let_in, sent_at = heapq.heappop(under_way)
            if let_in:
                done += 1
                half = now if done == items // 2 else half
                control.succeeded(now, seconds, full=full)
            else:
                again, refusals = again + 1, refusals + 1
                control.refused(now, sent_at=sent_at)
    return (items - items // 2) / (now - half), refusals


@pytest.mark.parametrize(("allowed", "seconds"), [(2, 0.5), (10, 0.002), (100, 0.5)])
def test_the_rate_settles_at_what_the_server_allows(allowed, seconds):
    items = allowed * 120
    reached, refusals = throughput(allowed=allowed, burst=allowed, seconds=seconds, items=items)
    assert reached > 0.97 * allowed
    assert refusals < items / 3  # most of them while the limit is looked for


def test_rate_and_time_left_are_those_of_the_last_fifteen_seconds(monkeypatch):
    clock, progress = OwnClock(monkeypatch), BulkProgress(10)
    seen = []
    for seconds in (0, 2.5, 1.5, 14, 22):
        seen.append((progress.rate, progress.eta))
        clock.now += seconds
        progress.count(BulkResult(item=0, index=0))
    seen.append((progress.rate, progress.eta))
    assert seen == [(0, None), (0, None), (0.4, 20), (0.5, 14), (1 / 14, 84), (1 / 22, 110)]
    assert BulkProgress(None).eta is None


async def test_a_run_tells_how_far_it_is(client, photo):
    async with client.bulk([photo, b"no picture", b"none"], "caption") as run:
        bar = tqdm(run, total=run.progress.total, file=io.StringIO())
        results = [each async for each in bar]
        assert len(results) == bar.n == bar.total == 3
        progress = run.progress
        assert (progress.total, progress.done, progress.failed) == (3, 3, 2)
        assert progress.tokens > 0
        assert "3 of 3 done, 2 failed" in repr(run)
