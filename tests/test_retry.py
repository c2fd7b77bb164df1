"""What is tried again and when: arithmetic, with the clock and the dice brought by the test."""

import datetime as dt
import math
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moondream_async._call.retry import (
    LONGEST_DELAY,
    LONGEST_RETRY_AFTER,
    backoff,
    is_worth_retrying,
)
from moondream_async._protocol.retry_after import parse_retry_after
from moondream_async.errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    ClientClosedError,
    ImageError,
    MoondreamError,
    RateLimitError,
    RequestError,
    ServerError,
    StreamInterruptedError,
    StreamProtocolError,
    StreamServerError,
    StreamStalledError,
)

# -- what ----------------------------------------------------------------------------------

# What the official SDK (moondream 2.6.1) tries again, where it does at all.
RETRIED = {408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524}


def test_the_statuses_that_pass_by_themselves_are_tried_again_and_no_others():
    errors = [APIStatusError("no", status=status) for status in range(100, 600)]

    assert {error.status for error in errors if is_worth_retrying(error)} == RETRIED


@pytest.mark.parametrize(
    "error",
    [
        APIConnectionError("reset"),
        APITimeoutError("no connection", phase="connect"),
        RateLimitError("too fast", status=429),
        ServerError("Queue is full", status=200, body={"status": "rejected"}),
    ],
    ids=["lost connection", "no connection in time", "rate limit", "Station's full queue"],
)
def test_what_another_try_can_help_is_tried_again(error):
    assert is_worth_retrying(error)


@pytest.mark.parametrize(
    "error",
    [
        MoondreamError("?"),
        RequestError("bad argument"),
        ImageError("no picture"),
        ClientClosedError("closed"),
        APIConnectionError("the certificate can't be trusted", permanent=True),
        APITimeoutError("no place", phase="pool"),
        APITimeoutError("no answer", phase="first_event"),
        APITimeoutError("out of time", phase="total"),
        StreamStalledError("idle"),
        StreamInterruptedError("cut"),
        StreamProtocolError("no events"),
        StreamServerError("failed", body={"error": "x", "status": "rejected"}),
        ServerError("Request timeout", status=200, body={"status": "timeout"}),
        ServerError("bad thing", status=200, body={"status": "error"}),
        ServerError("no JSON", status=200, body="rejected"),
        ServerError("a list", status=200, body=["rejected"]),
    ],
    ids=lambda error: f"{type(error).__name__}: {error}",
)
def test_what_another_try_can_not_help_is_not(error):
    assert not is_worth_retrying(error)


# -- when ----------------------------------------------------------------------------------


def test_the_longest_wait_doubles_up_to_its_cap():
    assert [backoff(attempt, 1.0) for attempt in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]


@given(
    attempt=st.integers(0, 10**9),
    jitter=st.floats(0, 1),
    retry_after=st.none() | st.floats(0, 1e12),
)
def test_a_wait_is_never_negative_and_never_over_its_cap(attempt, jitter, retry_after):
    delay = backoff(attempt, jitter, retry_after)

    assert 0 <= delay <= (LONGEST_DELAY if retry_after is None else LONGEST_RETRY_AFTER)


@given(attempt=st.integers(0, 50), jitter=st.floats(0, 1))
def test_jitter_is_full_it_spreads_the_wait_from_nothing_to_the_whole(attempt, jitter):
    assert backoff(attempt, jitter) == jitter * backoff(attempt, 1.0)


@given(attempt=st.integers(0, 50), jitter=st.floats(0, 1), asked=st.floats(0, LONGEST_RETRY_AFTER))
def test_what_the_server_asks_for_wins(attempt, jitter, asked):
    assert backoff(attempt, jitter, asked) == asked


# -- Retry-After ---------------------------------------------------------------------------

NOW = dt.datetime(2026, 1, 15, 12, 0, 0, tzinfo=dt.UTC).timestamp()


