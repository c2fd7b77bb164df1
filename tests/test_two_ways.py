"""A line gives the same whether it fits the strict type or goes to the parser.

Random streams, of every server's events and of what no server should send, are read as they
come, and with every line taken for an odd one: all that is given and known must be the same
after every packet, however the stream is cut.
"""

import json
from itertools import chain, pairwise

import msgspec
import pytest
from decoding import CUTS, STOP, byte_by_byte, chat, cuts, decode, sse, steps, text
from hypothesis import example, given, settings
from hypothesis import strategies as st

import moondream_async as md
from moondream_async._protocol.decoders import ChatDecoder
from moondream_async._protocol.events import AnswerDecoder
from moondream_async._protocol.secret import Redactor, Secret
from moondream_async.results import StreamEvent

thorough = settings(max_examples=2 * settings.default.max_examples)

DIALECTS = ["cloud", "kestrel", "Station", "old", "segment", "chat"]
SKILLS = st.sampled_from(["caption", "query", "segment", "chat"])

# -- what a stream is made of --------------------------------------------------------------

ODD_WORDS = ["true", '"completed": true', '}\n\ndata: {"chunk": "x"}', *"\u2028🍵\x00{}", "é茶"]
words = st.text(max_size=8) | st.sampled_from(ODD_WORDS)


@st.composite
def dumped(draw, value):
    """`value` as JSON, in one of the ways that servers write it."""
    tight = draw(st.booleans())
    separators = (",", ":") if tight else (", ", ": ")
    return json.dumps(value, ensure_ascii=draw(st.booleans()), separators=separators).encode()


def answer_in(dialect, pieces):
    """The events with which a server gives an answer of these pieces."""
    whole = "".join(pieces)
    if dialect == "cloud":
        chunks = [{"chunk": piece, "completed": False, "request_id": "42"} for piece in pieces]
        return [*chunks, {"completed": True, "chunk": "", "org_id": "o", "request_id": "42"}]
    if dialect == "kestrel":
        *first, last = pieces or [""]
        chunks = [
            {"chunk": piece, "completed": False, "token_index": i} for i, piece in enumerate(first)
        ]
        final = {"chunk": last, "completed": True, "caption": whole, "finish_reason": "stop"}
        return [*chunks, final]
    if dialect == "Station":
        stats = [{"stats": {"tokens": len(pieces)}}] if pieces else []
        return [*({"chunk": piece} for piece in pieces), *stats, {"completed": True}]
    if dialect == "old":
        chunks = [{"chunk": piece, "completed": False} for piece in pieces]
        return [*chunks, {"chunk": "", "completed": True}]
    if dialect == "segment":
        deltas = [
            {"type": "path_delta", "chunk": piece, "completed": False, "token_index": i}
            for i, piece in enumerate(pieces)
        ]
        # It says "path", which stands in for the answer only where nothing was streamed.
        final = {"type": "final", "chunk": "", "completed": True, "path": whole}
        return [{"type": "bbox", "bbox": None}, *deltas, final]
    return [*({"id": "42", **chat(content=piece)} for piece in pieces), STOP, b"[DONE]"]


def randomly_cut(draw, stream):
    places = draw(st.lists(st.integers(0, len(stream)), max_size=12))
    return [stream[i:j] for i, j in pairwise((0, *sorted(places), len(stream)))]


