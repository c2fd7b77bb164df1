"""The event-stream parser: the standard's rules, however the bytes are cut.

Each case of the table is fed whole, byte by byte and cut in two anywhere, and random
streams are compared with a naive reading of the standard. What the servers send is
read in `test_events.py`.
"""

import contextlib
import json
import tracemalloc
from itertools import pairwise

import pytest
from decoding import byte_by_byte
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moondream_async._protocol.sse import ServerSentEvent, SSEParser
from moondream_async.errors import StreamProtocolError

Event = ServerSentEvent
BOM = b"\xef\xbb\xbf"
NO_ENDS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
LONGEST_RETRY = Event("x", retry=10**15 - 1)

thorough = settings(max_examples=2 * settings.default.max_examples)


def drain(parser, packets):
    """Feed `packets`; return the events, and whether the parser refused to go on."""
    events = []
    try:
        for packet in (*packets, b""):
            events += parser.feed(packet)
    except StreamProtocolError:
        return events, True
    return events, False


def parse(*packets):
    events, failed = drain(SSEParser(), packets)
    assert not failed
    return events


def cut(draw, stream):
    """Let Hypothesis cut `stream` into packets, some of them empty."""
    places = draw(st.lists(st.integers(0, len(stream)), max_size=12))
    return [stream[i:j] for i, j in pairwise((0, *sorted(places), len(stream)))]


def is_whole(text):
    """Whether a data line ends its event: beyond the standard, a JSON object does."""
    if text == "[DONE]":
        return True
    try:
        return text[:1] == "{" and isinstance(json.loads(text), dict)
    except ValueError:
        return False


