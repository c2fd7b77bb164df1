"""Finetunes: what is sent, what comes back, and what is never sent twice."""

import asyncio
import collections
import contextlib
import math

import pytest
from canned import IMAGE, refuses, replying
from raw_server import RawServer, whole

import moondream_async as md
from moondream_async.simulator import Simulator

KEY = "a-key-of-some-length"
STEP = {"step": 7, "applied": True, "kl": 0.1, "grad_norm": None}


@pytest.fixture
async def client(simulator):
    async with md.MoondreamClient(KEY, endpoint=simulator.endpoint) as client:
        yield client


@pytest.fixture
async def finetune(client):
    return await client.tuning.create("find-doors", rank=16)


@contextlib.asynccontextmanager
async def tuning_of(server, **options):
    async with server, md.MoondreamClient(endpoint=server.endpoint, **options) as client:
        yield client.tuning


# -- what cannot be right -------------------------------------------------------------

WHY = md.TuningRequest.query(None, "Why?")
RIGHT = {"answer": "so"}
TWO = md.Rollouts(rollouts=(md.Rollout(), md.Rollout()))
MADE = {
    "no question": (lambda: md.TuningRequest.query(IMAGE), "question"),
    "no image": (lambda: md.TuningRequest.detect(None, "a"), "image"),
    "no object": (lambda: md.TuningRequest.point(IMAGE, ""), "object"),
    "refs": (lambda: md.TuningRequest.point(IMAGE, "a", spatial_refs=[[2, 0]]), "spatial"),
    "truth": (lambda: md.TuningRequest.point(IMAGE, "a", ground_truth=[1]), "mapping"),
    "no rewards": (lambda: md.TrainGroup.rl(TWO), "without rewards"),
    "too few": (lambda: md.TrainGroup.rl(TWO, [1]), "1 rewards for 2"),
    "nothing": (lambda: md.TrainGroup.rl(md.Rollouts(), []), "0 rewards"),
    "nan": (lambda: md.TrainGroup.rl(TWO, [1, math.nan]), "finite"),
    "text": (lambda: md.TrainGroup.rl(TWO, [1, "1"]), "finite"),
    "None": (lambda: md.TrainGroup.rl(TWO, [1, None]), "number"),
    "dict": (lambda: md.TrainGroup.sft({}, RIGHT), "TuningRequest"),
    "empty": (lambda: md.TrainGroup.sft(WHY, {}), "target"),
}


@pytest.mark.parametrize(("make", "message"), MADE.values(), ids=MADE)
def test_what_cannot_be_right_is_refused_when_it_is_made(make, message):
    with pytest.raises(md.RequestError, match=message):
        make()


OF_NOTHING = [({"finetune": ""}, "finetune"), ({"finetune": 7}, "finetune")]
SFT = [{"mode": "sft"}]
ASKED = {  # what is given to each method, beside what it needs
    "create": [({"name": ""}, "name"), ({"rank": 7}, "rank"), ({"rank": 8.0}, "rank")],
    "get": OF_NOTHING,
    "delete": OF_NOTHING,
    "rollouts": [
        *OF_NOTHING,
        ({"num_rollouts": 0}, "num_rollouts"),
        ({"num_rollouts": 17}, "num_rollouts"),
        ({"request": {"skill": "query"}}, "TuningRequest"),
    ],
    "rollout_stream": [({"max_concurrency": 0}, "max_concurrency")],
    "train_step": [
        *OF_NOTHING,
        ({"groups": []}, "empty"),
        ({"groups": {"mode": "rl"}}, "list"),
        ({"groups": 7}, "list"),
        ({"groups": ["rl"]}, "TrainGroup"),
        ({"groups": [{"mode": "sft", "x": object()}]}, "JSON"),
        ({"lr": 0}, "lr"),
        ({"lr": math.inf}, "lr"),
        ({"timeout": -1}, "first_event"),
    ],
    "log_metrics": [
        *OF_NOTHING,
        ({"step": -1}, "step"),
        ({"metrics": {}}, "metrics"),
        ({"metrics": [("a", 1)]}, "metrics"),
        ({"metrics": {"a": math.nan}}, "metrics.*finite"),
        ({"metrics": {"a": None}}, "metrics.*number"),
    ],
    "save_checkpoint": OF_NOTHING,
    "list_checkpoints": OF_NOTHING,
    "delete_checkpoint": [({"step": -1}, "step")],
    "checkpoint_url": [({"step": -1}, "step")],
}
NEEDED = {
    "create": {"name": "a", "rank": 8},
    "rollouts": {"request": WHY},
    "rollout_stream": {"requests": []},
    "train_step": {"groups": SFT},
    "log_metrics": {"step": 1, "metrics": {"a": 1}},
}


