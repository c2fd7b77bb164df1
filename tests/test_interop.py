"""Results go wherever the official SDK's plain dicts go: each library here is the real one."""

import gc
import importlib
import inspect
import io
import json
import pickle
import runpy
from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from backends import uvicorn
from PIL import Image
from spoken import get, post

import moondream_async as md

BOXES = [
    {"x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 0.6},
    dict.fromkeys(("x_min", "y_min"), 0.25) | {"x_max": 0.75, "y_max": 1.0},
]
POINTS = [{"x": 0.25, "y": 0.5}, {"x": 0.75, "y": 1.0}]
THOUGHT = {"text": "Two.", "grounding": [{"start_idx": 0, "end_idx": 3, "points": [[0.5, 0.25]]}]}
SAID = {"request_id": "r-1", "finish_reason": "stop", "metrics": {"output_tokens": 3}}
BODY = {"anything": ["else"]}

PLAIN = {
    md.CaptionResult: {"caption": "a heron", **SAID},
    md.QueryResult: {"answer": "two", "reasoning": THOUGHT, **SAID},
    md.DetectResult: {"objects": BOXES, **SAID},
    md.PointResult: {"points": POINTS, **SAID},
    md.SegmentResult: {"path": "M 0 0 L 1 1 Z", "bbox": BOXES[0], **SAID},
    md.ChatResult: {
        "message": {"role": "assistant", "content": "Two.", "reasoning": "Count."},
        "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
        **SAID,
    },
}
RESULTS = [kind(plain, raw=BODY, headers={"X-Server": "one"}) for kind, plain in PLAIN.items()]


# -- JSON --------------------------------------------------------------------------------


def test_a_result_is_json_as_it_is():
    encoders = [json.dumps, msgspec.json.encode]
    if find_spec("orjson"):
        encoders.append(importlib.import_module("orjson").dumps)

    for encode in encoders:
        assert json.loads(encode(RESULTS)) == list(PLAIN.values())


async def test_a_result_of_a_call_has_the_headers_of_its_response(client, photo):
    result = await client.detect(photo, "shape")

    assert result.headers["content-type"] == result.headers["Content-Type"]
    assert "headers" not in result
    assert pickle.loads(pickle.dumps(result)).headers == result.headers


# -- tables ------------------------------------------------------------------------------


@pytest.mark.slow
def test_results_and_lists_of_places_are_tables():
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    pyarrow, datasets = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")
    found = RESULTS[2].objects

    assert pandas.json_normalize(found).to_dict("records") == BOXES
    tables = [(found, BOXES), (RESULTS[3].points, POINTS)]
    for rows, plain in tables + [([each] * 2, [PLAIN[type(each)]] * 2) for each in RESULTS]:
        assert pandas.DataFrame(rows).to_dict("records") == plain
        assert polars.DataFrame(rows).to_dicts() == plain
        assert pyarrow.array(rows).to_pylist() == plain
        assert pyarrow.Table.from_pylist(rows).to_pylist() == plain
        assert datasets.Dataset.from_list(rows).to_list() == plain


@pytest.mark.slow
def test_boxes_are_detections_to_supervision():
    sv = pytest.importorskip("supervision")

    for result in (RESULTS[2], PLAIN[md.DetectResult]):
        found = sv.Detections.from_vlm(sv.VLM.MOONDREAM, result, resolution_wh=(200, 100))
        assert found.xyxy.round(3).tolist() == [[20, 20, 100, 60], [50, 25, 150, 100]]


# -- the web -----------------------------------------------------------------------------


def of_aiohttp(result):
    return web.json_response(result).body


def of_starlette(result):
    return pytest.importorskip("starlette.responses").JSONResponse(result).body


def of_django(result):
    settings = pytest.importorskip("django.conf").settings
    if not settings.configured:
        settings.configure(ALLOWED_HOSTS=["127.0.0.1"], LOGGING_CONFIG=None)
    return importlib.import_module("django.http").JsonResponse(result).content


def of_flask(result):
    flask = pytest.importorskip("flask")
    with flask.Flask("answers").test_request_context():
        jsonified, returned = flask.jsonify(result), flask.make_response(result)
    assert jsonified.json == returned.json
    return returned.data


@pytest.mark.slow
@pytest.mark.parametrize("body", [of_aiohttp, of_starlette, of_django, of_flask])
def test_a_result_is_an_answer_of_a_web_framework(body):
    for result in RESULTS:
        assert json.loads(body(result)) == PLAIN[type(result)]


async def fetched(address):
    answer = await get(None, address)
    assert answer.status == 200, answer.data
    return answer.json


@pytest.fixture
def fastapi_app():
    fastapi, pydantic = pytest.importorskip("fastapi"), pytest.importorskip("pydantic")
    app = fastapi.FastAPI()

    class Report(pydantic.BaseModel):
        caption: md.CaptionResult
        boxes: list[md.Region]
        thought: md.Reasoning | None = None

    for result in RESULTS:
        name = type(result).__name__

        def answer(result=result):
            return result

        answer.__signature__ = inspect.Signature()

        app.get(f"/plain/{name}")(answer)
        app.get(f"/typed/{name}", response_model=type(result))(answer)

    @app.get("/report")
    def report() -> Report:
        return Report(caption=RESULTS[0], boxes=RESULTS[2].objects, thought=THOUGHT)

    @app.post("/given")
    def given(found: md.DetectResult) -> float:
        return found.objects[1].x_max

    return app


async def test_our_types_are_answers_of_fastapi_and_stand_in_its_models_requests_and_schema(
    fastapi_app,
):
    async with uvicorn(fastapi_app) as address:
        for kind, plain in PLAIN.items():
            assert await fetched(f"{address}/plain/{kind.__name__}") == plain
            assert await fetched(f"{address}/typed/{kind.__name__}") == plain
        assert await fetched(f"{address}/report") == {
            "caption": PLAIN[md.CaptionResult],
            "boxes": BOXES,
            "thought": THOUGHT,
        }
        given = f"{address}/given"
        assert (await post(None, given, PLAIN[md.DetectResult])).json == 0.75
        assert (await post(None, given, {"objects": [{"x_min": 1}]})).status == 422

    schemas = fastapi_app.openapi()["components"]["schemas"]
    assert {kind.__name__ for kind in PLAIN} <= schemas.keys()
    assert schemas["Region"]["required"] == ["x_min", "y_min", "x_max", "y_max"]
    assert schemas["DetectResult"]["required"] == ["objects"]
    assert schemas["DetectResult"]["properties"]["objects"]["items"]["$ref"].endswith("/Region")
    assert schemas["DetectResult"]["description"] == "Where in the picture the objects are."
    assert not {"raw", "headers"} & schemas["CaptionResult"]["properties"].keys()


@pytest.mark.slow
async def test_the_recipe_of_a_typed_answer_gives_it_and_tells_its_keys(simulator, monkeypatch):
    pytest.importorskip("fastapi")
    monkeypatch.setenv("MOONDREAM_ENDPOINT", simulator.endpoint)
    recipe = Path(__file__).parent / "recipes" / "fastapi_answers.py"
    async with uvicorn(runpy.run_path(str(recipe))["app"]) as address:
        found = await fetched(f"{address}/detect?object=shape")
        schema = await fetched(f"{address}/openapi.json")  # which the page /docs shows
    assert found["objects"][0].keys() == BOXES[0].keys()
    answers = schema["paths"]["/detect"]["get"]["responses"]["200"]["content"]
    assert answers["application/json"]["schema"] == {"$ref": "#/components/schemas/DetectResult"}


def test_pydantic_keeps_a_result_and_reads_plain_data():
    pydantic = pytest.importorskip("pydantic")
    adapter = pydantic.TypeAdapter(md.DetectResult)

    assert adapter.validate_python(RESULTS[2]) is RESULTS[2]
    read = adapter.validate_json(json.dumps(PLAIN[md.DetectResult] | {"mine": 1}))
    assert (type(read), read.objects[0].x_max, read["mine"]) == (md.DetectResult, 0.5, 1)
    assert json.loads(adapter.dump_json(read)) == PLAIN[md.DetectResult] | {"mine": 1}
    with pytest.raises(pydantic.ValidationError):
        adapter.validate_python({"objects": [{"x_min": "left"}]})


# -- a notebook --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["path", "name", "picture", "encoded"])
async def test_a_notebook_shows_the_picture_with_what_was_found(client, photo, kind):
    with Image.open(photo) as picture:
        encoded = await client.encode_image(photo)
        image = {"path": photo, "name": str(photo), "picture": picture, "encoded": encoded}[kind]
        result = await client.detect(image, "shape")
        expected = result.draw(image)
        expected.thumbnail((800, 800))
        with Image.open(io.BytesIO(result._repr_png_())) as shown:
            assert shown.tobytes() == expected.tobytes()
        html = result._repr_html_()
        assert html.startswith('<img src="data:image/png;base64,')
        assert "<code>DetectResult(objects=[Region(" in html


@pytest.mark.parametrize("kind", ["picture", "bytes", "gone"])
async def test_a_result_keeps_no_picture_in_memory_and_is_shown_as_text(
    client, tmp_path, photo, kind
):
    path = tmp_path / "photo.png"
    path.write_bytes(photo.read_bytes())
    with Image.open(path) as opened:
        image = {"picture": opened.copy(), "bytes": path.read_bytes(), "gone": path}[kind]
    result = await client.detect(image, "shape")
    del image
    path.unlink()
    gc.collect()

    assert result._repr_png_() is result._repr_html_() is None
