"""Calls into requests: what is refused, and the JSON of what is not.

The fields are those of the cloud's documentation (m87-labs/md-docs at 2a396f8; chat:
16a19f4), the rules those of its engine's HTTP server (m87-labs/kestrel).
"""

import base64
import enum
import functools
import inspect
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moondream_async._protocol.requests import (
    Picture,
    Request,
    caption_request,
    chat_request,
    detect_request,
    point_request,
    query_request,
    segment_request,
)
from moondream_async.errors import RequestError
from moondream_async.results import Point, Region
from moondream_async.types import EncodedImage


class Odd:
    """Something that is nothing, with a repr that is the same in every process."""

    def __repr__(self):
        return "an odd thing"


PHOTO = Odd()  # what a picture is given as is nobody's business here
ENCODED = EncodedImage(b"\xff\xd8photo", "image/jpeg", 4, 3)
OTHER = EncodedImage(b"GIF89a", "image/gif", 1, 1)


NOTHING_SAID = dict.fromkeys(("settings", "model", "reasoning", "spatial_refs")) | {"stream": False}


def asking(build, **usual):
    """A call of a skill with its usual arguments, unless others are given."""
    known = inspect.signature(build).parameters
    usual = {name: value for name, value in (NOTHING_SAID | usual).items() if name in known}

    def ask(**given):
        return build(**(usual | given))

    ask.__name__ = build.__name__.removesuffix("_request")
    return ask


HELLO = [{"role": "user", "content": "Hello"}]

caption = asking(caption_request, image=PHOTO, length="normal")
query = asking(query_request, image=PHOTO, question="How many?")
detect = asking(detect_request, image=PHOTO, object="boat")
point = asking(point_request, image=PHOTO, object="boat")
segment = asking(segment_request, image=PHOTO, object="boat")
chat = asking(chat_request, messages=HELLO)


def data_url(image):
    return f"data:{image.media_type};base64,{base64.b64encode(image.data).decode()}"


def sent(request, *images):
    """The body as the server sees it, with each picture as a data URL in its place."""
    left = list(images or [ENCODED] * len(pictures(request)))
    parts = [
        json.dumps(data_url(left.pop(0))).encode() if isinstance(part, Picture) else part
        for part in request.parts()
    ]
    return json.loads(b"".join(parts))


def pictures(request):
    return [part.source for part in request.parts() if isinstance(part, Picture)]


URL = data_url(ENCODED)


# -- what is sent --------------------------------------------------------------------------


BARE = {  # the address, and the body of a call with no more than it needs
    caption: ("/caption", {"image_url": URL, "length": "normal", "stream": False}),
    query: ("/query", {"image_url": URL, "question": "How many?", "stream": False}),
    detect: ("/detect", {"image_url": URL, "object": "boat"}),
    point: ("/point", {"image_url": URL, "object": "boat"}),
    segment: ("/segment", {"image_url": URL, "object": "boat", "stream": False}),
    chat: (
        "/chat/completions",
        {"model": "moondream3-preview", "messages": HELLO, "stream": False},
    ),
}
SETTINGS = {"settings": {"temperature": 0, "top_p": 1, "max_tokens": 9}, "model": "m/f@3"}
OBJECTS = {"settings": {"max_objects": 5}, "model": "moondream3.1-9B-A2B"}
REFS = {"spatial_refs": [[0.25, 1], [0.5, 0.5, 0.5, 0.5]]}


WITH_MORE = [  # which goes into the body as it is
    *[(make, {}) for make in BARE],
    (caption, {**SETTINGS, "length": "short", "stream": True}),
    (query, {**SETTINGS, **REFS, "stream": True, "reasoning": False}),
    (query, {"settings": {}}),
    (detect, OBJECTS),
    (point, {**OBJECTS, **REFS}),
    (segment, {**SETTINGS, **REFS, "stream": True}),
    (caption, {"settings": {"repetition_penalty": 1.2, "nested": {"a": None}}}),  # unknown here
    (query, {"question": 'A "quoted"\\ line\n\u2028 é 茶 🍵 \x00 \x7f'}),
]