@pytest.mark.parametrize("method", ASKED)
async def test_what_cannot_be_right_is_refused_before_anything_is_sent(client, simulator, method):
    for given, message in ASKED[method]:
        finetune = {} if method == "create" else {"finetune": "01HX"}
        arguments = finetune | NEEDED.get(method, {}) | given
        await refuses(getattr(client.tuning, method), arguments, message)
    assert simulator.requests == []


# -- finetunes ------------------------------------------------------------------------


async def test_finetune_of_a_name_is_made_once_and_of_one_rank(client, simulator):
    made = await client.tuning.create("a", rank=8)
    assert await client.tuning.create("a", rank=8) == made
    other = await client.tuning.create("b", rank=32)
    assert (made.name, made.rank) == ("a", 8)
    assert other.finetune_id not in ("", made.finetune_id)
    with pytest.raises(md.APIStatusError, match="rank") as caught:
        await client.tuning.create("a", rank=16)
    assert (type(caught.value), caught.value.status) == (md.APIStatusError, 409)
    asked = [(each.body["name"], each.body["rank"]) for each in simulator.requests]
    assert asked == [("a", 8), ("a", 8), ("b", 32), ("a", 16)]
    assert simulator.requests[0].headers["X-Moondream-Auth"] == KEY


INFO = {"finetune_id": "01HX", "name": "a", "rank": 8, "created_at_ms": 1, "updated_at_ms": 2}


async def test_finetune_is_read_wrapped_or_not_and_needs_an_id():
    gone = whole(b"", status="204 No Content", kind="")
    replies = [INFO, {"finetune": INFO}, {"name": "a"}, gone]
    async with tuning_of(replying(*replies)) as tuning:
        for reply in replies[:2]:
            finetune = await tuning.get("01HX")
            assert {name: finetune[name] for name in INFO} == INFO
            assert finetune.raw == reply
        with pytest.raises(md.ServerError, match="finetune_id") as caught:
            await tuning.get("01HX")
        assert caught.value.status == 200
        assert await tuning.delete("01HX") is None


async def test_finetune_is_had_and_deleted_by_value_or_id(client, simulator, finetune):
    assert (await client.tuning.get(finetune)).name == "find-doors"
    assert (await client.tuning.get(finetune.finetune_id)).updated_at_ms > 0
    assert await client.tuning.delete(finetune) is None
    with pytest.raises(md.NotFoundError):
        await client.tuning.get(finetune)
    with pytest.raises(md.NotFoundError):
        await client.tuning.delete(finetune.finetune_id)
    with pytest.raises(md.NotFoundError):
        await client.tuning.get("../x?y#z")
    assert simulator.requests[-1].params["id"] == "../x?y#z", "it cannot leave its place"


async def test_finetunes_are_listed_over_all_pages_oldest_first(client, simulator):
    names = [f"finetune-{number}" for number in range(5)]
    for name in names:
        await client.tuning.create(name, rank=8)
    simulator.requests.clear()
    assert [finetune.name async for finetune in client.tuning.list(limit=2)] == names
    assert len(simulator.requests) == 3


async def test_a_list_ends_where_the_server_names_no_further_page():
    ends = [{}, {"next_cursor": ""}, {"next_cursor": 7}, {"next_cursor": "c", "has_more": False}]
    for end in ends:
        async with tuning_of(replying({"finetunes": [INFO], **end})) as tuning:
            assert [each.finetune_id async for each in tuning.list(limit=100)] == ["01HX"], end


async def test_pages_that_go_round_in_circles_end_with_an_error():
    page = {"finetunes": [INFO], "next_cursor": "c", "has_more": True}
    async with tuning_of(replying(page)) as tuning:
        finetunes = tuning.list()
        assert [(await anext(finetunes)).finetune_id for _ in range(2)] == ["01HX"] * 2
        with pytest.raises(md.ServerError, match="circles"):
            await anext(finetunes)


def test_model_of_a_finetune_is_named_as_the_server_wants_it():
    finetune = md.Finetune(finetune_id="01HX")
    assert finetune.model(500) == "moondream3-preview/01HX@500"
    newer = md.Checkpoint(finetune_id="01HX", step=3).model(base_model="moondream3.1-9B-A2B")
    assert newer == "moondream3.1-9B-A2B/01HX@3"
    with pytest.raises(md.RequestError, match="step"):
        finetune.model("500")


# -- rollouts -------------------------------------------------------------------------


