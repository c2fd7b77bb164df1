"""Conversations: what goes into them, and what comes out in one piece or as a stream."""

import json

import pytest
from canned import canned
from PIL import Image
from raw_server import STREAM_HEAD, in_chunks, whole

import moondream_async as md

QUESTION = "Where is the red circle?"

streamed_or_not = pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])


PARTS = {
    "bare": lambda picture: picture,
    "openai": lambda picture: {"type": "image_url", "image_url": {"url": picture}},
    "short": lambda picture: {"type": "image_url", "image_url": picture},
    "image": lambda picture: {"type": "image", "image": picture},
}


async def test_chat_gives_the_same_text_streamed_and_not(client, photo):
    messages = [{"role": "user", "content": [photo, QUESTION]}]
    plain = await client.chat(messages)
    assert isinstance(plain, md.ChatResult)
    assert plain.message == md.ChatMessage(role="assistant", content=plain["message"]["content"])
    assert plain.message.content == (await client.query(photo, QUESTION)).answer
    assert plain.finish_reason == plain["finish_reason"] == "stop"
    assert plain.request_id == plain.raw["id"]
    usage = plain.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 729
    stream = await client.chat(messages, stream=True)
    assert isinstance(stream, md.ChatStream)
    pieces = [piece async for piece in stream["message"]]
    assert len(pieces) > 1
    assert "".join(pieces) == plain.message.content
    assert stream.completed
    assert stream.request_id.startswith("chatcmpl-")
    assert stream.finish_reason == plain.finish_reason
    assert stream.usage == stream["usage"] == plain.usage
    assert stream.reasoning is plain.reasoning is None


@pytest.mark.parametrize("part", PARTS)
async def test_picture_goes_into_a_chat_in_any_form(simulator, client, photo, part):
    image = await client.encode_image(photo)
    with Image.open(photo) as pillow, photo.open("rb") as file:
        forms = [photo, photo.read_bytes(), bytearray(photo.read_bytes()), image, file]
        parts = [*map(PARTS[part], [*forms, image.image_url][: 5 if part == "bare" else 6])]
        as_text = {"type": "text", "text": QUESTION}
        await client.chat([{"role": "user", "content": [*parts, QUESTION]}])
        await client.chat([{"role": "user", "content": [PARTS[part](pillow), as_text]}])
    first, second = (request.body["messages"][0]["content"] for request in simulator.requests)
    assert first == [{"type": "image_url", "image_url": {"url": image.image_url}}] * len(parts) + [
        as_text
    ]
    assert second[0]["image_url"]["url"].startswith("data:image/")
    assert second[1:] == [as_text]


async def test_answer_goes_back_into_the_conversation_as_it_is(simulator, client, photo):
    messages = [{"role": "user", "content": [photo, "What is this?"]}]
    first = await client.chat(messages, reasoning=True)
    await client.chat([*messages, first.message, {"role": "user", "content": QUESTION}])
    said = simulator.requests[1].body["messages"][1]
    assert said == {"role": "assistant", "content": first.message.content}
    assert messages[0]["content"][0] is photo  # the caller's own list is left alone


@streamed_or_not
async def test_chat_says_that_it_ran_out_of_tokens_and_thinks_where_it_is_asked_to(
    client, photo, stream
):
    messages = [{"role": "user", "content": [photo, QUESTION]}]
    answer = await client.chat(messages, settings={"max_tokens": 2}, stream=stream)
    if stream:
        assert len((await answer.text()).split()) == 2
    assert answer.finish_reason == "length"

    answer = await client.chat(messages, reasoning=True, stream=stream)
    text = await answer.text() if stream else answer.message.content
    assert text == (await client.chat(messages, reasoning=False)).message.content
    assert "I measure" in answer.reasoning.text
    if not stream:
        assert answer.message.reasoning == answer["message"]["reasoning"] == answer.reasoning.text


async def test_chat_stream_shows_its_thoughts_as_they_come(client, photo):
    messages = [{"role": "user", "content": [photo, QUESTION]}]
    async with client.chat(messages, reasoning=True, stream=True) as stream:
        events = [event async for event in stream.events]
    kinds = [type(event) for event in events]
    thoughts = kinds.count(md.ReasoningEvent)
    assert kinds == [
        *[md.ReasoningEvent] * thoughts,
        *[md.ChunkEvent] * (len(events) - thoughts - 2),
        md.MetricsEvent,
        md.FinalEvent,
    ]
    thought = "".join(event.text for event in events if isinstance(event, md.ReasoningEvent))
    assert thought == stream.reasoning.text
    assert "".join(event.chunk for event in events) == stream.text_so_far
    assert events[-2].metrics == dict(stream.usage)


SPAN = {"start_idx": 0, "end_idx": 3, "points": [[0.25, 0.75]]}
GROUNDING = [md.Grounding(0, 3, [[0.25, 0.75]])]
THOUGHTS = {
    "reasoning": ({"reasoning": "Two boats."}, ()),
    "reasoning_content": ({"reasoning_content": "Two boats."}, ()),
    "reasoning_details": (
        {"reasoning_details": {"text": "Two boats.", "grounding": [SPAN]}},
        GROUNDING,
    ),
    "apart": (  # the types of the official client, moondream 2.6.1
        {"reasoning": "Two boats.", "reasoning_details": {"grounding": [SPAN]}},
        GROUNDING,
    ),
    "pieces": (
        {
            "reasoning": "Two boats.",
            "reasoning_details": [
                {"type": "reasoning.text", "text": "Two "},
                {"type": "reasoning.text", "text": "boats."},
            ],
        },
        (),
    ),
}


