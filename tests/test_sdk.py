"""The official SDK, name by name: what it has is here, under the same names, or why not.

Its code is read, not run (`tests/foreign.txt` installs it without torch). A release of it that
adds a function, a method, an argument or a key fails here until it is looked at.
"""

import importlib.util
import inspect

import pytest
from PIL import Image

import moondream_async as md

SPEC = importlib.util.find_spec("moondream")
pytestmark = pytest.mark.skipif(
    SPEC is None, reason="needs: python -m pip install --no-deps -r tests/foreign.txt"
)
PHOTON = "runs models in this process, and this package is a client of servers"
NOT_HERE = {"photon_models": PHOTON, "__version__": "each has its own"}
SKILLS = {"caption", "query", "detect", "point", "segment", "chat"}
SAME = SKILLS | {"encode_image"}
CLOSING = {"close": "aclose", "__enter__": "__aenter__", "__exit__": "__aexit__"}
KEYS = {  # of its TypedDicts -> our types
    "Region": md.Region,
    "Point": md.Point,
    "Reasoning": md.Reasoning,
    "ReasoningGrounding": md.Grounding,
    "CaptionOutput": md.CaptionResult,
    "QueryOutput": md.QueryResult,
    "DetectOutput": md.DetectResult,
    "PointOutput": md.PointResult,
    "SegmentOutput": md.SegmentResult,
    "ChatOutput": md.ChatResult,
    "ChatMessage": md.ChatMessage,
    "ChatResponseMessage": md.ChatMessage,
    "ChatReasoningDetails": md.Reasoning,
    "SamplingSettings": md.Settings,
    "RolloutOutput": md.RolloutOutput,
    "Rollout": md.Rollout,
    "RolloutsResponse": md.Rollouts,
    "TrainStepOutput": md.TrainStep,
    "MetricsLogOutput": md.MetricsLog,
    "FinetuneInfo": md.Finetune,
    "CheckpointInfo": md.Checkpoint,
}
PLAIN = {  # plain dicts here too, or what goes in, as any mapping
    "SegmentStreamChunk",
    "CheckpointListOutput",
    "SaveCheckpointOutput",
    "PointGroundTruth",
    "DetectGroundTruth",
    "QueryTarget",
    "PointTarget",
    "DetectTarget",
    "SkillRequest",
    "RLGroup",
    "SFTGroup",
}


@pytest.fixture(scope="module")
def sdk():
    return pytest.importorskip("moondream")


def parameters(function, drop=("self",)):
    return {
        name: (each.kind, each.default)
        for name, each in inspect.signature(function).parameters.items()
        if name not in drop
    }


def public(cls):
    return {name for name, value in vars(cls).items() if callable(value) and name[0] != "_"}


def test_every_function_of_the_sdk_is_here_or_has_its_reason(sdk):
    missing = set(sdk.__all__) - set(dir(md)) - NOT_HERE.keys()

    assert not missing


def test_vl_takes_the_sdks_arguments_in_its_order(sdk):
    theirs, ours = parameters(sdk.vl), parameters(md.vl)

    # None is the cloud here too, unless the environment says otherwise; the last are Photon's.
    assert [*ours][:-1] == [*theirs][:-1]
    assert [*theirs] == ["api_key", "endpoint", "local", "model", "kwargs"]
    assert [kind for kind, _ in ours.values()] == [kind for kind, _ in theirs.values()]
    assert (ours["local"], ours["model"]) == (theirs["local"], theirs["model"])


def test_calls_take_the_sdks_arguments_in_its_order(sdk):
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    for call in SKILLS:
        theirs = parameters(getattr(sdk.cloud_vl.CloudVL, call))
        ours = parameters(getattr(md.MoondreamClient, call))
        assert [name for name, (kind, _) in ours.items() if kind is positional] == list(theirs)
        if call == "query":
            assert (theirs["reasoning"][1], ours["reasoning"][1]) == (False, None)
            del theirs["reasoning"]  # None leaves it to the server
        assert {name: ours[name] for name in theirs} == theirs


def test_the_client_has_every_method_of_the_sdks(sdk):
    methods = public(sdk.cloud_vl.CloudVL) | public(sdk.types.VLM)

    assert methods == SAME | {"close"}
    assert all(hasattr(md.MoondreamClient, CLOSING.get(name, name)) for name in methods)
    assert inspect.signature(md.MoondreamClient).parameters.keys() >= {
        *parameters(sdk.cloud_vl.CloudVL.__init__)
    }


def test_the_finetune_has_every_method_of_the_sdks_with_its_arguments(sdk):
    theirs, ours = sdk.finetune.Finetune, md.FinetuneClient

    assert public(theirs) <= public(ours)
    for name in public(theirs):
        assert parameters(getattr(ours, name)) == parameters(getattr(theirs, name)), name
    assert {"finetune_id", "name", "rank"} <= set(dir(ours))
    assert parameters(sdk.ft).keys() <= parameters(md.ft).keys()


def test_results_have_every_key_of_the_sdks(sdk):
    kinds = {
        name: value
        for name, value in vars(sdk.types).items()
        if isinstance(value, type) and hasattr(value, "__total__")
    }

    assert kinds.keys() == KEYS.keys() | PLAIN
    for name, ours in KEYS.items():
        keys = ours.__annotations__ if ours is md.Settings else ours.fields()
        assert kinds[name].__annotations__.keys() <= set(keys), name