# Streams, and their events; a string is an event of which nothing else is said.
# First the examples of the WHATWG HTML standard, section 9.2.6, in words of our own.
STANDARD = {
    "lines are joined": (b"data: heron\ndata: +2\ndata: 10\n\n", ["heron\n+2\n10"]),
    "an id line without a value resets the id, one space is taken off": (
        b": a stream of three\n\ndata: one\nid: 1\n\ndata:two\nid\n\ndata:  three\n\n",
        [Event("one", id="1"), "two", " three"],
    ),
    "empty lines count, an unfinished event does not": (b"data\n\ndata\ndata\n\ndata:", ["", "\n"]),
    "data with an empty value is an event": (b"data:\n\n", [""]),
    "the one space is not data": (b"data: \n\n", [""]),
    "only the first colon splits": (b"data: a:b: c\n\n", ["a:b: c"]),
    "no other white space is stripped": (b"data:\ta \n\n", ["\ta "]),
    "an event without its blank line is dropped": (b"data: x\n", []),
    "so is a line without an end": (b"data: x", []),
    "an empty stream has no events": (b"", []),
    "blank lines are no events": (b"\n\n\r\n\r\n", []),
    "an event without data is dropped, and its type": (b"event: ping\n\ndata: x\n\n", ["x"]),
    "the last type wins and holds for one event": (
        b"event: add\nevent: remove\ndata: x\n\ndata: y\n\n",
        [Event("x", event="remove"), "y"],
    ),
    "an empty type is the default one": (b"event: add\nevent\ndata: x\n\n", ["x"]),
    "the type may come later": (b"data: x\nevent: late\n\n", [Event("x", event="late")]),
    "the id stays, and is taken from events without data too": (
        b"id: 7\ndata: x\n\ndata: y\n\nid: 8\n\ndata: z\n\n",
        [Event("x", id="7"), Event("y", id="7"), Event("z", id="8")],
    ),
    "an id with a NUL is ignored": (b"id: 7\nid: 8\0\ndata: x\n\n", [Event("x", id="7")]),
    "retry is its event's": (b"retry: 25\ndata: x\n\ndata: y\n\n", [Event("x", retry=25), "y"]),
    "retry of an event without data is no other's": (b"retry: 5\n\ndata: x\n\n", ["x"]),
    "retry may be zero milliseconds": (b"retry: 0\ndata: x\n\n", [Event("x", retry=0)]),
    "a bad one undoes nothing": (b"retry: 5\nretry: soon\ndata: x\n\n", [Event("x", retry=5)]),
    "leading zeros say nothing": (
        b"retry: " + b"0" * 21 + b"6\ndata: x\n\n",
        [Event("x", retry=6)],
    ),
    "a huge retry is bounded": (b"retry: " + b"9" * 5000 + b"\ndata: x\n\n", [LONGEST_RETRY]),
    "so is one just over it": (b"retry: 1" + b"0" * 15 + b"\ndata: x\n\n", [LONGEST_RETRY]),
    "names are exact": (b"Data: a\n data: b\ndata : c\ndatas: d\ndat: e\n\n", []),
    "unknown fields are ignored": (b"colour: grey\ndata: x\nunknown\n\n", ["x"]),
    **{
        f"no milliseconds: {value}": (f"retry:{value}\ndata: x\n\n".encode(), ["x"])
        for value in ("", " +5", " 5ms", "  5", " 5 ", " 5_000", " 5.0", " \u0665", " 5²")
    },
}
# What the web-platform-tests look into (eventsource/format-*), with streams of our own.
FORMAT = {
    "a byte order mark is dropped": (BOM + b"data: x\n\n", ["x"]),
    "a second one belongs to the name": (BOM + BOM + b"data: x\n\ndata: y\n\n", ["y"]),
    "it counts at the start only": (b"data: x\n\n" + BOM + b"data: y\n\n", ["x"]),
    "not even after a blank line at the start": (b"\n" + BOM + b"data: x\n\n", []),
    "a byte order mark and a blank line": (BOM + b"\ndata: x\n\n", ["x"]),
    "half a byte order mark is a name": (BOM[:2] + b"\n\ndata: x\n\n", ["x"]),
    "a stream of a third of a byte order mark": (BOM[:1], []),
    "CRLF, CR and LF all end a line": (
        b"data: a\r\ndata: b\rdata: c\ndata: d\r\n\r\ndata: e\r\rdata: f\n\n",
        ["a\nb\nc\nd", "e", "f"],
    ),
    "LF CR are two line ends": (b"data: x\n\r", ["x"]),
    "CR CRLF are two": (b"data: x\n\r\ndata: y\r\r\n", ["x", "y"]),
    "CRLF LF are two": (b"data: x\r\n\n", ["x"]),
    "comments are ignored": (
        b"data: 1\r:\0\n:  data: 2\r\n:" + b"x" * 2100 + b"\n:data: 3\r\ndata: 4\n:\n\n",
        ["1\n4"],
    ),
    "heartbeats are no events": (b": \n\n:\n\n: ping\n\n", []),
    "NUL is a character like any other": (b"data: \0\n\nda\0ta: x\n\n", ["\0"]),
    "the stream is UTF-8": ("data: ok…\n\ndata: 茶 🍵\n\n".encode(), ["ok…", "茶 🍵"]),
    "so is a type": ("event: größe\nid: ①\ndata: x\n\n".encode(), [Event("x", "größe", "①")]),
    "what is not UTF-8 is replaced, a subpart at a time": (
        b"data: a\xffb\xe2\x82\n\ndata: \xf0\x9f\x8d\xf0\x9f\x8d\xb5\xed\xa0\x80\n\n",
        ["a\ufffdb\ufffd", "\ufffd🍵\ufffd\ufffd\ufffd"],
    ),
    "a line end cuts a character": (b"data: a\xe2\x82\r\ndata: \xac\n\n", ["a\ufffd\n\ufffd"]),
    "no other character ends a line": (f"data: {NO_ENDS}\n\n".encode(), [NO_ENDS]),
}
# Streams of JSON events without blank lines: beyond the standard.
A, B = '{"a": 1}', '{"b": 2}'
GLUED = {
    "each line is an event": (f"data: {A}\ndata: {B}\n".encode(), [A, B]),
    "blank lines change nothing": (f"data: {A}\n\ndata:{B}\r\n\r\n\n".encode(), [A, B]),
    "a line is complete when it has ended": (f"data: {A}".encode(), []),
    "an event of several lines ends as the standard says": (
        f'data: {{"a":\ndata: 1}}\n\ndata: {B}\n'.encode(),
        ['{"a":\n1}', B],
    ),
    "only the first line is asked about": (
        f"data: [1]\ndata: {A}\ndata: {B}\n\n".encode(),
        [f"[1]\n{A}\n{B}"],
    ),
    "the mark of the end is an event": (f"data: [DONE]\ndata: {A}\n".encode(), ["[DONE]", A]),
    "bytes that are no UTF-8": (b'data: {"a": "\xff"}\n', ['{"a": "\ufffd"}']),
    "what begins otherwise may go on": (f"data:  {A}\n".encode(), []),
    "fields before the line are the event's": (
        f"event: error\nid: 3\nretry: 9\ndata: {A}\ndata: {B}\n".encode(),
        [Event(A, event="error", id="3", retry=9), Event(B, id="3")],
    ),
    "fields after the line are the next event's": (
        f"data: {A}\nid: 3\nevent: error\ndata: {B}\n".encode(),
        [A, Event(B, event="error", id="3")],
    ),
    "comments may stand between": (f": x\ndata: {A}\n: y\nunknown\ndata: {B}\n".encode(), [A, B]),
}
CASES = STANDARD | FORMAT | GLUED