ASKED = [{"role": "user", "content": "How many?"}]
DONE = b"data: [DONE]\n\n"


def event(body):
    return f"data: {json.dumps(body)}\n\n".encode()


def delta(said, **choice):
    """Return an event of a chat."""
    return event({"id": "c-1", "choices": [{"index": 0, "delta": said, **choice}]})


def streaming(*events):
    return STREAM_HEAD + in_chunks(*events)


async def both_ways(body, *events):
    """Return the plain answer of a server, and its stream, read to the end."""
    async with canned(whole(body), streaming(*events)) as (client, _):
        plain = await client.chat(ASKED)
        stream = await client.chat(ASKED, stream=True)
        assert await stream.text() == plain.message.content
        assert stream.finish_reason == plain.finish_reason
    return plain, stream


@pytest.mark.parametrize("before", [(), ("Two ", "boats.")], ids=["alone", "after its pieces"])
async def test_a_whole_message_in_a_stream_is_its_text_once(before):
    body = {"choices": [{"message": {"content": "Two boats."}, "finish_reason": "stop"}]}
    pieces = [delta({"content": each}) for each in before]
    plain, _ = await both_ways(body, *pieces, event(body), DONE)
    assert (plain.message.content, plain.finish_reason) == ("Two boats.", "stop")


async def test_the_servers_own_id_of_a_request_goes_before_the_messages():
    body = {"id": "c-1", "request_id": 42, "choices": [{"message": {"content": "Two."}}]}
    last = event({"id": "c-1", "request_id": 42, "choices": [{"delta": {}}]})
    plain, stream = await both_ways(body, delta({"content": "Two."}), last, DONE)
    assert plain.request_id == stream.request_id == "42"
    assert (await stream.result()).request_id == "42"


@pytest.mark.parametrize("kind", THOUGHTS)
async def test_thoughts_are_found_under_each_of_their_names(kind):
    said, grounding = THOUGHTS[kind]
    body = {"choices": [{"message": {"content": "Two.", **said}, "finish_reason": "stop"}]}
    stop = delta({}, finish_reason="stop")
    plain, stream = await both_ways(body, delta(said), delta({"content": "Two."}), stop, DONE)
    assert plain.message.reasoning == "Two boats."
    assert plain.reasoning == stream.reasoning == md.Reasoning("Two boats.", grounding)


async def test_chat_that_spent_all_its_tokens_on_thinking_has_an_empty_answer():
    said = {"role": "assistant", "content": None, "reasoning": "Well,"}
    body = {"choices": [{"message": said, "finish_reason": "length"}]}
    plain, stream = await both_ways(body, delta(said), delta({}, finish_reason="length"), DONE)
    assert (plain.message.content, plain.finish_reason) == ("", "length")
    assert plain.reasoning == stream.reasoning == md.Reasoning("Well,")


ANSWER = [delta({"role": "assistant", "content": "Two "}), delta({"content": "boats."})]
STOP = delta({}, finish_reason="stop")
USAGE = {"prompt_tokens": 740, "completion_tokens": 2, "total_tokens": 742}
USED = event({"choices": [], "usage": USAGE})
ENDINGS = {
    "all": [STOP, USED, DONE],
    "no usage": [STOP, DONE],
    "no finish_reason": [DONE],
    "no [DONE]": [STOP],
    "usage and no [DONE]": [STOP, USED],
    "usage with the finish_reason": [
        event({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": USAGE}),
        DONE,
    ],
}


async def test_chat_stream_is_complete_with_its_marker_or_its_finish_reason():
    for ending, events in ENDINGS.items():
        async with canned(streaming(*ANSWER, *events)) as (client, _):
            stream = await client.chat(ASKED, stream=True)
            assert await stream.text() == "Two boats."
        assert stream.completed
        assert stream.request_id == "c-1"
        assert stream.finish_reason == (None if ending == "no finish_reason" else "stop")
        assert stream.usage == (md.Usage(**USAGE) if "usage" in str(events) else None)


async def test_chat_stream_that_ends_without_either_is_interrupted():
    for events in ([], [USED]):
        async with canned(streaming(*ANSWER, *events)) as (client, _):
            stream = await client.chat(ASKED, stream=True)
            with pytest.raises(md.StreamInterruptedError) as caught:
                await stream.text()
        assert caught.value.partial == "Two boats."


def user(*content):
    return [{"role": "user", "content": [*content]}]


# `test_requests.py` has many more.
BAD_CHATS = {
    "remote picture": {
        "messages": user(
            {"type": "image_url", "image_url": {"url": "https://example.com/a.jpg"}},
        )
    },
    "no picture": {"messages": user(b"none")},
    "missing file": {"messages": user({"type": "image", "image": "nowhere.jpg"})},
    "picture from the assistant": {
        "messages": [
            {"role": "assistant", "content": [{"type": "image", "image": b""}]},
            {"role": "user", "content": "?"},
        ]
    },
    "unknown part": {"messages": user({"type": "video"})},
    "unknown role": {"messages": [{"role": "tool", "content": "?"}]},
    "no question": {"messages": [{"role": "system", "content": "Be brief."}]},
    "text": {"messages": "How many?"},
    "none": {"messages": []},
    "stream": {"stream": "yes"},
    "reasoning": {"reasoning": 1},
    "max_tokens": {"settings": {"max_tokens": 0}},
    "settings": {"settings": "hot"},
    "model": {"model": ""},
}


@streamed_or_not
async def test_bad_chat_is_refused_before_any_request(simulator, client, stream):
    for bad in BAD_CHATS.values():
        with pytest.raises(md.RequestError):
            await client.chat(**{"messages": ASKED, "stream": stream, **bad})
    assert simulator.connections.accepted == 0