WAITS = {
    "at once": ("0", 0.0),
    "seconds": ("7", 7.0),
    "spaces around": (" 7 ", 7.0),
    "leading zeros": ("007", 7.0),
    "part of a second": ("2.5", 2.5),
    "very long": ("999999999", 999999999.0),
    "date": ("Thu, 15 Jan 2026 12:00:30 GMT", 30.0),
    "date, the obsolete RFC 850 form": ("Thursday, 15-Jan-26 12:00:30 GMT", 30.0),
    "date, the obsolete asctime form": ("Thu Jan 15 12:00:30 2026", 30.0),
    "date, another time zone": ("Thu, 15 Jan 2026 13:00:30 +0100", 30.0),
    "date in the past": ("Thu, 15 Jan 2026 11:59:00 GMT", 0.0),
    "the epoch": ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
}


@pytest.mark.parametrize(("value", "seconds"), WAITS.values(), ids=WAITS)
def test_retry_after_in_seconds_or_as_a_date(value, seconds):
    assert parse_retry_after(value, NOW) == seconds


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        " ",
        "soon",
        "-1",
        "+1",
        "1e3",
        "inf",
        "nan",
        "1_000",
        "0x10",
        "1,5",
        ".5",
        "5.",
        "5 s",
        "٣",
        "1" * 5000,
        "Thu, 99 Jan 2026 12:00:30 GMT",
        "Thu, 15 Jan 99999 12:00:30 GMT",
        "Thu, 15 Jan 2026 25:61:61 GMT",
        "Thu, 15 Jan 2026 12:00:30 +9999999999",
        "\0",
    ],
)
def test_retry_after_that_makes_no_sense_is_none(value):
    assert parse_retry_after(value, NOW) is None


@given(value=st.text(), now=st.floats(0, 1e11))
@example(value="Mon, 01 Jan 0001 00:00:00 +2359", now=0)
@example(value="Fri, 31 Dec 9999 23:59:59 -2359", now=0)
@example(value="1 1 1 1:1:1 -99999", now=0)
def test_any_retry_after_is_a_number_of_seconds_or_none(value, now):
    seconds = parse_retry_after(value, now)

    assert seconds is None or (seconds >= 0 and math.isfinite(seconds))


WORDS = st.sampled_from(
    [*"0179:,+- ", "Thu", "Jan", "GMT", "EST", "2026", "99999999999999999999", "12:00:30", "-0000"]
)


@given(st.lists(WORDS, max_size=10).map(" ".join) | st.lists(WORDS, max_size=10).map("".join))
def test_almost_a_date_is_a_number_of_seconds_or_none(value):
    seconds = parse_retry_after(value, NOW)

    assert seconds is None or (seconds >= 0 and math.isfinite(seconds))


@given(st.integers(0, 999_999_999))
def test_whole_seconds_come_back_as_they_are(seconds):
    assert parse_retry_after(str(seconds), NOW) == seconds


seconds_of_a_century = st.integers(631152000, 3786912000)  # 1990 to 2090, since the epoch


@given(date=seconds_of_a_century, now=seconds_of_a_century)
def test_a_date_is_the_time_up_to_it(date, now):
    header = f"{dt.datetime.fromtimestamp(date, dt.UTC):%a, %d %b %Y %H:%M:%S} GMT"

    assert parse_retry_after(header, now) == max(0, date - now)


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="the time zone can't be changed here")
@pytest.mark.parametrize(
    "value",
    [
        "Thu, 15 Jan 2026 12:00:30 GMT",
        "Thu, 15 Jan 2026 12:00:30 -0000",
        "Thu, 15 Jan 2026 12:00:30",
        "Thu Jan 15 12:00:30 2026",
    ],
)
def test_dates_are_utc_wherever_the_client_runs(monkeypatch, value):
    monkeypatch.setenv("TZ", "EST5EDT")
    time.tzset()
    try:
        assert parse_retry_after(value, NOW) == 30.0
    finally:
        monkeypatch.undo()
        time.tzset()
