"""Streams as every server sends them: what text they give, and what is known beside it.

`wire/*.sse` holds whole streams, each with its source; the shapes that nobody has seen
on a wire yet stand here, and say what they are taken from where that is not ours.
"""

import json
from pathlib import Path

import pytest
from decoding import NOTHING, STOP, byte_by_byte, chat, decode, decode_cut, sse, text

import moondream_async as md
from moondream_async._protocol.decoders import decoder_for
from moondream_async._protocol.events import MAX_EVENT_BYTES, AnswerDecoder
from moondream_async._protocol.secret import Redactor, Secret
from moondream_async.results import Grounding, Reasoning, Region, Usage

WIRE = Path(__file__).parent / "wire"

# -- every server's stream -----------------------------------------------------------------

HERON = "A grey heron stands in shallow water, one leg raised."
SIGNS = "Two signs: “Boîte à thé” and 茶 🍵."
BOATS = "There are three boats, two of them red."
TRACED = "M 0 0.5 L 1 1 Z"
TIMES = {"input_tokens": 735, "prefill_time_ms": 20.1, "decode_time_ms": 30.5, "ttft_ms": 21.0}
STATS = {"tokens": 10, "duration": 0.5, "tokens_per_sec": 20.0}
BOX = Region(0.1, 0.2, 0.5, 0.6)

OF_KESTREL = {
    "request_id": "42",
    "finish_reason": "stop",
    "metrics": {**TIMES, "output_tokens": 10},
}
OF_SEGMENT = {"request_id": "44", "finish_reason": "stop", "metrics": {**TIMES, "output_tokens": 6}}
THOUGHT = Reasoning("One blue boat, two red ones.", (Grounding(4, 13, [[0.25, 0.75]]),))
STREAMS = {  # the text of each, and what is known beside it
    "cloud_caption": (HERON, {"request_id": "2026-01-15_caption_000417"}),
    "cloud_caption_glued": (HERON, {"request_id": "2026-01-15_caption_000417"}),
    "cloud_query": (SIGNS, {"request_id": "2026-01-15_query_000418"}),
    "cloud_query_glued": (SIGNS, {"request_id": "2026-01-15_query_000418"}),
    "kestrel_caption": (HERON, OF_KESTREL),
    "kestrel_query": (
        BOATS,
        {
            "request_id": "43",
            "finish_reason": "stop",
            "metrics": {**TIMES, "output_tokens": 8},
            "reasoning": THOUGHT,
        },
    ),
    "station_caption": (HERON, {"metrics": STATS}),
    "station_query": (SIGNS, {"metrics": {"tokens": 8, "duration": 0.25, "tokens_per_sec": 32.0}}),
    "serve_caption": (HERON, {}),
    "serve_query": (SIGNS, {}),
    "segment": (TRACED, {**OF_SEGMENT, "bbox": BOX, "path": "M 0.02 0.49 L 0.98 1 Z"}),
    "segment_no_bbox": (
        TRACED,
        {
            **OF_SEGMENT,
            "request_id": "45",
            "finish_reason": "length",
            "path": TRACED,
            "parse_error": "no box",
        },
    ),
    "chat": (
        SIGNS,
        {
            "request_id": "chatcmpl-46",
            "finish_reason": "stop",
            "usage": Usage(prompt_tokens=740, completion_tokens=8, total_tokens=748),
        },
    ),
}


def skill_of(name):
    return next(skill for skill in ("caption", "query", "segment", "chat") if skill in name)


@pytest.mark.parametrize("name", STREAMS)
def test_every_servers_stream_gives_its_text_once_and_all_that_it_says(name):
    whole, beside = STREAMS[name]
    stream = (WIRE / f"{name}.sse").read_bytes()
    assert stream.startswith(b": source: ")

    given, last = decode_cut(stream, skill=skill_of(name))

    assert text(given) == whole
    assert last == NOTHING._replace(completed=True, **beside)
    for at in range(0, len(stream), 7):
        assert decode(stream[:at], stream[at:], skill=skill_of(name)) == (given, last)
        events, known = decode(stream[:at], skill=skill_of(name))  # which ends too early
        assert whole.startswith(text(events))
        if known.completed:
            assert (text(events), known.finish_reason) == (whole, last.finish_reason)
        else:
            assert known.failure[0] is md.StreamInterruptedError