async def test_step_learns_from_rollouts_whose_rewards_come_of_the_truth(
    client, simulator, finetune, photo
):
    found = (await client.point(photo, "red")).points
    truth = {"points": found, "boxes": [md.Region(0.1, 0.1, 0.9, 0.9)]}
    request = md.TuningRequest.point(photo, "red", ground_truth=truth)
    rollouts = await client.tuning.rollouts(finetune, request, num_rollouts=4)
    assert len(rollouts.rollouts) == len(rollouts.rewards) == 4
    assert rollouts.rollouts[0].output.points == found
    assert rollouts.rewards[0] == max(rollouts.rewards) > min(rollouts.rewards)
    assert rollouts.rollouts[0].skill == "point"
    assert rollouts.rollouts[0].answer_tokens
    assert "base64" not in repr(rollouts)
    body = simulator.requests[-1].body
    assert body["ground_truth"] == {
        "points": [{"x": point.x, "y": point.y} for point in found],
        "boxes": [{"x_min": 0.1, "y_min": 0.1, "x_max": 0.9, "y_max": 0.9}],
    }
    assert body["request"]["image_url"].startswith("data:image/jpeg;base64,")

    step = await client.tuning.train_step(finetune, [md.TrainGroup.rl(rollouts)])
    assert (step.step, step.applied, step.sft_loss) == (1, True, None)
    assert step.reward_mean == pytest.approx(sum(rollouts.rewards) / 4)
    body = simulator.requests[-1].body
    assert body["lr"] == 2e-4
    assert body["groups"] == [
        {
            "mode": "rl",
            "request": rollouts.raw["request"],
            "rollouts": rollouts.raw["rollouts"],
            "rewards": list(rollouts.rewards),
        }
    ]
    own = md.TrainGroup.rl(rollouts, rewards=[1, 0, 0, 0])
    assert (await client.tuning.train_step(finetune, [own])).step == 2
    assert simulator.requests[-1].body["groups"][0]["rewards"] == [1, 0, 0, 0]


async def test_rollouts_of_unknown_truth_have_no_rewards(client, finetune, photo):
    request = md.TuningRequest.detect(photo, "red")
    rollouts = await client.tuning.rollouts(finetune, request)
    assert rollouts.rewards is None
    assert rollouts.rollouts[0].output.objects == (await client.detect(photo, "red")).objects


async def test_rollouts_of_a_query_need_no_picture(client, simulator, finetune):
    request = md.TuningRequest.query(
        None, "Why?", reasoning=True, settings={"temperature": 0}, context="mine"
    )
    rollouts = await client.tuning.rollouts(finetune, request, num_rollouts=2)
    assert rollouts.rollouts[0].output.answer
    assert rollouts.rollouts[0].output.reasoning.text
    assert simulator.requests[-1].body == {
        "finetune_id": finetune.finetune_id,
        "num_rollouts": 2,
        "request": {
            "skill": "query",
            "question": "Why?",
            "reasoning": True,
            "settings": {"temperature": 0},
        },
    }


async def test_rollouts_are_read_as_far_as_they_make_sense():
    odd = {"rollouts": [{"output": None, "coords": "x", "new": 1}, "no rollout"], "rewards": "?"}
    async with tuning_of(replying(odd)) as tuning:
        rollouts = await tuning.rollouts("01HX", WHY)
    assert len(rollouts.rollouts) == 2
    assert rollouts.rollouts[0].raw["new"] == 1
    assert (rollouts.rewards, rollouts.raw) == (None, odd)


# -- many rollouts --------------------------------------------------------------------


class Gate:
    """A server that answers each rollout when it is told to, by its question."""

    def __init__(self):
        self.asked = []
        self.server = RawServer(self._play)
        self._news = asyncio.Event()
        self._open = collections.defaultdict(asyncio.Event)

    async def _play(self, peer):
        while True:
            question = (await peer.request()).json["request"]["question"]
            self.asked.append(question)
            self._news.set()
            await self._open[question].wait()
            await peer.send(whole({"rollouts": [{"output": {"answer": question}}]}))

    def let_through(self, *questions):
        for question in questions:
            self._open[question].set()

    async def until_asked(self, count):
        while len(self.asked) < count:
            self._news.clear()
            await self._news.wait()


def questions(text):
    return [md.TuningRequest.query(None, each, context=each) for each in text]


async def test_rollouts_of_many_come_as_they_are_done_and_go_on_a_few_at_once():
    gate = Gate()
    taken = []

    def requests():
        for request in questions("abcde"):
            taken.append(request.context)
            yield request

    gate.let_through("b")
    async with tuning_of(gate.server) as tuning:
        stream = tuning.rollout_stream("01HX", requests(), max_concurrency=2)
        request, rollouts = await anext(stream)
        assert request.context == rollouts.rollouts[0].output.answer == "b"
        await gate.until_asked(2)  # while nobody reads
        assert taken == ["a", "b"]
        gate.let_through(*"acde")
        rest = [request.context async for request, _ in stream]
        assert sorted(rest) == ["a", "c", "d", "e"]