def test_the_body_has_what_was_given_and_nothing_else():
    for make, arguments in WITH_MORE:
        request = make(**arguments)
        path, body = BARE[make]

        assert (request.method, request.path) == ("POST", path)
        assert sent(request) == {**body, **arguments}
        assert request.bearer is (make is chat)  # which takes its key as OpenAI does
        assert request.stream is arguments.get("stream", False)


def test_a_chat_says_its_settings_in_openais_words():
    settings = {"temperature": 0.5, "max_tokens": 99, "seed": 7}
    request = chat(stream=True, reasoning=True, settings=settings, model="m")

    assert sent(request) == {
        "model": "m",
        "messages": HELLO,
        "stream": True,
        "stream_options": {"include_usage": True},
        "reasoning": True,
        "temperature": 0.5,
        "max_completion_tokens": 99,
        "seed": 7,
    }


def test_settings_are_taken_as_they_are_at_the_call():
    settings = {"temperature": 0.5}
    request = caption(settings=settings)
    settings["temperature"] = 1.5

    assert sent(request)["settings"] == {"temperature": 0.5}
    assert sent(request.without_stream())["settings"] == {"temperature": 0.5}


class Float64(float):
    """A float of another library's, as numpy's."""


class Word(str):
    __slots__ = ()


class Skill(enum.StrEnum):
    BOAT = "boat"


def test_numbers_and_strings_of_other_libraries_are_numbers_and_strings():
    request = query(
        question=Word("How many?"),
        spatial_refs=[(Float64(0.25), Float64(0.5))],
        settings={"temperature": Float64(0.75)},
    )

    body = sent(request)

    assert body["question"] == "How many?"
    assert body["spatial_refs"] == [[0.25, 0.5]]
    assert body["settings"] == {"temperature": 0.75}
    assert sent(detect(object=Skill.BOAT))["object"] == "boat"
    found = query(spatial_refs=[Point(0.25, 0.5), Region(0, 0.1, 0.5, 1)])
    assert sent(found)["spatial_refs"] == [[0.25, 0.5], [0, 0.1, 0.5, 1]]


# -- pictures ------------------------------------------------------------------------------


def test_a_picture_stays_out_of_the_json_until_it_is_sent():
    before, picture, after = caption().parts()
    assert (before, picture.source) == (b'{"image_url":', PHOTO)
    assert after.startswith(b',"length":')
    request = query(image=None)
    assert [type(part) for part in request.parts()] == [bytes]
    assert sent(request) == {"question": "How many?", "stream": False}


def test_pictures_of_a_chat_come_out_each_in_its_place():
    one, two, three = object(), object(), object()

    def conversation(first, between, second, third):
        asked = [third, {"type": "text", "text": "this?"}]
        return [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [first, between, second]},
            {"role": "assistant", "content": "Hm."},
            {"role": "user", "content": asked},
        ]

    def picture(image):
        return {"type": "image_url", "image_url": {"url": image}}

    given = conversation(picture(one), "and", {"type": "image", "image": two}, three)
    request = chat(messages=given)

    first, second = picture(data_url(ENCODED)), picture(data_url(OTHER))
    assert pictures(request) == [one, two, three]
    assert sent(request, ENCODED, OTHER, ENCODED)["messages"] == conversation(
        first, {"type": "text", "text": "and"}, second, first
    )


@given(
    st.recursive(
        st.text(max_size=3) | st.just(PHOTO),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
        max_leaves=8,
    )
)
def test_pictures_are_spliced_in_wherever_they_are(value):
    def with_pictures_as(picture, value):
        if isinstance(value, list):
            return [with_pictures_as(picture, each) for each in value]
        if isinstance(value, dict):
            return {key: with_pictures_as(picture, each) for key, each in value.items()}
        return picture if value is PHOTO else value

    request = Request("query", "/query", {"value": with_pictures_as(Picture(PHOTO), value)})

    assert sent(request) == {"value": with_pictures_as(URL, value)}


# -- the same without a stream -------------------------------------------------------------