def test_an_encoded_picture_has_its_url_as_the_sdks(sdk):
    image = md.EncodedImage(b"\xff\xd8\xff", "image/jpeg", 4, 3)

    assert list(sdk.types.Base64EncodedImage.__annotations__) == ["image_url"]
    assert image.image_url == "data:image/jpeg;base64,/9j/"


# -- the calls of the official pages, with await added -----------------------------------


async def test_quickstart_skills_and_streaming(simulator, photo):
    async with md.vl(endpoint=simulator.endpoint, api_key="key") as model:
        with Image.open(photo) as image:
            encoded = await model.encode_image(image)
        assert encoded.image_url.startswith("data:image/")
        assert (await model.caption(encoded, "short", False, {"max_tokens": 50}))["caption"]
        refs = [[0.5, 0.5], [0.1, 0.1, 0.9, 0.9]]
        assert (await model.query(photo, "What is here?", False, None, False, refs))["answer"]
        assert (await model.detect(photo, "shape"))["objects"][0]["x_min"] >= 0
        assert (await model.point(photo, "shape", None, refs[:1]))["points"][0]["x"] >= 0
        outline = await model.segment(photo, "shape", refs[:1])
        assert {"path", "bbox"} <= outline.keys()
        asked = await model.query(photo, "How many?", reasoning=True)
        assert asked["reasoning"]["text"] is not None
        for grounding in asked["reasoning"]["grounding"]:
            assert grounding["start_idx"] <= grounding["end_idx"]
        hello = [{"role": "user", "content": "Hello"}]
        turn = await model.chat(hello, False, {"max_tokens": 20})
        assert turn["message"]["content"]
        assert turn["finish_reason"]

        for result, key in (
            (await model.caption(photo, stream=True), "caption"),
            (await model.query(photo, "What is here?", True), "answer"),
            (await model.chat(hello, stream=True), "chunk"),
        ):
            assert "".join([chunk async for chunk in result[key]])
        updates = [update async for update in await model.segment(photo, "shape", None, True)]
        assert "bbox" in updates[0]
        assert updates[-1]["completed"] is True
        assert updates[-1]["path"]


async def test_running_locally(simulator, photo):
    async with md.vl(endpoint=simulator.endpoint) as model:  # no key
        assert (await model.caption(photo))["caption"]
    async with md.vl("key", simulator.endpoint, False, "mine") as model:
        assert (await model.caption(photo))["caption"]
    assert [request.body.get("model") for request in simulator.requests] == [None, "mine"]
    for local in (lambda: md.vl(local=True), lambda: md.photon("moondream3")):
        with pytest.raises(md.RequestError, match="which needs the official package"):
            local()


async def test_finetuning(simulator, photo):
    async with await md.ft(
        "key", name="doors", rank=8, endpoint=f"{simulator.endpoint}/tuning"
    ) as finetune:
        truth = {"points": [{"x": 0.5, "y": 0.5}]}
        tried = await finetune.rollouts(
            "point", image=photo, object="shape", num_rollouts=2, ground_truth=truth
        )
        group = {
            "mode": "rl",
            "request": tried["request"],
            "rollouts": tried["rollouts"],
            "rewards": tried["rewards"],
        }
        step = await finetune.train_step([group], lr=0.002)
        assert step["step"] == 1
        await finetune.log_metrics(step=1, metrics={"loss": 0.5})
        asked = {"skill": "query", "image": photo, "question": "How many?", "num_rollouts": 3}
        async for context, response in finetune.rollout_stream([("mine", asked)], buffer_size=1):
            assert (context, len(response["rollouts"])) == ("mine", 3)
        saved = await finetune.save_checkpoint()
        page = await finetune.list_checkpoints(limit=10)
        assert [each["step"] for each in page["checkpoints"]] == [saved["checkpoint"]["step"]]
        assert finetune.model(1) == f"moondream3-preview/{finetune.finetune_id}@1"
        async with await md.ft(
            "key", finetune_id=finetune.finetune_id, endpoint=simulator.endpoint
        ) as same:
            assert (same.name, same.rank) == ("doors", 8)
        await finetune.delete_checkpoint(1)
        await finetune.delete()


@pytest.mark.parametrize(
    "given", [{}, {"name": "a"}, {"rank": 8}, {"finetune_id": "f", "name": "a", "rank": 8}]
)
async def test_ft_needs_an_id_or_a_name_and_a_rank(given):
    with pytest.raises(md.RequestError, match="ft needs"):
        await md.ft("key", **given)


async def test_a_question_alone_says_the_way_out(client):
    with pytest.raises(md.RequestError, match=r"query\(image, question\)"):
        await client.query("How many?")


def test_calls_are_of_one_kind_and_say_what_they_return():
    for name in SKILLS:
        method = getattr(md.MoondreamClient, name)
        assert name.capitalize() + "Result" in str(inspect.signature(method).return_annotation)
        if hasattr(inspect, "markcoroutinefunction"):
            assert inspect.iscoroutinefunction(method)
