"""Rows of pictures, asked about through Ray's stage and through Hugging Face's `map` alike."""

import pytest
from reachable import where_in
from test_datasets import hf, in_thread  # noqa: F401 - a fixture

import moondream_async as md
from moondream_async.integrations import datasets, ray
from moondream_async.simulator import Simulator

KEY = "a-key-that-was-passed"
SECRET = ray.Secret(KEY)


class Untouched:
    """No dataset: whatever is done with it fails."""


@pytest.fixture(params=["ray", "datasets"])
def ask(request):
    """Asks about rows, and gives them with their answers."""
    if request.param == "ray":
        pyarrow = pytest.importorskip("pyarrow", reason="needs: python -m pip install '.[ray]'")

        async def ask(rows, skill="caption", **options):
            stage = ray.SkillStage(skill, **options)
            return (await stage(pyarrow.Table.from_pylist(rows))).to_pylist()

    else:
        pytest.importorskip("datasets", reason="needs: python -m pip install '.[datasets]'")
        hugging_face = request.getfixturevalue("hf")

        async def ask(rows, skill="caption", **options):
            dataset = hugging_face.Dataset.from_list(rows)
            return (await in_thread(datasets.ask, dataset, skill, **options)).to_list()

    return ask


@pytest.fixture
def here(simulator):
    return {"endpoint": simulator.endpoint}


BAD = [
    ({"skill": "chat"}, "skill must be one of"),
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
    ({"rate_limit": 0}, "rate_limit"),
    ({"rate_limit": -1}, "rate_limit"),
    ({"rate_limit": "fast"}, "rate_limit"),
    ({"max_connections": 0}, "max_connections"),
    ({"timeout": "3"}, "timeout"),
    ({"endpoint": "ftp://x"}, "endpoint"),
    ({"endpoint": "http://example.com/v1", "api_key": "k"}, "plain http"),
    ({"no_such": 1}, "takes no no_such"),
]


@pytest.mark.parametrize(
    ("way", "arguments", "reason"),
    [
        *[(ray, *bad) for bad in BAD],
        *[(datasets, *bad) for bad in BAD[::7]],  # by the same table
        (ray, {"actors": 0}, "actors"),
        (ray, {"batch_size": 0}, "batch_size"),
        (datasets, {"num_proc": 0}, "num_proc"),
        (datasets, {"endpoint": "http://localhost/v1"}, "must be a Dataset, not Untouched"),
    ],
)
def test_bad_arguments_are_refused_before_the_dataset_is_touched(way, arguments, reason):
    with pytest.raises(md.RequestError, match=reason):
        way.ask(Untouched(), **arguments)


async def test_columns_are_checked_before_anything_is_asked(ask, here, simulator):
    with pytest.raises(md.RequestError, match=r"columns named caption already.*prefix="):
        await ask([{"image": "gone.jpg", "caption": "mine"}], **here)
    with pytest.raises(md.RequestError, match="no column 'image' among path"):
        await ask([{"path": "gone.jpg"}], **here)
    assert simulator.requests == []


async def test_no_key_for_the_cloud_is_told_before_anything_is_read(ask):
    with pytest.raises(md.RequestError, match="needs an API key"):
        await ask([{"image": "gone.jpg"}])


async def test_pictures_are_read_in_any_form(ask, here, client, photo):
    """Paths and bytes, plain and as Hugging Face stores them."""
    data = photo.read_bytes()
    forms = [str(photo), data, {"bytes": data, "path": None}, {"bytes": None, "path": str(photo)}]
    expected = await client.caption(photo)
    for form in forms:
        (row,) = await ask([{"image": form}], **here)
        assert row["caption"] == expected.caption
        assert row["finish_reason"] == expected.finish_reason
        assert row["request_id"]
        assert row["error_type"] is row["error_message"] is None


async def test_what_fails_is_an_error_in_its_row(ask, here, simulator, photo):
    good = photo.read_bytes()
    rows = await ask([{"image": each} for each in (good, None, b"none", good[:1000], good)], **here)
    assert [row["error_type"] for row in rows] == [None, *["ImageError"] * 3, None]
    assert [row["caption"] is None for row in rows] == [False, True, True, True, False]
    assert all(row["error_message"] for row in rows[1:4])
    (gone,) = await ask([{"image": "gone.jpg"}], **here)
    assert "does not exist" in gone["error_message"]
    simulator.faults.extend(["status=400", "status=503"])
    rows = await ask([{"image": str(photo)}] * 3, max_retries=0, max_connections=1, **here)
    assert [row["error_type"] for row in rows] == ["BadRequestError", "ServerError", None]


async def test_questions_are_read_from_a_column(ask, here, client, photo):
    questions = ["Where is the red circle?", "How large is it?", None]
    rows = [{"image": str(photo), "q": question} for question in questions]
    rows = await ask(rows, "query", text_column="q", prefix="md_", **here)
    assert [row["md_answer"] for row in rows] == [
        *[(await client.query(photo, question)).answer for question in questions[:2]],
        None,
    ]
    assert [row["md_error_type"] for row in rows] == [None, None, "RequestError"]


async def test_places_are_plain_data(ask, here, client, photo):
    for skill, column in (("detect", "objects"), ("point", "points")):
        rows = [{"image": str(photo)}, {"image": "gone.jpg"}]
        rows = await ask(rows, skill, object="shape", **here)
        expected = await getattr(client, skill)(photo, "shape")
        assert rows[0][column] == [dict(place) for place in expected[column]] != []
        assert not rows[1][column]


async def test_after_a_refused_key_nothing_more_is_sent(ask, photo):
    options = {"api_key": SECRET, "max_connections": 1}
    async with Simulator(api_key="another") as simulator:
        with pytest.raises(md.AuthenticationError, match="Invalid API key") as caught:
            await ask([{"image": str(photo)}] * 20, endpoint=simulator.endpoint, **options)
        assert where_in(caught.value, KEY) == []
        del caught  # it would keep the stage
        assert len(simulator.requests) == 1