def test_a_call_can_be_made_again_without_its_stream():
    for make in (caption, query, segment, chat):
        request = make(stream=True)
        again = request.without_stream()

        assert (request.stream, again.stream) == (True, False)
        assert pictures(again) == pictures(request)
        body = sent(request)
        body.pop("stream_options", None)  # which ask for a chat's usage, and need a stream
        assert sent(again) == {**body, "stream": False}
        for name in ("skill", "path", "method", "bearer", "at_root"):
            assert getattr(again, name) == getattr(request, name)


# -- what is refused -----------------------------------------------------------------------

TEXT = "must be a string that is not empty"
YES_OR_NO = "must be True or False"
WHOLE = "must be a whole number"
NO_REF = "a spatial ref is [x, y] or [x_min, y_min, x_max, y_max]"
NOT_BOOLEAN = ["true", "false", 1, 0, [], Odd()]
NOT_TEXT = ["", " ", "\n\t", 5, b"boat", ["boat"], Odd()]
NOT_NUMBERS = [float("nan"), float("inf"), "1", None, True, [1], 1j]
REFUSED = [  # a call, an argument, what it can't be, and what the message says of it
    (caption, "length", ["tiny", "", None, 5, ["short"], {}], "length must be"),
    (caption, "stream", [*NOT_BOOLEAN, None], f"stream {YES_OR_NO}"),
    (query, "reasoning", NOT_BOOLEAN, f"reasoning {YES_OR_NO}"),
    (query, "question", [*NOT_TEXT, None], f"question {TEXT}"),
    (detect, "object", [*NOT_TEXT, None], f"object {TEXT}"),
    (caption, "model", NOT_TEXT, f"model {TEXT}"),
    (query, "settings", ["a=1", 5, [("a", 1)], Odd()], "settings must be a mapping"),
    (query, "spatial_refs", [5, 0.5, [5], [0.25, 0.5], Odd()], "must be a sequence"),
    (query, "spatial_refs", [[[0.6, 0.1, 0.5, 0.2]], [[0.1, 0.3, 0.5, 0.2]]], "wrong way round"),
    (query, "spatial_refs", [[[]], [[0.5]], [[0.1, 0.2, 0.3]], [[0.1] * 5], ["ab"]], NO_REF),
    (query, "spatial_refs", [[[-0.1, 0.5]], [[0.5, 1.1]], [[float("nan"), 0.5]]], NO_REF),
    (query, "spatial_refs", [[["0.5"] * 2], [[True, False]], [[None] * 2], [[[0.1]] * 2]], NO_REF),
    # The same is refused wherever it can be said.
    *[(make, "image", [None], "needs an image") for make in (caption, detect, point, segment)],
    *[(make, "object", [""], f"object {TEXT}") for make in (point, segment)],
    *[(make, "stream", [1], f"stream {YES_OR_NO}") for make in (query, segment, chat)],
    (chat, "reasoning", [1], f"reasoning {YES_OR_NO}"),
    *[(make, "model", [""], f"model {TEXT}") for make in (query, detect, point, segment, chat)],
    *[(make, "settings", [5], "a mapping") for make in (caption, detect, point, segment, chat)],
    *[(make, "spatial_refs", [5], "must be a sequence") for make in (point, segment)],
    *[(make, "spatial_refs", [[[0.5]]], NO_REF) for make in (point, segment)],
]
BAD_SETTINGS = [
    (caption, "temperature", [-1, -0.001, -(10**400), *NOT_NUMBERS], "must be a number"),
    (caption, "top_p", [-1, -0.001, -(10**400), *NOT_NUMBERS], "must be a number"),
    (caption, "top_p", [0, 0.0, 1.001, 2, 10**400], "must be a number over 0"),
    (detect, "max_tokens", [0, -1, 1.0, 2.5, *NOT_NUMBERS], WHOLE),
    (detect, "max_objects", [0, -1, 1.0, 2.5, *NOT_NUMBERS], WHOLE),
    (chat, "max_tokens", [0], WHOLE),
]


