"""When requests go out: the rate limit, the slots, and the waits between retries.

The time is the test's own wherever it is asked for, so that it is known to the digit.
"""

import asyncio
import collections
import gc
import random
import threading
import time
from email.utils import formatdate
from itertools import pairwise

import pytest
from canned import IMAGE, client_of, played, rounds
from raw_server import (
    ANSWER,
    DONE,
    EVENTS,
    STREAM,
    STREAM_HEAD,
    TEXT,
    RawServer,
    answer_all,
    head,
    in_chunks,
    whole,
)

import moondream_async as md
from moondream_async._call.limits import RateLimiter, Semaphore
from moondream_async._call.retry import BUDGET, LONGEST_RETRY_AFTER, RETRY_COST, Budget, CallRetries

pytestmark = pytest.mark.own_time

TINY = 1e-6  # seconds: what is lost in adding up floats


# -- the pace -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
async def test_each_goes_as_soon_as_the_pace_allows_whoever_is_cancelled(clock, seed):
    # Times are in milliseconds: whole ones for what comes and goes, halves for cancelling,
    # so that nothing happens at the same moment.
    choose = random.Random(seed)
    interval = choose.randrange(1, 50)
    limiter = RateLimiter(1000 / interval)
    start = clock.now
    went = {}
    tasks = []

    async def go(number):
        await limiter.wait()
        went[number] = (clock.now - start) * 1000

    plan = []  # when each asks, and when it is cancelled
    at = 0
    for _ in range(100):
        at += choose.choice([0, 0, 1, 5, 20])
        plan.append((at, at + choose.randrange(300) + 0.5 if choose.random() < 0.5 else None))
    calls = [(asked, number, "ask") for number, (asked, _) in enumerate(plan)]
    calls += [(left, number, "cancel") for number, (_, left) in enumerate(plan) if left]
    for moment, number, what in sorted(calls):
        while (delay := start + moment / 1000 - clock.now) > TINY:
            await asyncio.sleep(delay)
        if what == "ask":
            tasks.append(asyncio.ensure_future(go(number)))
            await asyncio.sleep(0)
        else:
            tasks[number].cancel()
    await asyncio.wait(tasks)

    expected = {}
    free = 0
    for number, (asked, left) in enumerate(plan):
        at = max(asked, free)
        if left is None or left > at:
            expected[number] = at
            free = at + interval
    assert went == pytest.approx(expected, abs=TINY)


async def test_a_thousand_that_wait_have_one_timer(clock):
    def timers():
        return [each for each in asyncio.get_running_loop()._scheduled if not each.cancelled()]

    limiter = RateLimiter(2)
    await limiter.wait()
    tasks = [asyncio.ensure_future(limiter.wait()) for _ in range(1000)]
    await rounds()
    assert len(timers()) == 1
    before = clock.now
    for task in reversed(tasks[1:]):  # the last are the first to go, which is the hardest
        task.cancel()
    await rounds()
    assert len(timers()) == 1
    await tasks[0]
    assert clock.now - before == pytest.approx(0.5)
    assert not limiter._queue


async def test_who_is_cancelled_while_being_called_forward_makes_way(clock):
    limiter = RateLimiter(10)
    await limiter.wait()
    first, second, third = (asyncio.ensure_future(limiter.wait()) for _ in range(3))
    first.add_done_callback(lambda _: second.cancel())
    started = clock.now
    await third
    assert second.cancelled()
    assert clock.now - started == pytest.approx(0.2)


# -- more than one loop ---------------------------------------------------------------


@pytest.mark.parametrize("case", ["front", "middle", "collected"])
def test_waiter_whose_loop_is_closed_does_not_block_those_behind(case):
    """`test_loops.py` says so of a place in line for a connection."""
    limiter = RateLimiter(20)

    def begin():
        return asyncio.ensure_future(limiter.wait())

    async def begin_elsewhere():
        task = begin()
        task._log_destroy_pending = False  # that it is left behind is what is tested
        await rounds()
        if case != "collected":
            kept.append(task)

    kept = []

    async def after():
        await limiter.wait()
        here = [begin()] if case == "middle" else []
        await rounds()
        elsewhere = asyncio.new_event_loop()
        await asyncio.to_thread(elsewhere.run_until_complete, begin_elsewhere())
        here += [begin(), begin()]
        await rounds()
        elsewhere.close()
        if case == "collected":
            gc.collect()
        else:
            here.append(begin())
        await asyncio.gather(*here)
        assert not limiter._queue

    asyncio.run(after())