def test_every_stream_in_the_folder_is_read_here():
    assert {path.stem for path in WIRE.glob("*.sse")} == {*STREAMS, "serve_caption_failed"}


def test_a_failure_disguised_as_text_is_a_failure():
    stream = (WIRE / "serve_caption_failed.sse").read_bytes()

    events, last = decode_cut(stream)

    assert text(events) == "A grey "
    assert last.failure[0] is md.StreamServerError
    assert last.failure[1]["message"] == "An error occurred during caption generation."


CHUNK = {"chunk": "a heron", "completed": False}
SHAPES = {
    "docs widget": sse({"text": "a "}, {"text": "heron"}, b"[DONE]"),
    "kestrel, all in the final event": sse(
        {"chunk": "a heron", "completed": True, "caption": "a heron"}
    ),
    "all in the final event, worded differently": sse(
        {"chunk": "a heron", "completed": True, "caption": "A heron."}
    ),
    "final without a chunk": sse({"completed": True, "caption": "a heron"}),
    "final, empty chunk": sse({"chunk": "", "completed": True, "caption": "a heron"}),
    "final after nothing but empty chunks": sse(
        {"chunk": ""}, {"chunk": "", "completed": True, "caption": "a heron"}
    ),
    "final repeats the answer": sse(CHUNK, {"completed": True, "caption": "a heron"}),
    "final words it differently": sse(CHUNK, {"completed": True, "caption": "a heron!"}),
    "null chunk": sse({"chunk": None}, CHUNK, {"completed": True}),
    **{
        f"empty events: {empty!r}": empty
        + sse({"chunk": "a "})
        + empty
        + sse({"chunk": "heron"}, {"completed": True})
        for empty in (b"data:\n\n", b"data: \n\n", b"event: ping\ndata:\n\n", b"data\n\n")
    },
    "null in the final": sse(CHUNK, {"chunk": None, "completed": True}),
    "text after the end": sse(CHUNK, {"completed": True}, {"chunk": "!"}),
    "OpenAI's end": sse(CHUNK, b"[DONE]"),
    "OpenAI's end, spaces": sse(CHUNK, b" [DONE] "),
    "an unknown event": sse(CHUNK, {"mood": "calm"}, {"completed": True}),
    "an unknown event, no blank lines": sse(
        CHUNK, {"mood": "calm"}, {"completed": True}, end=b"\n"
    ),
    "an error that is none": sse(CHUNK, {"error": None, "completed": True}),
    "no spaces": b'data:{"chunk":"a heron"}\n\ndata:{"completed":true}\n\n',
    "JSON over two lines": sse(b'{"chunk":\ndata: "a heron"}', {"completed": True}),
    "byte order mark": b"\xef\xbb\xbf" + sse(CHUNK, {"completed": True}),
    "heartbeats": b": ping\n\n" + sse(CHUNK) + b":\n\n: ping\n" + sse({"completed": True}),
    "all fields of an event": b"event: chunk\nid: 1\nretry: 5\n"
    + sse(CHUNK)
    + b"event: end\n"
    + sse({"completed": True}),
    **{
        f"lines end in {end!r}": sse(CHUNK, {"completed": True}, end=end)
        for end in (b"\r\n\r\n", b"\r\r", b"\n", b"\r\n", b"\r", b"\n\r\n")
    },
    "no line end at the end of the stream": sse(CHUNK) + b'data: {"completed": true}',
    "final by type": sse({"chunk": "a heron", "type": "x"}, {"type": "final"}),
}


def test_every_shape_of_a_stream_gives_its_text_once():
    for name, stream in SHAPES.items():
        events, last = decode_cut(stream)
        assert text(events) == "a heron", name
        assert (last.completed, last.failure) == (True, None), name
    for skill, key in (("caption", "caption"), ("query", "answer"), ("segment", "path")):
        events, _ = decode(sse({"completed": True, key: "all of it"}), skill=skill)
        assert text(events) == "all of it"


