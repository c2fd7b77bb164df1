"""What nobody should send or pass, everywhere: an answer, or an error of ours.

JSON that no honest server sends is nested hundreds of levels deep, has numbers of hundreds
of digits, lists where ids belong, NaN, halves of surrogate pairs. What is an answer can be
shown and written down.
"""

import asyncio
import inspect
import itertools
import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from raw_server import STREAM_HEAD, RawServer, in_chunks, whole

import moondream_async as md
from moondream_async.batch.wire import BatchRequest
from moondream_async.cli.bulk.questions import Pending
from moondream_async.cli.bulk.sources import Found
from moondream_async.tuning.wire import TuningRequest

IMAGE = md.EncodedImage(b"\xff\xd8 as the server will not look", "image/jpeg", 8, 8)
MESSAGES = [{"role": "user", "content": "?"}]

ODD = [
    *(b"[" * 600 + b"]" * 600, b'{"a":' * 600 + b"1" + b"}" * 600, b"9" * 400, b"-" + b"9" * 400),
    *(b"1e308", b"1e999", b"NaN", b"-Infinity", b'"\\ud83d"', b'"\\ude00\\ud83d"', b"[[]]"),
    *(b'[["x"], {}]', b'{"": {}}', b"[1e308, -1e308]", b"true", b"null", b"0", b"-1", b'""'),
    b'"\\u0000"',
]
KEYS = [
    *("caption", "answer", "objects", "points", "path", "bbox", "choices", "message", "content"),
    *("request_id", "id", "finish_reason", "metrics", "usage", "reasoning", "error", "detail"),
    *("chunk", "completed", "type", "text", "grounding", "delta", "input_tokens", "x_min"),
    *("data", "models", "object", "status", "stats", "queue_size", "batches", "next_cursor"),
    *("has_more", "progress", "outputs", "index", "url", "created_at", "expires_at", "total"),
    *("finetunes", "finetune", "finetune_id", "name", "rank", "rollouts", "rewards", "request"),
    *("step", "applied", "kl", "checkpoints", "checkpoint", "expires_in", "line_index", "result"),
    *("x", "y", "x_max", "y_min", "y_max", "start_idx", "end_idx", "code", "uploadId", "fileId"),
]
GOOD = {
    "caption": b'"x"',
    "answer": b'"x"',
    "objects": b'[{"x_min": 0, "y_min": 0, "x_max": 1, "y_max": 1}]',
    "points": b'[{"x": 0, "y": 1}]',
    "path": b'"M 0 0"',
    "choices": b'[{"message": {"role": "assistant", "content": "x"}, "delta": {"content": "x"}}]',
    "id": b'"x"',
    "finetune_id": b'"x"',
    "batches": b'[{"id": "x"}]',
    "finetunes": b'[{"finetune_id": "x"}]',
    "checkpoints": b'[{"step": 1}]',
    "rollouts": b'[{"answer": "x"}]',
    "step": b"1",
    "url": b'"http://127.0.0.1:1/"',
    "completed": b"true",
}


def written(fields):
    return b"{%b}" % b", ".join(b'"%b": %b' % (k.encode(), v) for k, v in fields.items())


odd = st.recursive(
    st.sampled_from(ODD),
    lambda inner: (
        st.lists(inner, max_size=2).map(lambda each: b"[%b]" % b",".join(each))
        | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3).map(written)
    ),
    max_leaves=4,
)
bodies = st.dictionaries(st.sampled_from(KEYS), odd, min_size=1, max_size=4).map(
    lambda fields: written(GOOD | fields)
)


async def streamed(call):
    async with call as stream:
        async for event in stream.events:
            repr(event)
        return await stream.result()


async def first_of(pages):
    return await anext(aiter(pages), None)


CALLS = {
    "caption": lambda c: c.caption(IMAGE),
    "query": lambda c: c.query(IMAGE, "?"),
    "detect": lambda c: c.detect(IMAGE, "x"),
    "point": lambda c: c.point(IMAGE, "x"),
    "segment": lambda c: c.segment(IMAGE, "x"),
    "chat": lambda c: c.chat(MESSAGES),
    "caption-stream": lambda c: streamed(c.caption(IMAGE, stream=True)),
    "query-stream": lambda c: streamed(c.query(IMAGE, "?", stream=True)),
    "segment-stream": lambda c: streamed(c.segment(IMAGE, "x", stream=True)),
    "chat-stream": lambda c: streamed(c.chat(MESSAGES, stream=True)),
    "models": lambda c: c.models(),
    "health": lambda c: c.health(),
    "stats": lambda c: c.server_stats(),
    "batch": lambda c: c.batches.get("x"),
    "batches": lambda c: first_of(c.batches.list()),
    "results": lambda c: first_of(c.batches.results("x")),
    "upload": lambda c: c.batches.create([BatchRequest.caption(IMAGE)], model="m"),
    "finetune": lambda c: c.tuning.get("x"),
    "finetunes": lambda c: first_of(c.tuning.list()),
    "create": lambda c: c.tuning.create("x", rank=8),
    "rollouts": lambda c: c.tuning.rollouts("x", TuningRequest.query(IMAGE, "?")),
    "train": lambda c: c.tuning.train_step("x", [{"mode": "rl"}]),
    "log": lambda c: c.tuning.log_metrics("x", 1, {"a": 1.0}),
    "checkpoints": lambda c: first_of(c.tuning.list_checkpoints("x")),
    "save": lambda c: c.tuning.save_checkpoint("x"),
    "url": lambda c: c.tuning.checkpoint_url("x", 1),
    "bulk": lambda c: bulk(c),  # noqa: PLW0108 - it is defined below
}


