"""Results go wherever the official SDK's plain dicts go: each library here is the real one."""

import gc
import inspect
import io
import json
import pickle
import runpy
import threading
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, make_server

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
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
every_result = pytest.mark.parametrize("result", RESULTS, ids=lambda each: type(each).__name__)
FOUND = {"boxes": (RESULTS[2].objects, BOXES), "points": (RESULTS[3].points, POINTS)}
every_list = pytest.mark.parametrize(("found", "plain"), FOUND.values(), ids=FOUND)


# -- JSON --------------------------------------------------------------------------------


def orjson_dumps(value):
    return pytest.importorskip("orjson").dumps(value)


@every_result
@pytest.mark.parametrize(
    "encode", [json.dumps, orjson_dumps, msgspec.json.encode], ids=["json", "orjson", "msgspec"]
)
def test_a_result_is_json_as_it_is(result, encode):
    assert json.loads(encode(result)) == PLAIN[type(result)]


# -- tables ------------------------------------------------------------------------------


@every_list
def test_lists_of_places_are_tables(found, plain):
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    pyarrow, datasets = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")

    assert pandas.DataFrame(found).to_dict("records") == plain
    assert pandas.json_normalize(found).to_dict("records") == plain
    assert polars.DataFrame(found).to_dicts() == plain
    assert pyarrow.Table.from_pylist(found).to_pylist() == plain
    assert datasets.Dataset.from_list(found).to_list() == plain


@every_result
def test_whole_results_are_rows(result):
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    pyarrow, datasets = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")
    plain = PLAIN[type(result)]

    assert pandas.DataFrame([result, result]).to_dict("records") == [plain, plain]
    assert polars.DataFrame([result, result]).to_dicts() == [plain, plain]
    assert pyarrow.array([result]).to_pylist() == [plain]
    assert pyarrow.Table.from_pylist([result]).to_pylist() == [plain]
    assert datasets.Dataset.from_list([result]).to_list() == [plain]


def test_boxes_are_detections_to_supervision():
    sv = pytest.importorskip("supervision")

    for result in (RESULTS[2], PLAIN[md.DetectResult]):
        found = sv.Detections.from_vlm(sv.VLM.MOONDREAM, result, resolution_wh=(200, 100))
        assert found.xyxy.round(3).tolist() == [[20, 20, 100, 60], [50, 25, 150, 100]]


# -- the web, under real servers ---------------------------------------------------------


async def fetched(address):
    answer = await get(None, address)
    assert answer.status == 200, answer.data
    return answer.json


async def test_a_result_is_an_answer_of_aiohttp_web():
    async def answer(request):
        return web.json_response(RESULTS[int(request.match_info["number"])])

    app = web.Application()
    app.router.add_get("/{number}", answer)
    async with TestServer(app) as server:
        for number, plain in enumerate(PLAIN.values()):
            assert await fetched(str(server.make_url(f"/{number}"))) == plain


async def test_a_result_is_an_answer_of_starlette():
    starlette = pytest.importorskip("starlette.applications")
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def answer(request):
        return JSONResponse(RESULTS)

    async with uvicorn(starlette.Starlette(routes=[Route("/", answer)])) as address:
        assert await fetched(address) == list(PLAIN.values())


@pytest.fixture(scope="module")
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


@pytest.mark.parametrize("way", ["plain", "typed"])
async def test_a_result_is_an_answer_of_fastapi_with_or_without_its_annotation(fastapi_app, way):
    async with uvicorn(fastapi_app) as address:
        for kind, plain in PLAIN.items():
            assert await fetched(f"{address}/{way}/{kind.__name__}") == plain


async def test_our_types_stand_in_pydantic_models_and_in_requests(fastapi_app):
    async with uvicorn(fastapi_app) as address:
        assert await fetched(f"{address}/report") == {
            "caption": PLAIN[md.CaptionResult],
            "boxes": BOXES,
            "thought": THOUGHT,
        }
        given = f"{address}/given"
        assert (await post(None, given, PLAIN[md.DetectResult])).json == 0.75
        assert (await post(None, given, {"objects": [{"x_min": 1}]})).status == 422


def test_the_openapi_schema_tells_the_keys(fastapi_app):
    schemas = fastapi_app.openapi()["components"]["schemas"]

    assert {kind.__name__ for kind in PLAIN} <= schemas.keys()
    assert schemas["Region"]["required"] == ["x_min", "y_min", "x_max", "y_max"]
    assert schemas["DetectResult"]["required"] == ["objects"]
    assert schemas["DetectResult"]["properties"]["objects"]["items"]["$ref"].endswith("/Region")
    assert schemas["DetectResult"]["description"] == "Where in the picture the objects are."
    assert not {"raw", "headers"} & schemas["CaptionResult"]["properties"].keys()


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


class Quiet(WSGIRequestHandler):
    def log_message(self, *_):
        pass


def django_app():
    django = pytest.importorskip("django")
    from django.conf import settings
    from django.core.wsgi import get_wsgi_application
    from django.http import JsonResponse
    from django.urls import path

    if not settings.configured:
        settings.configure(ALLOWED_HOSTS=["*"], SECRET_KEY="x", USE_TZ=True)
    urls = tuple(
        path(f"{i}", lambda request, result=result: JsonResponse(result))
        for i, result in enumerate(RESULTS)
    )
    settings.ROOT_URLCONF = type("urls", (), {"urlpatterns": urls})
    django.setup()
    return get_wsgi_application()


def flask_app():
    flask = pytest.importorskip("flask")
    app = flask.Flask("answers")
    app.get("/<int:number>")(lambda number: flask.jsonify(RESULTS[number]))
    app.get("/returned/<int:number>", endpoint="returned")(lambda number: RESULTS[number])
    return app


@pytest.mark.parametrize(
    ("make", "prefix"),
    [(django_app, ""), (flask_app, ""), (flask_app, "returned/")],
    ids=["django", "flask jsonify", "flask, returned"],
)
async def test_a_result_is_an_answer_under_wsgi(make, prefix):
    with make_server("127.0.0.1", 0, make(), handler_class=Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            for number, kind in enumerate(PLAIN):
                address = f"http://127.0.0.1:{server.server_port}/{prefix}{number}"
                assert await fetched(address) == PLAIN[kind]
        finally:
            server.shutdown()
            thread.join()


# -- what a call gives -------------------------------------------------------------------


async def test_a_result_of_a_call_has_the_headers_of_its_response(client, photo):
    result = await client.detect(photo, "shape")

    assert result.headers["content-type"] == result.headers["Content-Type"]
    assert "headers" not in result
    assert pickle.loads(pickle.dumps(result)).headers == result.headers


# -- a notebook --------------------------------------------------------------------------


async def test_a_notebook_shows_the_picture_with_what_was_found(client, photo):
    with Image.open(photo) as picture:
        encoded = await client.encode_image(photo)
        for image in (photo, str(photo), picture, encoded):
            result = await client.detect(image, "shape")
            expected = result.draw(image)
            expected.thumbnail((800, 800))
            with Image.open(io.BytesIO(result._repr_png_())) as shown:
                assert shown.tobytes() == expected.tobytes()
            assert result._repr_html_().startswith('<img src="data:image/png;base64,')
            assert "<code>DetectResult(objects=[Region(" in result._repr_html_()


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