COUNTED = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
CHATS = {
    "as documented": (sse(chat(content="a heron"), STOP, b"[DONE]"), None),
    "no [DONE] after the finish reason": (sse(chat(content="a heron"), STOP), None),
    "a role by itself": (
        sse(chat(role="assistant", content=None), chat(content="a heron"), b"[DONE]"),
        None,
    ),
    **{
        f"delta.{key} (a guess)": (
            sse(
                chat(**{key: "Look "}), chat(**{key: "again."}), chat(content="a heron"), b"[DONE]"
            ),
            "Look again.",
        )
        for key in ("reasoning", "reasoning_content")
    },
    "delta.reasoning_details (a guess)": (
        sse(chat(reasoning_details=[{"text": "Look."}]), chat(content="a heron"), b"[DONE]"),
        "Look.",
    ),
    "reasoning and text in one event": (
        sse(chat(reasoning="Look.", content="a "), chat(content="heron"), b"[DONE]"),
        "Look.",
    ),
    "odd events": (
        sse(
            {"choices": [{"delta": None}]},
            {"choices": None},
            {"choices": ["odd"]},
            {"choices": [], "usage": None},
            chat(content="a heron"),
            {"choices": [], "usage": "odd"},
            b"[DONE]",
        ),
        None,
    ),
    "usage": (sse(chat(content="a heron"), {"choices": [], "usage": COUNTED}, b"[DONE]"), None),
}


def test_every_shape_of_a_chat_gives_its_text_once():
    for name, (stream, thought) in CHATS.items():
        events, last = decode_cut(stream, skill="chat")

        assert text(events) == "a heron", name
        assert (last.completed, last.failure) == (True, None), name
        assert (last.reasoning and last.reasoning.text) == thought, name
        pieces = [each.text for each in events if isinstance(each, md.ReasoningEvent)]
        assert "".join(pieces) == (thought or ""), name
    _, last = decode(sse(chat(content="a heron")), skill="chat")  # has no finish reason
    assert (last.completed, last.failure[0]) == (False, md.StreamInterruptedError)


# -- events --------------------------------------------------------------------------------


def test_events_say_what_they_are_and_nothing_of_them_is_lost():
    box = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 0.6}
    bodies = [
        {"type": "bbox", "bbox": box},
        {"type": "path_delta", "chunk": "M 0", "completed": False, "token_index": 1},
        {"stats": {"tokens": 3}},
        {"type": "mood", "value": "calm"},
        {"value": "calm"},
        {"type": "final", "chunk": "", "completed": True, "path": "M 0 0 Z"},
    ]

    events, _ = decode(sse(*bodies), skill="segment")

    assert events == [
        md.BboxEvent(bbox=BOX, raw=bodies[0]),
        md.ChunkEvent(chunk="M 0", raw=bodies[1]),
        md.MetricsEvent(metrics={"tokens": 3}, raw=bodies[2]),
        md.UnknownEvent(event="mood", raw=bodies[3]),
        md.UnknownEvent(event="message", raw=bodies[4]),
        md.FinalEvent(raw=bodies[5]),
    ]
    [named], _ = decode(b"event: mood\n" + sse({"value": "calm"}))
    assert named.event == "mood"
    for extra in ({}, {"colour": "grey"}):
        body = {"chunk": "a", "completed": False, "request_id": "42", "token_index": 2, **extra}
        [event], _ = decode(sse(body))
        assert event == md.ChunkEvent(chunk="a", raw=body)


def test_an_event_is_given_by_the_line_that_ends_it():
    for skill, bodies in {
        "caption": [CHUNK, {"mood": "calm"}],
        "chat": [chat(content="a heron")],
    }.items():
        decoder = decoder_for(skill)
        for body in bodies:
            assert len(decoder.feed(sse(body, end=b"\n"))) == 1
    events = decoder_for("caption").feed(
        sse({"chunk": "a "}) + sse({"chunk": "heron"}, end=b"\r\r")
    )
    assert text(events) == "a heron"


