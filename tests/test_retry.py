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


HELPED = [
    APIConnectionError("reset"),
    APITimeoutError("no connection", phase="connect"),
    RateLimitError("too fast", status=429),
    ServerError("Station's queue is full", status=200, body={"status": "rejected"}),
]
NOT_HELPED = [
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
]


def test_what_another_attempt_can_help_is_tried_again_and_nothing_else():
    assert [error for error in HELPED + NOT_HELPED if is_worth_retrying(error)] == HELPED


# -- when ----------------------------------------------------------------------------------


def test_the_longest_wait_doubles_up_to_its_cap():
    assert [backoff(attempt, 1.0) for attempt in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]


@given(
    attempt=st.integers(0, 10**9),
    jitter=st.floats(0, 1),
    retry_after=st.none() | st.floats(0, 1e12),
)
def test_jitter_is_full_and_what_the_server_asks_for_wins_up_to_a_cap(attempt, jitter, retry_after):
    delay = backoff(attempt, jitter, retry_after)

    if retry_after is None:
        assert delay == jitter * backoff(attempt, 1.0)
        assert 0 <= delay <= LONGEST_DELAY
    else:
        assert delay == min(retry_after, LONGEST_RETRY_AFTER)


# -- Retry-After ---------------------------------------------------------------------------

NOW = dt.datetime(2026, 1, 15, 12, 0, 0, tzinfo=dt.UTC).timestamp()


WAITS = {
    "0": 0.0,
    "7": 7.0,
    " 7 ": 7.0,
    "007": 7.0,
    "2.5": 2.5,
    "999999999": 999999999.0,
    "Thu, 15 Jan 2026 12:00:30 GMT": 30.0,
    "Thursday, 15-Jan-26 12:00:30 GMT": 30.0,  # the obsolete form of RFC 850
    "Thu Jan 15 12:00:30 2026": 30.0,  # and asctime's
    "Thu, 15 Jan 2026 13:00:30 +0100": 30.0,
    "Thu, 15 Jan 2026 11:59:00 GMT": 0.0,  # past
    "Thu, 01 Jan 1970 00:00:00 GMT": 0.0,
}
NO_WAITS = [
    *(None, "", " ", "soon", "-1", "+1", "1e3", "inf", "nan", "1_000", "0x10", "1,5", ".5", "5."),
    *("5 s", "\N{ARABIC-INDIC DIGIT THREE}", "1" * 5000, "\0"),
    "Thu, 99 Jan 2026 12:00:30 GMT",
    "Thu, 15 Jan 99999 12:00:30 GMT",
    "Thu, 15 Jan 2026 25:61:61 GMT",
    "Thu, 15 Jan 2026 12:00:30 +9999999999",
]


def test_retry_after_is_in_seconds_or_a_date_and_none_where_it_makes_no_sense():
    assert {value: parse_retry_after(value, NOW) for value in WAITS} == WAITS
    assert [value for value in NO_WAITS if parse_retry_after(value, NOW) is not None] == []


WORDS = st.sampled_from(
    [*"0179:,+- ", "Thu", "Jan", "GMT", "EST", "2026", "99999999999999999999", "12:00:30", "-0000"]
)


@given(st.lists(WORDS, max_size=10).map(" ".join) | st.lists(WORDS, max_size=10).map("".join))
@example("Mon, 01 Jan 0001 00:00:00 +2359")
@example("Fri, 31 Dec 9999 23:59:59 -2359")
@example("1 1 1 1:1:1 -99999")
def test_almost_a_date_is_a_number_of_seconds_or_none(value):
    for now in (0, NOW):
        seconds = parse_retry_after(value, now)
        assert seconds is None or (seconds >= 0 and math.isfinite(seconds))


seconds_of_a_century = st.integers(631152000, 3786912000)  # 1990 to 2090, since the epoch


@given(date=seconds_of_a_century, now=seconds_of_a_century)
def test_a_date_is_the_time_up_to_it(date, now):
    header = f"{dt.datetime.fromtimestamp(date, dt.UTC):%a, %d %b %Y %H:%M:%S} GMT"

    assert parse_retry_after(header, now) == max(0, date - now)


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="the time zone can't be changed here")
def test_dates_are_utc_wherever_the_client_runs(monkeypatch):
    monkeypatch.setenv("TZ", "EST5EDT")
    time.tzset()
    try:
        for zone in (" GMT", " -0000", ""):
            assert parse_retry_after(f"Thu, 15 Jan 2026 12:00:30{zone}", NOW) == 30.0
        assert parse_retry_after("Thu Jan 15 12:00:30 2026", NOW) == 30.0
    finally:
        monkeypatch.undo()
        time.tzset()
