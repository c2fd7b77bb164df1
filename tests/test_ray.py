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
from moondream_async.integrations.ray import Secret, SkillStage

KEY = "a-key-that-was-passed"


# -- arguments ------------------------------------------------------------------------


def test_stage_takes_no_plain_string_for_a_key_and_does_not_show_it():
    with pytest.raises(md.RequestError, match="Secret") as caught:
        SkillStage(api_key=KEY)
    assert KEY not in str(caught.value)


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


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what Ray warns of is its own
@pytest.mark.parametrize("sizes", [[20, 20, 20], [20, 21, 22]], ids=["of one size", "of several"])
async def test_arrays_are_read_from_columns_as_ray_makes_them(pa, simulator, sizes):
    tensors = pytest.importorskip("ray.data.extensions", reason="needs: pip install '.[ray]'")
    pictures = [np.full((height, 30, 3), 200, np.uint8) for height in sizes]
    column = tensors.TensorArray(pictures).__arrow_array__()
    rows = await SkillStage(endpoint=simulator.endpoint)(pa.table({"image": column}))
    for caption, height in zip(rows["caption"].to_pylist(), sizes, strict=True):
        assert f"30\N{MULTIPLICATION SIGN}{height} PNG picture" in caption


async def test_every_batch_has_the_same_types_whatever_happened_in_it(pa, simulator, photo):
    stage = SkillStage("detect", object="shape", endpoint=simulator.endpoint)
    good = await stage(pa.table({"image": [str(photo)]}))
    bad = await stage(pa.table({"image": ["gone.jpg"]}))
    assert good.schema == bad.schema
    (box, *_) = good["objects"][0].as_py()
    assert box.keys() == {"x_min", "y_min", "x_max", "y_max"}
    assert bad["objects"][0].as_py() is None


async def test_reasoning_is_a_column_where_it_was_asked_for(pa, simulator, photo):
    stage = SkillStage("query", question="How large?", reasoning=True, endpoint=simulator.endpoint)
    table = await stage(pa.table({"image": [str(photo)]}))
    assert table["reasoning"][0].as_py()


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