def test_the_last_id_is_kept_when_later_events_do_not_repeat_it():
    first, second, none = ({"chunk": "a ", "request_id": each} for each in ("41", "42", ""))

    for packets in ([sse(first, second, {"chunk": "heron"}, none)], [sse(first, second)] * 2):
        assert decode(*packets, sse(second))[1].request_id == "42"
        assert decode(*packets)[1].request_id == "42"


# -- JSON where a stream was asked for -----------------------------------------------------


MESSAGE = {"content": "two", "reasoning": "Count."}
PLAIN = [
    ("caption", {"caption": "a heron", "request_id": "42"}, "a heron"),
    ("query", {"answer": "two", "request_id": "42", "reasoning": "Count them."}, "two"),
    ("query", {"answer": "two", "request_id": "42", "reasoning_content": "Count."}, "two"),
    ("segment", {"path": "M 0 0 Z", "request_id": "42"}, "M 0 0 Z"),
    ("chat", {"id": "42", "choices": [{"message": MESSAGE, "finish_reason": "stop"}]}, "two"),
]


def test_a_plain_answer_is_taken_as_a_stream_of_one_event():
    for skill, body, whole in PLAIN:
        decoder = decoder_for(skill)

        events = [*decoder.body(json.dumps(body).encode())]

        assert events == [md.FinalEvent(chunk=whole, raw=body)]
        assert (decoder.completed, decoder.request_id) == (True, "42")
        assert (decoder.reasoning is not None) == ("reasoning" in json.dumps(body))
        assert not decoder.end()
    for skill in ("caption", "query", "segment", "chat"):
        for body in (b"", b"{}", b'{"error": "boom"}', b"[1]", b'{"choices": [[]]}'):
            with pytest.raises(md.APIStatusError):
                decoder_for(skill).body(body)


# -- failures ------------------------------------------------------------------------------


NO_JSON = {
    "no JSON": (b"{odd}", ": {odd}"),
    "a list": ([1], ": [1]"),
    "bad UTF-8": (b'{"chunk": "\xff', ""),
    "an escape that is none": (b'{"chunk": "\\x", "completed": false}', ""),
    "nested deeper than any answer": (b'{"chunk": "x", "x": ' + b"[" * 70 + b"]" * 70 + b"}", ""),
    "a number that is none": (b'{"chunk": "x", "x": 1e400}', ""),
    "two values in a line": (b'{"chunk": "a"}{"chunk": "b"}', ""),
    "a line break in a value": (b'{"chunk":\n"a"}', ""),
}


SAID = {"message": "boom", "type": "overloaded", "code": 5}
DISGUISED = "An error occurred during query processing."
FAULTS = [  # what comes after a chunk, the error that it is, and what that says
    (b"", md.StreamInterruptedError, "ended before"),
    (b'data: {"chunk": "and', md.StreamInterruptedError, "ended before"),
    (sse({"error": "boom"}), md.StreamServerError, "boom"),
    (sse({"error": SAID}), md.StreamServerError, "boom"),
    (b"event: error\n" + sse({"message": "boom"}), md.StreamServerError, "boom"),
    (b"event: error\ndata: boom\n\n", md.StreamServerError, "boom"),
    (b"event: error\ndata\n\n", md.StreamServerError, "The server reported an error"),
    (sse({"chunk": DISGUISED, "completed": True}), md.StreamServerError, DISGUISED),
    (sse({"chunk": 5}), md.StreamProtocolError, "no text: 5"),
    *[
        (sse(body), md.StreamProtocolError, f"no JSON object{said}")
        for body, said in NO_JSON.values()
    ],
    (
        sse({"chunk": "x" * 1000, "completed": False}),
        md.StreamProtocolError,
        "over the limit of 500 bytes",
    ),
]


def test_a_fault_comes_after_what_had_arrived():
    for fault, cls, says in FAULTS:
        events, last = decode_cut(sse(CHUNK) + fault, max_event_bytes=500)

        assert text(events) == "a heron", fault
        assert not last.completed
        assert last.failure[0] is cls, fault
        assert says in last.failure[1]["message"]
        assert last.failure[1]["partial"] == "so far"