@pytest.mark.parametrize("closed_first", [False, True])
def test_place_given_to_a_loop_that_never_hears_of_it_is_free_again_and_only_once(closed_first):
    slots = Semaphore(1)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(slots.acquire())
    task = loop.create_task(slots.acquire())
    task._log_destroy_pending = False
    loop.run_until_complete(rounds())
    if closed_first:
        loop.close()
    slots.release()  # it is told so, but never runs again
    loop.close()
    assert slots.taken == (not closed_first)
    del task, loop
    gc.collect()
    assert (slots.taken, slots.waiting) == (0, 0)


class Freed(Semaphore):
    """Where none is free, the collector gives one back in the midst of the bookkeeping."""

    def try_acquire(self):
        with self._lock:
            if super().try_acquire():
                return True
            self.release()
            return False


async def test_place_that_the_collector_gives_back_while_one_is_taken_is_taken():
    slots = Freed(1)
    assert [await slots.acquire() for _ in range(3)] == [False] * 3  # nobody has to wait
    assert (slots.taken, slots.waiting) == (1, 0)


def in_threads(main):
    """Run it four times, with a number, each in a thread and a loop of its own."""
    threads = [threading.Thread(target=asyncio.run, args=(main(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


async def cancel_some(seed, times, begin):
    """Begin ten tasks, so often, and cancel half of them a moment later."""
    choose = random.Random(seed)
    for _ in range(times):
        tasks = [asyncio.ensure_future(begin()) for _ in range(10)]
        await rounds(choose.randrange(10))
        for task in choose.sample(tasks, 5):
            task.cancel()
        await asyncio.wait(tasks)


def test_threads_share_the_pace_in_the_order_of_asking():
    each, rate = 25, 200
    limiter = RateLimiter(rate)
    went = collections.defaultdict(list)

    async def go(name, number):
        await limiter.wait()
        went[name].append(number)

    async def main(name):
        await asyncio.gather(*(go(name, number) for number in range(each)))

    started = time.monotonic()
    in_threads(main)
    assert time.monotonic() - started > (4 * each - 1) / rate - TINY
    assert list(went.values()) == [list(range(each))] * 4


def test_threads_share_the_pace_whoever_is_cancelled():
    limiter = RateLimiter(1000)
    went = []

    async def go():
        await limiter.wait()
        went.append(1)

    in_threads(lambda seed: cancel_some(seed, 10, go))
    assert len(went) >= 4 * 10 * 5
    assert not limiter._queue


def test_threads_share_places_whoever_is_cancelled():
    slots = Semaphore(3)
    most = []

    async def use():
        await slots.acquire()
        try:
            most.append(slots.taken)
            await rounds(len(most) % 3)
        finally:
            slots.release()

    in_threads(lambda seed: cancel_some(seed, 40, use))
    assert max(most) == 3
    assert (slots.taken, slots.waiting) == (0, 0)


# -- the pace of a client --------------------------------------------------------------


async def test_no_window_of_time_has_more_requests_than_the_rate(clock):
    rate = 2
    arrivals = []
    choose = random.Random(7)

    async def play(peer):
        while True:
            request = await peer.request()
            arrivals.append(clock.now)
            if choose.random() < 0.2:
                await peer.send(head("Content-Length: 0", "Retry-After: 0", status="503 Busy"))
            else:
                await peer.send(STREAM if request.wants_stream else whole(ANSWER))

    async def call(client):
        if choose.random() < 0.5:
            async with client.caption(IMAGE, stream=True) as stream:
                await stream.text()
        else:
            await client.caption(IMAGE)

    async with played(play, rate_limit=rate, max_retries=10, max_connections=5) as (_, client):
        tasks = [asyncio.ensure_future(call(client)) for _ in range(40)]
        await asyncio.sleep(5 / rate)
        for task in choose.sample(tasks[10:], 15):
            task.cancel()
        await asyncio.wait(tasks)
        assert sum(task.cancelled() for task in tasks) == 15
        assert client.stats().retries > 2
    assert len(arrivals) >= 25
    assert min(b - a for a, b in pairwise(arrivals)) >= 1 / rate - TINY
    # Nor is any time lost: while somebody waits, they go at the rate exactly.
    assert arrivals[20] - arrivals[0] == pytest.approx(20 / rate, abs=TINY)


async def test_waiting_for_the_pace_is_not_waiting_for_a_place(clock):
    timeout = md.Timeout(pool=1)
    async with played(answer_all, rate_limit=1, timeout=timeout, max_connections=1) as (
        _server,
        client,
    ):
        started = clock.now
        await asyncio.gather(*(client.caption(IMAGE) for _ in range(20)))
        assert clock.now - started >= 19


# -- retries --------------------------------------------------------------------------


async def refuse(peer):
    while True:
        await peer.request()
        await peer.send(head("Content-Length: 0", status="503 Busy"))


class Watch:
    """Hooks that note the time of what happens."""

    def __init__(self, clock):
        self.delays = collections.defaultdict(list)  # by the number of the try that failed
        self.waits = collections.defaultdict(list)
        self.hooks = md.Hooks(request=self._request, retry=self._retry)
        self._clock = clock
        self._failed_at = None

    def _retry(self, event):
        self.delays[event.attempt].append(event.delay)
        self._failed_at = self._clock.now

    def _request(self, event):
        if event.attempt > 1:
            self.waits[event.attempt - 1].append(self._clock.now - self._failed_at)


async def test_waits_between_tries_are_anything_up_to_a_doubling_limit(clock):
    """`test_retry.py` says how they are spread."""
    watch = Watch(clock)
    async with played(refuse, hooks=watch.hooks, max_retries=7) as (_, client):
        for _ in range(3):
            with pytest.raises(md.ServerError):
                await client.caption(IMAGE)
    assert list(watch.delays) == [1, 2, 3, 4, 5, 6, 7]
    for attempt, limit in enumerate([0.5, 1, 2, 4, 8, 16, 30], start=1):
        delays = watch.delays[attempt]
        assert watch.waits[attempt] == pytest.approx(delays, abs=TINY)
        assert all(0 <= delay <= limit for delay in delays)
        assert len({*delays}) == 3


@pytest.mark.parametrize(
    ("header", "seconds", "stream"),
    [
        (lambda: "7", 7, False),
        (lambda: formatdate(time.time() + 86400, usegmt=True), LONGEST_RETRY_AFTER, True),
        (lambda: formatdate(0, usegmt=True), 0, False),
    ],
    ids=["seconds", "tomorrow", "the-past"],
)
async def test_server_that_says_when_is_asked_again_then_up_to_the_cap(
    clock, header, seconds, stream
):
    async def play(peer):
        await peer.request()
        retry_after = f"Retry-After: {header()}"
        await peer.send(head("Content-Length: 0", retry_after, status="429 Slow Down"))
        await answer_all(peer)

    watch = Watch(clock)
    async with played(play, hooks=watch.hooks, max_retries=1) as (server, client):
        answer = await client.caption(IMAGE, stream=stream)
        if stream:
            assert await answer.text() == TEXT
        assert len(server.requests) == 2
    assert watch.waits[1] == pytest.approx([seconds], abs=TINY)


async def test_retries_stop_while_all_calls_fail_and_come_back_with_those_that_succeed():
    well = False

    async def play(peer):
        while True:
            await peer.request()
            await peer.send(whole(ANSWER) if well else head("Content-Length: 0", status="503 No"))

    async with RawServer(play) as server, client_of(server, max_retries=1000) as client:

        async def retries_of_a_failure():
            before = client.stats().retries
            with pytest.raises(md.ServerError):
                await client.caption(IMAGE)
            return client.stats().retries - before

        assert await retries_of_a_failure() == BUDGET // RETRY_COST
        assert await retries_of_a_failure() == 0
        well = True
        for _ in range(3 * RETRY_COST):
            await client.caption(IMAGE)
        well = False
        assert await retries_of_a_failure() == 3
        assert await retries_of_a_failure() == 0


def test_retry_that_helps_costs_the_budget_nothing():
    budget = Budget()
    for _ in range(2 * BUDGET // RETRY_COST):
        retries = CallRetries(1, budget)
        assert retries.delay(md.ServerError("No", status=503), jitter=1, left=60) == 0.5
        retries.succeeded()


async def test_stream_that_is_asked_for_again_waits_like_any_other_call(clock):
    async def play(peer):
        await peer.request()
        await peer.send(STREAM_HEAD)
        if len(server.peers) == 3:
            await peer.send(in_chunks(*EVENTS, DONE))

    watch = Watch(clock)
    async with (
        played(play, max_retries=3, hooks=watch.hooks) as (server, client),
        client.caption(IMAGE, stream=True) as stream,
    ):
        assert await stream.text() == TEXT
    assert [*watch.waits[1], *watch.waits[2]] == pytest.approx(
        [*watch.delays[1], *watch.delays[2]], abs=TINY
    )


# -- a bulk run that is refused --------------------------------------------------------


def refusing(times, said="Retry-After: 999999999"):  # 31 years
    """Refuse so many requests, and answer the others."""
    left = [times]

    async def play(peer):
        while True:
            await peer.request()
            left[0] -= 1
            later = whole({"error": "later"}, said, status="429 Too Many")
            await peer.send(later if left[0] >= 0 else whole(ANSWER))

    return play


async def test_one_refusal_for_years_holds_a_run_up_for_a_minute_and_says_so(clock):
    paused = []
    hooks = md.Hooks(retry=lambda _: paused.append(run.paused_for))
    async with RawServer(refusing(1)) as server, client_of(server, hooks=hooks) as client:
        started = clock.now
        run = client.bulk([IMAGE] * 5, max_retries=1)
        assert all([result.ok async for result in run])
        assert LONGEST_RETRY_AFTER <= clock.now - started < LONGEST_RETRY_AFTER + 30
        assert paused == [pytest.approx(LONGEST_RETRY_AFTER, abs=1)]
        assert run.paused_for == 0


@pytest.mark.parametrize("max_retries", [0, 3])
async def test_refusals_without_end_are_the_end_of_all_items_and_of_the_run(clock, max_retries):
    async with RawServer(refusing(10**9)) as server, client_of(server) as client:
        started = clock.now
        few = client.bulk([IMAGE] * 3, max_retries=max_retries)
        results = [result async for result in few]
        assert [type(result.error) for result in results] == [md.RateLimitError] * 3
        many = client.bulk(iter(lambda: IMAGE, None), max_retries=max_retries)
        with pytest.raises(md.RateLimitError):
            assert not any([result.ok async for result in many])
        assert clock.now - started < 3600


@pytest.mark.parametrize(
    ("said", "tries"),
    [("Retry-After: 999999999", 4), ("Retry-After: 40", 6), ("X-Nothing: said", 10)],
    ids=["as long as a call would wait", "the time of three retries", "three for each retry"],
)
async def test_a_picture_that_is_always_refused_is_given_up(clock, said, tries):
    delays = []
    hooks = md.Hooks(retry=lambda event: delays.append(event.delay))
    async with RawServer(refusing(10**9, said)) as server, client_of(server, hooks=hooks) as client:
        (result,) = [each async for each in client.bulk([IMAGE], max_retries=3)]
    assert (type(result.error), result.tries, len(delays)) == (md.RateLimitError, tries, tries - 1)
    limits = [min(0.5 * 2**count, 30) for count in range(len(delays))]
    assert all(0.5 < delay / limit <= 1 for delay, limit in zip(delays, limits, strict=True))


async def test_an_item_that_may_not_be_refused_does_not_end_the_run_with_itself(clock):
    async with RawServer(refusing(1)) as server, client_of(server) as client:
        run = client.bulk([IMAGE] * 5, max_retries=0, concurrency=1, ordered=True)
        assert [each.ok async for each in run] == [False, *[True] * 4]


async def test_a_picture_that_is_tried_again_is_one_call_in_a_run(clock):
    events = []
    kinds = ("request", "retry", "end")
    hooks = {kind: lambda event, kind=kind: events.append((kind, event)) for kind in kinds}
    async with played(refusing(1), hooks=md.Hooks(**hooks), max_retries=1) as (_, client):
        (result,) = [result async for result in client.bulk([IMAGE])]
        assert client.stats().retries == 1
    assert [kind for kind, _ in events] == ["request", "retry", "request", "end"]
    assert len({event.call_id for _, event in events}) == 1
    assert events[-1][1].outcome == "complete"
    assert (result.tries, result.seconds) == (2, pytest.approx(LONGEST_RETRY_AFTER, abs=30))