async def test_source_that_waits_for_results_is_served():
    """Each request is made from the result before, as when training decides what is next."""
    gate = Gate()
    gate.let_through("a", "aa", "aaa")
    done = asyncio.Queue()

    async def requests():
        [first] = questions("a")
        yield first
        for _ in range(2):
            yield md.TuningRequest.query(None, "a" + await done.get())

    async with tuning_of(gate.server) as tuning:
        seen = []
        async for _, rollouts in tuning.rollout_stream("01HX", requests()):
            seen.append(rollouts.rollouts[0].output.answer)
            done.put_nowait(seen[-1])
    assert seen == ["a", "aa", "aaa"]


@pytest.mark.parametrize("way", ["left", "cancelled"])
async def test_rollouts_that_are_broken_off_leave_nothing_running(way):
    gate = Gate()
    gate.let_through("a")
    closed = []

    async def requests():
        try:
            for request in questions("abcdefgh"):
                yield request
        finally:
            closed.append(True)

    async with tuning_of(gate.server) as tuning:

        async def read():
            async with contextlib.aclosing(tuning.rollout_stream("01HX", requests())) as stream:
                async for _ in stream:
                    if way == "left":
                        break

        task = asyncio.create_task(read())
        if way == "cancelled":
            await gate.until_asked(4)
            task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() == (way == "cancelled")
        assert closed == [True]
        assert tuning._caller.stats().open_streams == 0


def one_and_no_more():
    yield WHY
    raise KeyError("no more")


@pytest.mark.parametrize(
    ("requests", "kind", "message"),
    [
        ([WHY, md.TuningRequest.detect("gone.jpg", "red")], md.ImageError, r"gone\.jpg"),
        (one_and_no_more(), KeyError, "no more"),
    ],
    ids=["a picture", "the source"],
)
async def test_rollouts_that_fail_end_the_stream(client, finetune, requests, kind, message):
    with pytest.raises(kind, match=message):
        async for _ in client.tuning.rollout_stream(finetune, requests):
            pass
    assert [each async for each in client.tuning.rollout_stream(finetune, [])] == []


# -- training -------------------------------------------------------------------------


async def test_step_learns_the_right_answer(photo):
    request = md.TuningRequest.query(photo, "Where?", reasoning=False)
    group = md.TrainGroup.sft(request, {"answer": "At home"})
    server = replying(STEP)
    async with tuning_of(server) as tuning:
        step = await tuning.train_step("01HX", [group], lr=1e-3, momentum=0.5)
    assert (step.step, step.kl, step.grad_norm) == (7, 0.1, None)
    body = server.requests[0].json
    [sent] = body["groups"]
    assert sent["request"].pop("image_url").startswith("data:image/jpeg;base64,")
    assert sent == {
        "mode": "sft",
        "request": {"skill": "query", "question": "Where?", "reasoning": False},
        "target": {"answer": "At home"},
    }
    assert (body["lr"], body["momentum"]) == (1e-3, 0.5)


async def test_group_may_be_in_the_servers_own_format(client, simulator, finetune, photo):
    group = {
        "mode": "sft",
        "request": {"skill": "point", "object": "red", "image": photo},
        "targets": [{"points": [md.Point(0.5, 0.5)]}],
    }
    assert (await client.tuning.train_step(finetune, [group])).sft_loss > 0
    [sent] = simulator.requests[-1].body["groups"]
    assert sent["request"]["image_url"].startswith("data:image/jpeg;base64,")
    assert "image" not in sent["request"]
    assert sent["targets"] == [{"points": [{"x": 0.5, "y": 0.5}]}]


GROUPS = [{"mode": "sft", "request": {"skill": "query", "question": "?"}}]


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 520])
async def test_step_is_sent_again_only_when_the_server_has_surely_not_made_it(status):
    server = replying(whole({"error": "oh"}, "Retry-After: 0", status=f"{status} Oh"), STEP)
    async with tuning_of(server) as tuning:
        step = await asyncio.gather(tuning.train_step("01HX", GROUPS), return_exceptions=True)
    if status in (425, 429):
        assert (step[0].step, len(server.requests)) == (7, 2)
    else:
        assert (step[0].status, len(server.requests)) == (status, 1)