def test_a_text_that_is_two_is_no_json():
    events, last = decode(sse(CHUNK), sse(CHUNK, b'{"chunk": "a","b", "completed": false}'))

    assert text(events) == "a herona heron"
    assert last.failure[0] is md.StreamProtocolError


def test_an_error_has_the_servers_words_for_it_and_never_the_key():
    body = {"error": {"message": "boom", "type": "overloaded", "code": "busy"}}
    _, last = decode(sse(body))
    said = last.failure[1]
    assert (said["type"], said["code"], said["body"]) == ("overloaded", "busy", body)

    for stream in (
        sse({"error": "bad key KEY-12345"}),
        sse({"error": {"message": "bad key KEY-12345"}, "chunk": "KEY-12345"}),
        b"event: error\ndata: bad key KEY-12345\n\n",
        sse(b"bad key KEY-12345"),
        sse(["KEY-12345"]),
        sse({"chunk": ["KEY-12345"]}),
    ):
        _, last = decode(stream, secret=Redactor(Secret("KEY-12345")))
        assert last.failure is not None
        assert "KEY-12345" not in repr(last.failure)
        assert "***" in last.failure[1]["message"]
    for extra in ({}, {"colour": "a"}):  # but an answer is given as it is
        sent = sse({"chunk": "a grey heron", **extra})
        assert text(decode(sent, secret=Redactor(Secret("grey heron")))[0]) == "a grey heron"


def test_nothing_over_the_limit_is_kept():
    limit = 100
    decoder = AnswerDecoder("caption", max_event_bytes=limit)

    packets = 0
    while not decoder.done:
        assert not decoder.feed(b"x" * 10 if packets else b'data: {"chunk": "')
        packets += 1

    assert packets * 10 <= limit + 20
    assert (
        decoder.failure().message == f"One event of the stream is over the limit of {limit} bytes"
    )


def test_an_event_up_to_the_limit_passes():
    size = len(sse({"chunk": ""}, end=b""))
    events, last = decode(
        sse({"chunk": "x" * 1000}, {"completed": True}), max_event_bytes=1000 + size
    )

    assert text(events) == "x" * 1000
    assert last.completed
    assert MAX_EVENT_BYTES == 4 * 1024 * 1024


# -- what no server should send, and some do ------------------------------------------------


TWO = [{"reasoning": "Two "}, {"reasoning": "people."}]
REASONED = [  # what is sent, what was thought, and which pieces of it are events
    (TWO, "Two people.", ["Two ", "people."]),
    ([{"reasoning_content": "Two "}, TWO[1]], "Two people.", ["Two ", "people."]),
    ([TWO[0], {"reasoning": {"text": "One."}}], "One.", ["Two "]),
    ([{"reasoning": {"text": "One "}}, {"reasoning": "dog."}], "One dog.", ["dog."]),
    ([{"reasoning": ""}, {"reasoning": None}], None, []),
]


def test_reasoning_in_pieces_is_gathered_and_each_piece_is_an_event():
    def pieces(events):
        return [event.text for event in events if isinstance(event, md.ReasoningEvent)]

    for sent, thought, said in REASONED:
        stream = sse(*sent, {"chunk": "2"}, {"chunk": ".", "completed": True})
        events, last = decode_cut(stream, skill="query")
        assert text(events) == "2."
        assert (last.reasoning and last.reasoning.text) == thought
        assert pieces(events) == said
    once_more = {"chunk": "2", "completed": True, "reasoning": "Two "}
    events, last = decode(sse(TWO[0], once_more), skill="query")
    assert (last.reasoning.text, pieces(events)) == ("Two ", ["Two "])


@pytest.mark.parametrize("skill", ["query", "chat"])
def test_reasoning_in_very_many_pieces_is_gathered(skill):
    piece = chat(reasoning="Hm. ") if skill == "chat" else {"reasoning": "Hm. "}
    decoder = decoder_for(skill)
    assert len(decoder.feed(sse(*[piece] * 2000))) == 2000
    assert decoder.reasoning.text == "Hm. " * 2000