async def bulk(client):
    """Have bulk take an answer, too: an error in it is a value, and sums go on."""
    async with client.bulk([IMAGE], "query", question="?") as run:
        async for each in run:
            pending = Pending(Found("x", "x"), {"asks": {"a": "?"}})
            repr((run.progress, f"{run.progress.tokens:,}"))
            json.dumps(pending.take("a", each))
            break
    return each.result


@pytest.fixture
async def played():
    """A client, and what its server answers."""
    body = [b""]

    async def play(peer):
        while True:
            request = await peer.request()
            if b'"stream":true' in request.body.replace(b" ", b""):
                event = b"data: " + body[0] + b"\n\n"
                await peer.send(STREAM_HEAD + in_chunks(event))
            else:
                await peer.send(whole(body[0]))

    async with (
        RawServer(play) as server,
        md.MoondreamClient(endpoint=server.endpoint, max_retries=0) as client,
    ):
        yield client, body


async def answered(client, call):
    """Have the answer shown and written down; return what escaped."""
    try:
        answer = await CALLS[call](client)
        repr(answer)
        json.dumps(getattr(answer, "raw", None)).encode()
        if isinstance(answer, dict):
            json.dumps(answer).encode()
    except md.MoondreamError as error:
        str(error).encode()
        repr(error)
    except Exception as error:  # noqa: BLE001 - which is what is looked for
        return call, error


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(hostile=bodies)
@example(hostile=written(GOOD | {"metrics": b'{"input_tokens": 1e308, "output_tokens": [1]}'}))
@example(hostile=written(GOOD | {"request_id": b"[[1]]", "usage": b"9" * 400}))
@example(hostile=written(GOOD | {"reasoning": b'{"text": "x", "grounding": [[1e308], {}]}'}))
async def test_hostile_json_is_an_answer_or_an_error_of_ours(played, hostile):
    client, body = played
    body[0] = hostile
    escaped = await asyncio.gather(*(answered(client, call) for call in CALLS))
    assert [each for each in escaped if each] == []


# -- arguments of a wrong kind --------------------------------------------------------

WRONG = [5, -1, float("nan"), object(), b"x", [], {}, ""]
NEEDED = {
    "image": IMAGE,
    "items": [IMAGE],
    "frames": [IMAGE],
    "messages": MESSAGES,
    "rank": 8,
    "step": 1,
    "metrics": {"a": 1.0},
    "groups": [{"mode": "rl"}],
    "question": "?",
    "url": "http://127.0.0.1:1/x",
    "request": TuningRequest.query(IMAGE, "?"),
}


def public_methods(*objects):
    """Yield what can be called, with the names of its parameters and what they need."""
    for each in objects:
        owner = each if inspect.isclass(each) else type(each)
        kinds = inspect.ismethod if inspect.isclass(each) else inspect.isroutine
        for name, _ in inspect.getmembers(owner, kinds):
            if not name.startswith("_") and name != "aclose":
                yield f"{owner.__name__}.{name}", getattr(each, name)


def parameters_of(function):
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = [each for each in inspect.signature(function).parameters.values() if each.kind in named]
    needed = {p.name: NEEDED.get(p.name, "x") for p in found if p.default is p.empty}
    return [p.name for p in found], needed


async def done(made):
    if inspect.isawaitable(made):
        made = await made
    if hasattr(made, "__aenter__"):
        async with made as entered:
            made = entered
            return await anext(aiter(made), None) if hasattr(made, "__aiter__") else made
    return await anext(aiter(made), None) if hasattr(made, "__aiter__") else made


async def test_argument_of_a_wrong_kind_is_an_error_of_ours_before_anything_is_sent(played):
    client, body = played
    body[0] = written(GOOD | {"status": b'"completed"'})
    several = public_methods(client, client.batches, client.tuning, BatchRequest, TuningRequest)
    functions = {"fetch_image": md.fetch_image, "Timeout": md.Timeout, **dict(several)}
    assert len(functions) > 30
    told = []
    for where, function in functions.items():
        names, needed = parameters_of(function)
        for name, value in itertools.product(names, WRONG):
            sent = client.stats().requests
            try:
                await done(function(**needed | {name: value}))
            except md.RequestError as error:
                if client.stats().requests > sent:
                    told.append((where, name, value, "was sent", error))
            except md.MoondreamError:
                pass  # of what came back: to this argument, the kind is right
            except Exception as error:  # noqa: BLE001 - which is what is looked for
                told.append((where, name, value, error))
    assert told == []