def test_bad_arguments_are_refused_with_their_name():
    refused = [(make, {name: x}, says) for make, name, odd, says in REFUSED for x in odd]
    refused += [
        (make, {"settings": {name: x}}, f"settings['{name}'] {says}")
        for make, name, odd, says in BAD_SETTINGS
        for x in odd
    ]
    refused.append((query, {"image": None, "spatial_refs": [[0.5, 0.5]]}, "needs an image"))
    for make, arguments, says in refused:
        with pytest.raises(RequestError, match=re.escape(says)):
            pytest.fail(f"{make.__name__} {arguments!r:.60} made {make(**arguments)}")


DEEP = functools.reduce(lambda nested, _: [nested], range(100_000), [])
CAN_NOT_BE_SAID = {
    "an object": {"settings": {"extra": object()}},
    "half a character": {"settings": {"extra": "\ud800"}},
    "a key that is no string": {"settings": {"extra": {None: 1}}},
    "more digits than Python writes": {"settings": {"extra": 10**5000}},
    "nested too deeply": {"settings": {"extra": DEEP}},
    "half a character in a question": {"question": "How many \ud83c?"},
}


def test_what_json_can_not_say_is_refused():
    for name, arguments in CAN_NOT_BE_SAID.items():
        with pytest.raises(RequestError, match=r"^The request can't be sent as JSON: "):
            pytest.fail(f"{name} became {query(**arguments).parts()}")


def user(content):
    return [{"role": "user", "content": content}]


HAS_A_ROLE = "messages[0] must have a role"
SYSTEM = {"role": "system", "content": "Be short."}
BLANK = ["", " \n", [], [""], [{"type": "text", "text": " "}, "\t"]]
NO_PARTS = [{}, None, {"type": "text"}, {"type": "image"}, {"type": ["text"]}]
NO_PARTS.append({"type": "image_url", "image_url": {}})
CONVERSATIONS = [
    *[(x, "messages must be a list") for x in ("Hello", b"Hello", 5, None, user("Hello")[0])],
    ([], "messages must not be empty"),
    *[([x], HAS_A_ROLE) for x in ("Hello", None, {}, {"role": "user"}, {"content": "Hello"})],
    *[([{"role": x, "content": "Hello"}], HAS_A_ROLE) for x in ("bot", ["user"])],
    ([{"role": "assistant", "content": "Hello"}], "the last of the messages"),
    ([SYSTEM], "the last of the messages"),
    ([*user("Hi"), SYSTEM], "messages[1]: a system message can only be the first"),
    *[(user(x), "messages[0]: content must be") for x in (None, 5, b"Hi", {"type": "text"})],
    *[(user(blank), "messages[0]: content must not be empty") for blank in BLANK],
    *[(user([x]), "messages[0], part 0 must be text, a picture") for x in NO_PARTS],
    (user(["a", {"type": "image_url"}]), "part 1 must be text"),
    (
        [{"role": "assistant", "content": [{"type": "image", "image": PHOTO}]}, *user("Hi")],
        "messages[0], part 0: only the user's messages can have pictures",
    ),
]


def test_conversations_that_break_the_rules_of_the_engine_are_refused():
    for messages, says in CONVERSATIONS:
        with pytest.raises(RequestError, match=re.escape(says)):
            pytest.fail(f"{messages!r:.70} made {chat(messages=messages)}")


@given(
    length=st.text() | st.integers(),
    stream=st.booleans() | st.integers(),
    settings=st.none()
    | st.dictionaries(
        st.sampled_from(["temperature", "top_p", "max_tokens", "max_objects", "extra"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    ),
    refs=st.none()
    | st.lists(st.lists(st.none() | st.integers() | st.floats() | st.text()) | st.integers()),
)
def test_any_arguments_make_a_request_or_a_request_error(length, stream, settings, refs):
    for make, arguments in (
        (caption, {"length": length, "stream": stream, "settings": settings}),
        (point, {"spatial_refs": refs, "settings": settings}),
    ):
        try:
            request = make(**arguments)
        except RequestError:
            continue
        assert request.path in ("/caption", "/point")
        sent(request)