def test_half_of_a_surrogate_pair_loses_nothing_but_itself():
    for written, read in (
        (rb"\ud83d", "\ufffd"),
        (rb"\ude00 b", "\ufffd b"),
        (rb"\ud83d\ud83d\ude00", "\ufffd\U0001f600"),
        (rb"\\ud83d \ud83d", "\\ud83d \ufffd"),
    ):
        stream = sse(b'{"chunk": "a%b"}' % written, {"chunk": "b", "completed": True})
        events, last = decode_cut(stream)
        assert text(events) == f"a{read}b"
        assert last.completed
        [event] = decoder_for("caption").body(b'{"caption": "a%bb"}' % written)
        assert event.chunk == event.raw["caption"] == f"a{read}b"


HALVES = [
    (["a\\ud83d", "\\ude00b"], "a😀b"),
    (["\\ud83d", "\\ude00"], "😀"),
    (["a\\ud83d", "b"], "a\ufffdb"),
    (["a\\ud83d", "", "b"], "a\ufffdb"),
    (["a\\ud83d"], "a\ufffd"),
    (["\\ude00", "\\ud83d\\ud83d", "\\ude00 b"], "\ufffd\ufffd😀 b"),
    (["a\\\\ud83d", "\\ude00"], "a\\ud83d\ufffd"),
]


def test_halves_of_a_character_in_two_chunks_are_joined():
    for skill, shape, end in (
        ("caption", '{"chunk": "%s"}', {"completed": True}),
        ("chat", '{"choices": [{"delta": {"content": "%s"}}]}', b"[DONE]"),
    ):
        for pieces, whole in HALVES:
            stream = sse(*((shape % each).encode() for each in pieces), end)
            events, last = decode_cut(stream, skill=skill)
            assert text(events) == whole
            assert last.completed


MANY = 120_000


def test_an_event_of_very_many_values_is_refused_and_as_much_text_is_not():
    """They would hold up the event loop for seconds."""
    for value in (
        b'"x": [' + b"{}," * MANY + b"{}]",
        b'"x": [' + b'"",' * MANY + b'""]',
        b",".join(b'"%d" : ""' % number for number in range(MANY)),
        b'"x": [' + b"123456789," * MANY + b"1]",
        b'"x": [[' + b"[]," * 2 * MANY + b'"%b"]]' % (b"\\ud83d" * MANY),
    ):
        _, last = decode(sse(b'{"chunk": "a", %b}' % value))
        assert last.failure[0] is md.StreamProtocolError, value[:20]
    for part in ("{},", '"', "\\", "\ud83d", "é\n"):
        said = part * MANY
        events, last = decode(sse({"chunk": said, "colour": "grey"}, {"completed": True}))
        assert text(events) == said.replace("\ud83d", "\ufffd")
        assert last.completed


def test_json_in_place_of_events_is_the_error_that_it_is():
    for body, says in (
        ({"error": "Queue is full", "status": "rejected"}, "Queue is full"),
        ({"error": {"message": "bad key KEY-12345", "type": "t"}}, "bad key"),
        ({"colour": "grey"}, "does not hold the answer"),
    ):
        decoder = AnswerDecoder("caption", secret=Redactor(Secret("KEY-12345")))
        for packet in byte_by_byte(json.dumps(body).encode()):
            assert not decoder.feed(packet)
        decoder.end()

        error = decoder.failure(partial="")
        assert type(error) is md.ServerError
        assert says in error.message
        assert error.status == 200
        assert "KEY-12345" not in error.message + repr(error.body)


def test_json_in_place_of_events_is_the_answer_that_it_is():
    body = json.dumps({"caption": "a heron", "request_id": "42"}, indent=1).encode()

    events, last = decode_cut(body)

    assert (text(events), last.completed, last.request_id) == ("a heron", True, "42")


def test_events_that_begin_with_a_brace_are_events():
    events, last = decode(b"{\n" + sse(CHUNK, {"completed": True}))

    assert (text(events), last.completed) == ("a heron", True)