@pytest.mark.parametrize("kept", [False, True], ids=["new connection", "kept connection"])
async def test_step_whose_connection_breaks_is_not_sent_again(kept):
    """Also on a connection that was kept, where another call would go again at once."""

    async def play(peer):
        if kept:
            await peer.request()
            await peer.send(whole(INFO))
        await peer.request()
        peer.reset()

    server = RawServer(play)
    async with tuning_of(server) as tuning:
        if kept:
            await tuning.get("01HX")
        with pytest.raises(md.APIConnectionError):
            await tuning.train_step("01HX", GROUPS)
    assert [request.method for request in server.requests] == ["GET"] * kept + ["POST"]
    assert len(server.peers) == 1


async def test_step_that_found_no_connection_is_sent_again():
    async with Simulator() as simulator:
        endpoint, port = simulator.endpoint, int(simulator.origin.rpartition(":")[2])
    tries = []

    def retried(event):
        tries.append(event)
        started.set()

    started = asyncio.Event()
    async with md.MoondreamClient(endpoint=endpoint, hooks=md.Hooks(retry=retried)) as client:
        step = asyncio.create_task(client.tuning.train_step("01HX", GROUPS))
        await started.wait()
        async with Simulator(port=port):
            with pytest.raises(md.NotFoundError):  # which is an answer
                await step
    assert tries


async def test_step_waits_longer_than_other_calls_unless_told():
    """The limit of the others passes while the server trains."""
    waited = asyncio.Event()

    async def play(peer):
        request = await peer.request()
        if "train_step" in request.target:
            await waited.wait()
            await peer.send(whole(STEP))
        await peer.until_gone()

    limits = md.Timeout(first_event=0.05)
    async with tuning_of(RawServer(play), timeout=limits, max_retries=0) as tuning:
        step = asyncio.create_task(tuning.train_step("01HX", GROUPS))
        with pytest.raises(md.APITimeoutError):
            await tuning.get("01HX")
        with pytest.raises(md.APITimeoutError) as caught:
            await tuning.train_step("01HX", GROUPS, timeout=0.05)
        assert caught.value.phase == "first_event"
        waited.set()
        assert (await step).step == 7


async def test_metrics_are_logged(client, simulator, finetune):
    logged = await client.tuning.log_metrics(finetune, 3, {"eval/f1": 0.5, "loss": 1})
    assert logged.ok is True
    assert simulator.requests[-1].body == {"step": 3, "metrics": {"eval/f1": 0.5, "loss": 1}}


# -- checkpoints ----------------------------------------------------------------------


async def train(client, finetune, photo, steps):
    request = md.TuningRequest.detect(photo, "red")
    rollouts = await client.tuning.rollouts(finetune, request)
    for _ in range(steps):
        await client.tuning.train_step(finetune, [md.TrainGroup.rl(rollouts, [1])])
        yield await client.tuning.save_checkpoint(finetune)


async def test_checkpoints_are_saved_listed_and_deleted(client, finetune, photo):
    tuning = client.tuning
    with pytest.raises(md.NotFoundError):
        await tuning.save_checkpoint(finetune)  # before any step
    saved = [each async for each in train(client, finetune, photo, 3)]
    assert [checkpoint.step for checkpoint in saved] == [1, 2, 3]
    assert await tuning.save_checkpoint(finetune) == saved[-1]
    listed = [each async for each in tuning.list_checkpoints(finetune, limit=2)]
    assert [each.checkpoint_id for each in listed] == [each.checkpoint_id for each in saved]
    assert listed[0].finetune_id == finetune.finetune_id
    download = await tuning.checkpoint_url(finetune, 1)
    assert download.expires_in == 3600
    assert "X-Signature" in download.url
    assert "Signature" not in repr(download)
    assert await tuning.delete_checkpoint(finetune, 2) is None
    assert [each.step async for each in tuning.list_checkpoints(finetune)] == [1, 3]
    with pytest.raises(md.NotFoundError):
        await tuning.delete_checkpoint(finetune, 9)
    with pytest.raises(md.APIStatusError) as caught:
        await tuning.delete_checkpoint(finetune, 2)
    assert caught.value.status == 410


async def test_checkpoint_is_a_model_like_any_other(client, simulator, finetune, photo):
    [checkpoint] = [each async for each in train(client, finetune, photo, 1)]
    await client.point(photo, "red", model=checkpoint.model())
    expected = f"moondream3-preview/{finetune.finetune_id}@1"
    assert simulator.requests[-1].body["model"] == finetune.model(1) == expected
    batch = await client.batches.create([md.BatchRequest.caption(photo)], model=checkpoint.model())
    assert (await client.batches.wait(batch, interval=0.001)).model == expected
