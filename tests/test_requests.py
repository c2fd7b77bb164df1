"""Calls into requests: what is refused, and the JSON of what is not.

The fields are those of the cloud's documentation (m87-labs/md-docs at 2a396f8; chat:
16a19f4), the rules those of its engine's HTTP server (m87-labs/kestrel).
"""

import base64
import enum
import functools
import inspect
import json

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


@pytest.mark.parametrize(
    ("make", "arguments"),  # which go into the body as they are
    [
        *[(make, {}) for make in BARE],
        (caption, {**SETTINGS, "length": "short", "stream": True}),
        (query, {**SETTINGS, **REFS, "stream": True, "reasoning": False}),
        (query, {"settings": {}}),
        (detect, OBJECTS),
        (point, {**OBJECTS, **REFS}),
        (segment, {**SETTINGS, **REFS, "stream": True}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else value.__name__,
)
def test_the_body_has_what_was_given_and_nothing_else(make, arguments):
    request = make(**arguments)
    path, body = BARE[make]

    assert (request.method, request.path) == ("POST", path)
    assert sent(request) == {**body, **arguments}
    assert request.bearer is (make is chat)  # which takes its key as OpenAI does


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


def test_text_arrives_as_it_is():
    question = 'A "quoted"\\ line\n\u2028 é 茶 🍵 \x00 \x7f'

    assert sent(query(question=question))["question"] == question


def test_settings_that_are_not_known_here_are_passed_on():
    settings = {"repetition_penalty": 1.2, "stop": ["\n"], "nested": {"a": None}}

    assert sent(caption(settings=settings))["settings"] == settings


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


# -- pictures ------------------------------------------------------------------------------


def test_a_picture_stays_out_of_the_json_until_it_is_sent():
    request = caption()

    before, picture, after = request.parts()
    assert (before, picture.source) == (b'{"image_url":', PHOTO)
    assert after.startswith(b',"length":')


def test_a_call_without_a_picture_is_one_piece():
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
    st.recursive(st.text() | st.just(PHOTO), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
@pytest.mark.slow
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


@pytest.mark.parametrize("make", [caption, query, segment, chat])
def test_a_call_can_be_made_again_without_its_stream(make):
    request = make(stream=True)
    again = request.without_stream()

    assert (request.stream, again.stream) == (True, False)
    assert pictures(again) == pictures(request)
    kept = {key: value for key, value in sent(again).items() if key != "stream_options"}
    assert kept == {
        key: False if key == "stream" else value
        for key, value in sent(request).items()
        if key != "stream_options"
    }
    for name in ("skill", "path", "method", "bearer", "at_root"):
        assert getattr(again, name) == getattr(request, name)


def test_usage_is_asked_for_only_with_a_stream():
    assert "stream_options" not in sent(chat(stream=True).without_stream())


@pytest.mark.parametrize("make", [detect, point])
def test_what_can_not_stream_does_not(make):
    assert not make().stream


# -- what is refused -----------------------------------------------------------------------

YES_OR_NO = ["true", "false", 1, 0, None, [], Odd()]
NOT_TEXT = [None, "", " ", "\n\t", 5, b"boat", ["boat"], Odd()]
NUMBERS = [float("nan"), float("inf"), "1", None, True, [1], 1j]

REFUSED = [
    # (arguments, what the message says), for each call below
    *[(caption, {"length": x}, "length must be") for x in ("tiny", "", None, 5, ["short"], {})],
    *[
        (make, {"stream": x}, "stream must be True or False")
        for make in (caption, query, segment, chat)
        for x in YES_OR_NO
    ],
    *[
        (make, {"reasoning": x}, "reasoning must be True or False")
        for make in (query, chat)
        for x in YES_OR_NO
        if x is not None
    ],
    *[(make, {"image": None}, "needs an image") for make in (caption, detect, point, segment)],
    *[(query, {"question": x}, "question must be a string that is not empty") for x in NOT_TEXT],
    *[
        (make, {"object": x}, "object must be a string that is not empty")
        for make in (detect, point, segment)
        for x in NOT_TEXT
    ],
    *[
        (make, {"model": x}, "model must be a string that is not empty")
        for make in (caption, query, detect, point, segment, chat)
        for x in NOT_TEXT
        if x is not None
    ],
    *[
        (make, {"settings": x}, "settings must be a mapping")
        for make in (caption, query, detect, point, segment, chat)
        for x in ("temperature=1", 5, [("temperature", 1)], Odd())
    ],
    *[
        (caption, {"settings": {name: x}}, f"settings['{name}'] must be a number")
        for name in ("temperature", "top_p")
        for x in (-1, -0.001, -(10**400), *NUMBERS)
    ],
    *[
        (caption, {"settings": {"top_p": x}}, "settings['top_p'] must be a number over 0")
        for x in (0, 0.0, 1.001, 2, 10**400)
    ],
    *[
        (make, {"settings": {name: x}}, f"settings['{name}'] must be a whole number")
        for make in (detect, chat)
        for name in ("max_tokens", "max_objects")
        for x in (0, -1, 1.0, 2.5, *NUMBERS)
    ],
    (query, {"image": None, "spatial_refs": [[0.5, 0.5]]}, "needs an image"),
    *[
        (make, {"spatial_refs": x}, "must be a sequence")
        for make in (query, point, segment)
        for x in (5, 0.5, [5], [0.25, 0.5], Odd())
    ],
    *[
        (make, {"spatial_refs": [x]}, "a spatial ref is [x, y] or [x_min, y_min, x_max, y_max]")
        for make in (query, point, segment)
        for x in (
            [],
            [0.5],
            [0.1, 0.2, 0.3],
            [0.1] * 5,
            [-0.1, 0.5],
            [0.5, 1.1],
            [float("nan"), 0.5],
            ["0.5", "0.5"],
            [True, False],
            [None, None],
            "ab",
            [[0.1], [0.2]],
        )
    ],
    *[
        (query, {"spatial_refs": [x]}, "corners the wrong way round")
        for x in ([0.6, 0.1, 0.5, 0.2], [0.1, 0.3, 0.5, 0.2])
    ],
]


@pytest.mark.parametrize(
    ("make", "arguments", "says"),
    REFUSED,
    ids=[f"{make.__name__} {arguments!r:.60}" for make, arguments, _ in REFUSED],
)
def test_bad_arguments_are_refused_with_their_name(make, arguments, says):
    with pytest.raises(RequestError) as caught:
        make(**arguments)

    assert says in caught.value.message


DEEP = functools.reduce(lambda nested, _: [nested], range(100_000), [])
ODD = [
    pytest.param({"settings": {"extra": object()}}, id="an object"),
    pytest.param({"settings": {"extra": "\ud800"}}, id="half a character"),
    pytest.param({"settings": {"extra": {None: 1}}}, id="a key that is no string"),
    pytest.param({"settings": {"extra": 10**5000}}, id="more digits than Python writes"),
    pytest.param({"settings": {"extra": DEEP}}, id="nested too deeply"),
    pytest.param({"question": "How many \ud83c?"}, id="half a character in a question"),
]


@pytest.mark.parametrize("arguments", ODD)
def test_what_json_can_not_say_is_refused(arguments):
    with pytest.raises(RequestError, match=r"^The request can't be sent as JSON: "):
        query(**arguments).parts()


def user(content):
    return [{"role": "user", "content": content}]


HAS_A_ROLE = "messages[0] must have a role"
CONVERSATIONS = [
    *[(x, "messages must be a list") for x in ("Hello", b"Hello", 5, None, user("Hello")[0])],
    ([], "messages must not be empty"),
    *[([x], HAS_A_ROLE) for x in ("Hello", None, {}, {"role": "user"}, {"content": "Hello"})],
    *[([{"role": x, "content": "Hello"}], HAS_A_ROLE) for x in ("bot", ["user"])],
    *[
        ([{"role": x, "content": "Hello"}], "the last of the messages")
        for x in ("assistant", "system")
    ],
    (
        [*user("Hi"), {"role": "system", "content": "Be short."}],
        "messages[1]: a system message can only be the first",
    ),
    *[(user(x), "messages[0]: content must be") for x in (None, 5, b"Hi", {"type": "text"})],
    *[
        (user(blank), "messages[0]: content must not be empty")
        for blank in ("", " \n", [], [""], [{"type": "text", "text": " "}, "\t"])
    ],
    *[
        (user([x]), "messages[0], part 0 must be text, a picture")
        for x in (
            {},
            None,
            {"type": "text"},
            {"type": "image"},
            {"type": ["text"]},
            {"type": "image_url", "image_url": {}},
        )
    ],
    (user(["a", {"type": "image_url"}]), "part 1 must be text"),
    (
        [
            {"role": "assistant", "content": [{"type": "image", "image": PHOTO}]},
            *user("Hi"),
        ],
        "messages[0], part 0: only the user's messages can have pictures",
    ),
]


@pytest.mark.parametrize(
    ("messages", "says"), CONVERSATIONS, ids=[f"{messages!r:.70}" for messages, _ in CONVERSATIONS]
)
def test_conversations_that_break_the_rules_of_the_engine_are_refused(messages, says):
    with pytest.raises(RequestError) as caught:
        chat(messages=messages)

    assert says in caught.value.message


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


def test_places_that_were_found_can_be_asked_about():
    request = query(spatial_refs=[Point(0.25, 0.5), Region(0, 0.1, 0.5, 1)])

    assert sent(request)["spatial_refs"] == [[0.25, 0.5], [0, 0.1, 0.5, 1]]