# What is mostly sent, and fits.
plain = st.builds(
    lambda chunk, extra: {"chunk": chunk, **extra},
    words,
    st.fixed_dictionaries(
        {},
        optional={
            "completed": st.sampled_from([False]),
            "request_id": st.sampled_from(["", "42", "43"]),
            "token_index": st.integers(),
            "type": st.just("path_delta"),
        },
    ),
)
plain_chat = st.builds(
    lambda delta, choice, extra: {"choices": [{"delta": delta, **choice}], **extra},
    st.fixed_dictionaries({"content": words}, optional={"role": st.just("assistant")}),
    st.fixed_dictionaries(
        {},
        optional={
            "index": st.integers(0, 2),
            "finish_reason": st.sampled_from([None, None, "stop"]),
            "logprobs": st.none(),
        },
    ),
    st.fixed_dictionaries(
        {},
        optional={
            "id": st.sampled_from(["", "42", "43"]),
            "object": st.just("chat.completion.chunk"),
            "created": st.integers(0, 2**70),
            "usage": st.none(),
        },
    ),
)
odd_values = (
    st.none()
    | st.booleans()
    | words
    | st.integers()
    | st.sampled_from([10**30, 1.5, [], {}, ["x"], {"text": "x"}, {"message": "x"}])
)
odd = st.dictionaries(
    st.sampled_from(
        """
        chunk text completed error stats metrics reasoning request_id token_index type bbox path
        parse_error usage choices id finish_reason caption answer message mood
        """.split()  # noqa: SIM905 - many quoted words are no easier to read
    ),
    odd_values,
    max_size=4,
) | st.fixed_dictionaries({"choices": st.lists(odd_values | st.just({"delta": {}}), max_size=2)})
whole_streams = st.builds(answer_in, st.sampled_from(DIALECTS), st.lists(words, max_size=4))
data_lines = st.one_of(
    *[(plain | plain_chat).flatmap(dumped).map(lambda x: b"data: " + x)] * 6,
    odd.flatmap(dumped).map(lambda x: b"data: " + x),
    (plain | odd).flatmap(dumped).map(lambda x: b"data:" + x),
    (plain | plain_chat | odd).flatmap(dumped).map(lambda x: b"data: " + x * 2),
    (plain | odd).flatmap(dumped).map(lambda x: b"data: " + x.replace(b" ", b"\ndata: ", 1)),
    (plain | odd).flatmap(dumped).map(lambda x: b"data: " + x.replace(b":", b":\n", 1)),
    (plain | odd).flatmap(dumped).map(lambda x: b"data: " + x[:-1] + b"\xff}"),
    (plain | odd).flatmap(dumped).map(lambda x: b"data: " + x.replace(b'"', b'"\0', 3)),
    (plain | odd).flatmap(dumped).map(lambda x: b"data: " + x + b" "),
    plain.flatmap(dumped).map(lambda x: b"\xef\xbb\xbfdata: " + x),
    st.sampled_from(
        [
            b"data: [DONE]",
            b'data: {"completed": true}',
            b"data: {}",
            b"data: {",
            b"data: }",
            b"data",
            b"event: error",
            b"event: mood",
            b"event",
            b"id: 7",
            b"retry: 5",
            b": ping",
            b"",
            b"colour: grey",
            b'data: {"chunk": "\\ud800"}',
            b'data: {"chunk": "a", "token_index": ' + b"9" * 25 + b"}",
            b'data: {"chunk": "a", "token_index": ' + b"9" * 5000 + b"}",
            b'data: {"chunk": "a", "token_index": 1.0}',
            b'data: {"chunk": "a", "chunk": "b"}',
            b'data: {"chunk": "a"},',
            b'data: [{"chunk": "a"}]',
            b'data: {"chunk": "' + b"x" * 300 + b'"}',
        ]
    ),
    st.binary(max_size=6),
)
line_ends = st.sampled_from(
    [*[b"\n\n"] * 8, b"\n", b"\n", b"", b"\r\n\r\n", b"\r\n", b"\r", b"\n\n\n"]
)
streams = st.one_of(
    st.lists(st.tuples(data_lines, line_ends).map(b"".join), max_size=12).map(b"".join),
    st.tuples(whole_streams, line_ends).map(lambda x: sse(*x[0], end=x[1])),
    st.binary(max_size=60),
)


# -- the promises --------------------------------------------------------------------------


@given(
    st.data(),
    st.sampled_from(DIALECTS),
    st.lists(words, max_size=12),
    st.sampled_from([b"\n\n", b"\n\n", b"\n", b"\r\n\r\n", b"\r\r"]),
)
@pytest.mark.slow
def test_text_is_never_lost_and_never_given_twice(data, dialect, pieces, end):
    stream = sse(*answer_in(dialect, pieces), end=end)
    skill = dialect if dialect in ("segment", "chat") else "caption"

    events, last = decode(*randomly_cut(data.draw, stream), skill=skill)

    assert text(events) == "".join(pieces)
    assert (last.completed, last.failure) == (True, None)


