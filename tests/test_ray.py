"""The Ray Data stage by itself: what it refuses, what it reads, and what it gives."""

import asyncio
import gc
import pickle
import threading

import numpy as np
import pytest
from conftest import open_sockets
from reachable import where_in

import moondream_async as md
from moondream_async.integrations.ray import Secret, SkillStage, ask

KEY = "a-key-that-was-passed"


# -- arguments ------------------------------------------------------------------------


class Untouched:
    """No dataset: whatever is done with it fails."""


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"skill": "segment"}, "skill must be one of"),
        ({"skill": "caption", "length": "huge"}, "length must be"),
        ({"skill": "caption", "question": "Why?"}, "caption takes no question"),
        ({"skill": "caption", "text_column": "q"}, "text_column"),
        ({"skill": "query"}, "query needs question= or text_column="),
        ({"skill": "query", "question": "Why?", "text_column": "q"}, "text_column"),
        ({"skill": "query", "question": " "}, "question must be"),
        ({"skill": "detect", "object": ""}, "object must be"),
        ({"skill": "point", "object": "x", "settings": {"max_objects": 0}}, "max_objects"),
        ({"image_column": ""}, "image_column"),
        ({"image_column": None}, "image_column"),
        ({"prefix": 3}, "prefix"),
        ({"actors": 0}, "actors"),
        ({"batch_size": 0}, "batch_size"),
        ({"rate_limit": 0}, "rate_limit"),
        ({"rate_limit": "fast"}, "rate_limit"),
        ({"max_connections": 0}, "max_connections"),
        ({"timeout": "3"}, "timeout"),
        ({"endpoint": "ftp://x"}, "endpoint"),
        ({"endpoint": "http://example.com/v1", "api_key": "k"}, "plain http"),
        ({"no_such": 1}, "takes no no_such"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_the_dataset_is_touched(arguments, reason):
    with pytest.raises(md.RequestError, match=reason):
        ask(Untouched(), **arguments)


def test_stage_takes_no_plain_string_for_a_key_and_does_not_show_it():
    with pytest.raises(md.RequestError, match="Secret") as caught:
        SkillStage(api_key=KEY)
    assert KEY not in str(caught.value)


def test_stage_without_a_key_for_the_cloud_is_refused():
    with pytest.raises(md.RequestError, match="needs an API key"):
        SkillStage()


def test_secret_is_shown_nowhere_and_travels():
    secret = Secret(KEY)
    shown = f"{secret} {secret!r} {[secret]} {vars(type(secret))} {secret!s}"
    assert KEY not in shown
    assert not isinstance(secret, str)
    copy = pickle.loads(pickle.dumps(secret))
    assert copy == secret
    assert hash(copy) == hash(secret)
    assert copy.reveal() == KEY


# -- the stage by itself --------------------------------------------------------------


@pytest.fixture
def pa():
    return pytest.importorskip("pyarrow", reason="needs: python -m pip install '.[ray]'")


async def captions_of(pa, simulator, pictures, **options):
    stage = SkillStage(endpoint=simulator.endpoint, **options)
    table = await stage(pa.table({"image": pictures}))
    return table.to_pylist()


def as_path(photo):
    return str(photo)


def as_bytes(photo):
    return photo.read_bytes()


def as_stored_by_hugging_face(photo):
    return {"bytes": photo.read_bytes(), "path": None}


def as_path_stored_by_hugging_face(photo):
    return {"bytes": None, "path": str(photo)}


@pytest.mark.parametrize(
    "form", [as_path, as_bytes, as_stored_by_hugging_face, as_path_stored_by_hugging_face]
)
async def test_pictures_are_read_from_columns_of_any_form(pa, simulator, client, photo, form):
    (row,) = await captions_of(pa, simulator, [form(photo)])
    expected = await client.caption(photo)
    assert row["caption"] == expected.caption
    assert row["finish_reason"] == expected.finish_reason
    assert row["request_id"]
    assert row["error_type"] is row["error_message"] is None


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what Ray warns of is its own
@pytest.mark.parametrize("sizes", [[20, 20, 20], [20, 21, 22]], ids=["of one size", "of several"])
async def test_arrays_are_read_from_columns_as_ray_makes_them(pa, simulator, sizes):
    tensors = pytest.importorskip("ray.data.extensions", reason="needs: pip install '.[ray]'")
    pictures = [np.full((height, 30, 3), 200, np.uint8) for height in sizes]
    rows = await captions_of(pa, simulator, tensors.TensorArray(pictures).__arrow_array__())
    for row, height in zip(rows, sizes, strict=True):
        assert f"30\N{MULTIPLICATION SIGN}{height} PNG picture" in row["caption"]


async def test_bad_pictures_are_errors_in_their_rows(pa, simulator, photo, tmp_path):
    cut = photo.read_bytes()[:1000]
    pictures = [photo.read_bytes(), b"no picture", None, cut, photo.read_bytes()]
    rows = await captions_of(pa, simulator, pictures)
    assert [row["error_type"] for row in rows] == [None, *["ImageError"] * 3, None]
    assert [row["caption"] is None for row in rows] == [False, True, True, True, False]
    assert all(row["error_message"] for row in rows[1:4])
    (row,) = await captions_of(pa, simulator, [str(tmp_path / "gone.jpg")])
    assert "does not exist" in row["error_message"]


async def test_failed_requests_are_errors_in_their_rows(pa, simulator, photo):
    simulator.faults.append("status=400")
    simulator.faults.append("status=503")
    rows = await captions_of(pa, simulator, [str(photo)] * 3, max_retries=0, max_connections=1)
    assert [row["error_type"] for row in rows] == ["BadRequestError", "ServerError", None]


async def test_every_batch_has_the_same_types_whatever_happened_in_it(pa, simulator, photo):
    stage = SkillStage("detect", object="shape", endpoint=simulator.endpoint)
    good = await stage(pa.table({"image": [str(photo)]}))
    bad = await stage(pa.table({"image": ["gone.jpg"]}))
    assert good.schema == bad.schema
    (box, *_) = good["objects"][0].as_py()
    assert box.keys() == {"x_min", "y_min", "x_max", "y_max"}
    assert bad["objects"][0].as_py() is None


async def test_questions_are_read_from_a_column(pa, simulator, client, photo):
    questions = ["Where is the red circle?", "How large is it?", None]
    stage = SkillStage("query", text_column="q", prefix="md_", endpoint=simulator.endpoint)
    table = await stage(pa.table({"image": [str(photo)] * 3, "q": questions}))
    assert table["md_answer"].to_pylist() == [
        *[(await client.query(photo, question)).answer for question in questions[:2]],
        None,
    ]
    assert table["md_error_type"].to_pylist() == [None, None, "RequestError"]


async def test_reasoning_is_a_column_where_it_was_asked_for(pa, simulator, photo):
    stage = SkillStage("query", question="How large?", reasoning=True, endpoint=simulator.endpoint)
    table = await stage(pa.table({"image": [str(photo)]}))
    assert table["reasoning"][0].as_py()


async def test_points_are_plain_data(pa, simulator, photo):
    stage = SkillStage("point", object="shape", endpoint=simulator.endpoint)
    table = await stage(pa.table({"image": [str(photo)]}))
    assert table["points"][0].as_py()[0].keys() == {"x", "y"}


async def test_no_column_is_lost(pa, simulator, photo):
    stage = SkillStage(endpoint=simulator.endpoint)
    with pytest.raises(md.RequestError, match=r"columns named caption already.*prefix="):
        await stage(pa.table({"image": [str(photo)], "caption": ["mine"]}))
    with pytest.raises(md.RequestError, match="no column 'image' among path"):
        await stage(pa.table({"path": [str(photo)]}))
    assert not simulator.requests


async def test_after_a_refused_key_nothing_more_is_sent(pa, photo):
    async with md.simulator.Simulator(api_key="another") as simulator:
        stage = SkillStage(api_key=Secret(KEY), endpoint=simulator.endpoint, max_connections=1)
        for _ in range(2):
            with pytest.raises(md.AuthenticationError, match="Invalid API key") as caught:
                await stage(pa.table({"image": [str(photo)] * 5}))
            assert where_in(caught.value, KEY) == []
            del caught  # it would keep the stage
        assert len(simulator.requests) == 1


async def test_cancelling_a_batch_drops_its_requests(pa, simulator, photo):
    simulator.faults.append("slow_start=3600,times=always")
    stage = SkillStage(endpoint=simulator.endpoint)
    batch = asyncio.ensure_future(stage(pa.table({"image": [str(photo)] * 3})))
    await simulator.wait_until(lambda: len(simulator.requests) == 3)
    batch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await batch
    await simulator.wait_until(lambda: all(each.disconnected for each in simulator.requests))


async def test_dropping_the_stage_closes_its_client_and_ends_its_thread(pa, simulator, photo):
    threads, sockets = set(threading.enumerate()), open_sockets()
    stage = SkillStage(endpoint=simulator.endpoint)
    await stage(pa.table({"image": [str(photo)]}))
    assert simulator.connections.open == 1
    started = {each for each in threading.enumerate() if each.name == "moondream"} - threads
    assert len(started) == 1
    del stage
    gc.collect()
    assert not any(each.is_alive() for each in started)
    await simulator.wait_until(lambda: simulator.connections.open == 0)
    assert len(open_sockets()) <= len(sockets)