def test_stream_cut_anywhere_gives_the_same_events():
    for name, (stream, said) in CASES.items():
        events = [Event(each) if isinstance(each, str) else each for each in said]
        assert parse(stream) == parse(*byte_by_byte(stream)) == events, name
        for at in range(0, len(stream), 1 + len(stream) // 100):
            assert parse(stream[:at], b"", stream[at:]) == events, (name, at)


def test_event_is_returned_by_the_packet_that_ends_it():
    for packets in (
        [(b"data: x\n", []), (b"\n", [Event("x")])],
        [(b"data: x\r\r", [Event("x")]), (b"\ndata: y\n\n", [Event("y")])],
        [(b"data: x\r", []), (b"", []), (b"\n", []), (b"\n", [Event("x")])],
        [(b'data: {"a": 1}\n', [Event('{"a": 1}')])],
    ):
        parser = SSEParser()
        assert [(packet, parser.feed(packet)) for packet, _ in packets] == packets


def test_last_event_id_changes_when_the_event_ends_and_retry_when_it_is_said():
    parser = SSEParser()
    assert parser.retry is None
    parser.feed(b"id: 7\nretry: 100\nretry: 200\n")
    assert (parser.last_event_id, parser.retry) == ("", 200)
    parser.feed(b"\n")
    assert (parser.last_event_id, parser.retry) == ("7", 200)
    parser.feed(b"retry: never\ndata: x\nid\n\n")
    assert (parser.last_event_id, parser.retry) == ("", 200)


def test_event_shows_what_is_not_at_its_default():
    assert repr(Event("a cat")) == "ServerSentEvent(data='a cat')"
    assert repr(Event("", event="error", retry=5)) == (
        "ServerSentEvent(data='', event='error', retry=5)"
    )


# Against the standard's text, line by line, as slowly as it likes.


def lines_of(stream):
    """Sections 9.2.5 and 9.2.6: decode, drop one mark, take CRLF, LF and CR as line ends."""
    text = stream.decode("utf-8", "replace")
    if text[:1] == "\ufeff":
        text = text[1:]
    line = ""
    while text:
        if text[0] in "\r\n":
            yield line
            line = ""
            text = text[2:] if text[:2] == "\r\n" else text[1:]
        else:
            line += text[0]
            text = text[1:]


def field_of(line):
    if ":" not in line:
        return line, ""
    colon = line.index(":")
    name, value = line[:colon], line[colon + 1 :]
    return name, value[1:] if value[:1] == " " else value


def by_the_book(stream):
    """Section 9.2.6, and `is_whole`; also the id and the reconnection time that are left."""
    events = []
    data = event_type = id_buffer = last_id = ""
    reconnection_time = retry = None
    for line in lines_of(stream):
        if line[:1] == ":":
            continue
        name, value = field_of(line)
        whole = False
        if name == "event":
            event_type = value
        elif name == "data":
            whole = not data and is_whole(value)
            data += value + "\n"
        elif name == "id" and "\0" not in value:
            id_buffer = value
        elif name == "retry" and value and all(char in "0123456789" for char in value):
            reconnection_time = retry = int(value)
        if whole or not line:
            last_id = id_buffer
            if data:
                events.append(Event(data[:-1], event_type or "message", last_id, retry))
            data = event_type = ""
            retry = None
    return events, last_id, reconnection_time


pieces = st.sampled_from(
    [
        *(b"data", b"data:", b"data: ", b"event: ", b"id: ", b"retry: ", b":", b" ", b": ping"),
        *(b"\n", b"\n\n", b"\r", b"\r\n", b"\r\n\r\n", BOM, b"\0", b"\xff", b"\xe2\x82", b"\xac"),
        *(b'{"a": 1}', b'{"a":', b"1}", b"7", b"25", b"x", "é".encode(), "\u2028".encode()),
        *(b'data: {"b": 2}\n\n', b'data: {"a": 1}\n', b"data: x\n", b"data\n", b"event: y\n"),
    ]
)
streams = st.lists(pieces, max_size=40).map(b"".join) | st.binary(max_size=60)


@thorough
@given(stream=streams, data=st.data())
@example(stream=BOM + b"\r", data=None)
def test_any_stream_is_read_by_the_book(stream, data):
    packets = [stream] if data is None else cut(data.draw, stream)
    parser = SSEParser()
    events, failed = drain(parser, packets)
    assert (events, parser.last_event_id, parser.retry) == by_the_book(stream)
    assert not failed


@thorough
@given(stream=streams, limit=st.integers(3, 40), data=st.data())
def test_where_the_limit_strikes_does_not_depend_on_the_cuts(stream, limit, data):
    def outcome(packets):
        return drain(SSEParser(max_event_bytes=limit), packets)

    assert outcome(cut(data.draw, stream)) == outcome([stream]) == outcome(byte_by_byte(stream))


# The limit.


ROOM = {  # what is left for a line of an event of 16 bytes, after what came before
    b"": 16,
    BOM: 16,
    b"data: 123\n": 13,
    "data: é\n".encode(): 14,  # in bytes, not characters
    b"data: 123\r\ndata: 45\r\n": 10,  # with the line feeds between data lines
    b"data\ndata\ndata\n": 14,  # be they empty
    b"data: 123\n\n": 16,  # data of the event before does not count
    b": 123\n": 16,  # nor do comments that have ended
    b"unknown: 123\n": 16,
    b"event: 1\nid: 2\nretry: 3\n": 16,
}


def test_limit_is_on_the_data_and_the_line_under_way():
    for before, room in ROOM.items():
        for start in (b"data:", b":", b"x"):
            for end in (b"", b"\n"):
                fits = before + start.ljust(room, b".") + end
                too_long = before + start.ljust(room + 1, b".") + end
                for packets in (lambda stream: [stream], byte_by_byte):
                    assert not drain(SSEParser(max_event_bytes=16), packets(fits))[1], fits
                    assert drain(SSEParser(max_event_bytes=16), packets(too_long))[1], too_long


def test_events_before_a_fault_are_returned_first():
    for end in (b"", b"\n\n"):
        fault = b"data: 01234567890123456789" + end
        with pytest.raises(StreamProtocolError, match="16 bytes"):  # at once, where none are
            SSEParser(max_event_bytes=16).feed(fault)
        parser = SSEParser(max_event_bytes=16)
        assert parser.feed(b"data: x\n\ndata: y\n\n" + fault) == [Event("x"), Event("y")]
        for packet in (b"", b"data: z\n\n", b"\n"):
            with pytest.raises(StreamProtocolError, match="16 bytes"):
                parser.feed(packet)


def test_heartbeats_and_unknown_fields_never_come_to_the_limit():
    parser = SSEParser(max_event_bytes=16)
    assert parser.feed(b"data: x\n") == []
    for _ in range(100):
        assert parser.feed(b": ping\nunknown: y\nevent: z\nid: 1\n") == []
    assert parser.feed(b"\n") == [Event("x", event="z", id="1")]


# Memory.


@contextlib.contextmanager
def memory():
    """Yield a function that tells how many bytes are held, and how many were at most."""
    tracemalloc.start()
    try:
        yield tracemalloc.get_traced_memory
    finally:
        tracemalloc.stop()


LONG_EVENTS = [
    # Copying the line at every packet would take 128 gigabytes.
    (b"data: ", b"x" * 1000, 16_000),
    (b"data: ", b"xy", 20_000),
    (b"", b"data:xy\n", 20_000),
    (b":", b"x" * 100, 20_000),
]


@pytest.mark.slow
def test_memory_stays_within_a_few_times_the_event():
    for start, piece, times in LONG_EVENTS:
        with memory() as held:
            parser = SSEParser()
            parser.feed(start)
            for _ in range(times):
                parser.feed(piece)
            parser.feed(b"\n\n")
            # At the end: the line, its value and the text of it.
            assert held()[1] < 3.2 * times * len(piece), piece


def test_heartbeats_are_not_kept():
    with memory() as held:
        parser = SSEParser()
        for _ in range(20_000):
            parser.feed(b": ping\n")
        assert held()[1] < 10_000


def test_memory_is_given_up_when_the_parser_fails():
    with memory() as held:
        parser = SSEParser(max_event_bytes=200_000)
        parser.feed(b"data: " + b"x" * 100_000 + b"\n" + b"y" * 90_000)
        with pytest.raises(StreamProtocolError):
            parser.feed(b"y" * 20_000)
        assert held()[0] < 20_000