def exact(value):
    """`value` with its types, for 1 == 1.0 == True; the order of keys says nothing."""
    if isinstance(value, StreamEvent):
        value = msgspec.structs.asdict(value)
    if isinstance(value, dict):
        return {key: exact(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [exact(each) for each in value]
    return type(value), value


class Nothing:
    """Decodes no line, so that all of them are odd."""

    def decode(self, line):
        raise msgspec.DecodeError


class LongWay(AnswerDecoder):
    _strict = Nothing()


class LongWayOfChat(ChatDecoder):
    _strict = Nothing()


def test_a_byte_order_mark_is_one_only_at_the_start():
    first, second = sse({"chunk": "a "}), b"\xef\xbb\xbf" + sse({"chunk": "heron"})

    for packets in ([first, second], [first + second], byte_by_byte(first + second)):
        assert text(decode(*packets)[0]) == "a "


@thorough
@given(
    data=st.data(),
    skill=SKILLS,
    start=st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\xef", b"\n", b"\r"]),
    stream=streams,
    options=st.fixed_dictionaries(
        {},
        optional={
            "max_event_bytes": st.sampled_from([20, 64, 128, 256]),
            "secret": st.sampled_from([Redactor(Secret("x")), Redactor(Secret("42"))]),
        },
    ),
)
@pytest.mark.slow
def test_a_line_that_fits_gives_the_same_as_an_odd_one_however_they_are_cut(
    data, skill, start, stream, options
):
    stream = start + stream
    short, long = (ChatDecoder, LongWayOfChat) if skill == "chat" else (AnswerDecoder, LongWay)

    outcomes = []
    for packets in ([stream], byte_by_byte(stream), randomly_cut(data.draw, stream)):
        expected = steps(long(skill, **options), packets)
        actual = steps(short(skill, **options), packets)

        assert actual == expected
        assert exact(actual) == exact(expected)
        outcomes.append(([event for events, _ in actual for event in events], actual[-1][1]))
    assert outcomes[1:] == outcomes[:1] * 2


@given(skill=SKILLS, stream=streams)
@example(skill="caption", stream=b"data: " + b"[" * 100_000)
@example(skill="caption", stream=b'data: {"chunk": ' + b"[" * 900 + b"]" * 900 + b"}\n\n")
@example(skill="caption", stream=b'data: {"error": ' + b"1" * 4300 + b"}\n\n")
def test_any_bytes_are_events_or_one_of_our_errors(skill, stream):
    events, last = decode(stream, skill=skill)

    assert all(type(event.chunk) is str and type(event.raw) is dict for event in events)
    assert last.completed == (last.failure is None)
    if last.failure is not None:
        assert issubclass(last.failure[0], md.StreamError)


def test_an_error_nested_as_deep_as_json_goes_is_an_error():
    """What can just be decoded can be too deep to be shown, from a deeper place."""

    def fails(depth):
        _, last = decode(sse(b'{"error": ' + b"[" * depth + b"]" * depth + b"}"))
        return last.failure[0]

    depths = [*range(2, 1100, 4), 10_000, 100_000]  # {"error": []} is none

    assert {fails(depth) for depth in depths} <= {md.StreamServerError, md.StreamProtocolError}


class Watched:
    """Counts the lines that do not fit."""

    def __init__(self, decoder):
        self.decoder, self.odd = decoder, 0

    def decode(self, line):
        try:
            return self.decoder.decode(line)
        except msgspec.DecodeError:
            self.odd += 1
            raise


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_is_mostly_sent_fits(dialect, monkeypatch):
    """Or else the comparisons above would compare one way with itself."""
    kind = ChatDecoder if dialect == "chat" else AnswerDecoder
    strict = Watched(kind._strict)
    monkeypatch.setattr(kind, "_strict", strict)
    pieces = ["A ", "“heron” ", "é茶 ", "🍵."]
    chunks = [body for body in answer_in(dialect, pieces) if body != STOP][dialect == "segment" : 3]
    for end in (b"\n\n", b"\n", b"\r\n\r\n"):
        decoder = kind("chat" if dialect == "chat" else "caption")
        stream = sse(*chunks, end=end)
        packets = [stream, b": heartbeat\n\n", *chain.from_iterable(cuts(stream))]

        given = [event for packet in packets for event in decoder.feed(packet)]

        assert len(given) == stream.count(b"data: ") * (1 + len(CUTS))
    assert strict.odd == 0
