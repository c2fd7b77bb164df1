"""Hugging Face datasets: made up here, and asked about on loopback."""

import asyncio
import inspect
import subprocess
import sys
import threading
from functools import partial
from importlib.util import find_spec

import anyio
import pytest
from PIL import Image

import moondream_async as md
from moondream_async.integrations.datasets import Secret, ask, asking

INSTALL = "python -m pip install '.[datasets]'"

pytestmark = [
    pytest.mark.skipif(find_spec("datasets") is None, reason=f"needs: {INSTALL}"),
    pytest.mark.usefixtures("hf"),
]


@pytest.fixture
def hf(monkeypatch, tmp_path):
    """The package, offline; the event loops that its `map` leaves open are closed."""
    loops = []
    new_event_loop = asyncio.new_event_loop

    def remembered():
        loops.append(new_event_loop())
        return loops[-1]

    monkeypatch.setattr(asyncio, "new_event_loop", remembered)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import datasets

    datasets.disable_progress_bars()
    yield datasets
    for loop in loops:
        if not loop.is_running():
            loop.close()


async def in_thread(function, *args, **kwargs):
    """`map` blocks, and the simulator is on this loop."""
    return await anyio.to_thread.run_sync(partial(function, *args, **kwargs))


async def test_decoded_pictures_are_asked_about(hf, simulator, client, photo):
    dataset = hf.Dataset.from_dict({"image": [str(photo)]}).cast_column("image", hf.Image())
    answered = await in_thread(ask, dataset, endpoint=simulator.endpoint)
    with Image.open(photo) as image:
        assert answered[0]["caption"] == (await client.caption(image)).caption
    assert answered.features["image"] == dataset.features["image"]


async def test_pictures_that_cannot_be_decoded_are_errors_in_their_rows(hf, simulator, photo):
    features = hf.Features({"image": hf.Image()})
    rows = [photo.read_bytes(), b"no picture", None, photo.read_bytes()]
    rows = [{"image": data and {"bytes": data, "path": None}} for data in rows]
    dataset = hf.Dataset.from_list(rows, features=features)
    answered = await in_thread(ask, dataset, endpoint=simulator.endpoint)
    assert answered["error_type"][:] == [None, "ImageError", "ImageError", None]
    assert [caption is None for caption in answered["caption"]] == [False, True, True, False]


@pytest.mark.slow
async def test_an_error_after_many_answers_has_its_row(hf, simulator, photo):
    dataset = hf.Dataset.from_dict({"image": [str(photo)] * 110 + ["gone.jpg"]})
    map_options = {"writer_batch_size": 10}
    answered = await in_thread(ask, dataset, endpoint=simulator.endpoint, map_options=map_options)
    assert answered["error_type"][:] == [None] * 110 + ["ImageError"]


async def test_no_more_requests_are_open_than_were_allowed(hf, simulator, photo):
    simulator.faults.append("slow_start=3600,times=always")
    dataset = hf.Dataset.from_dict({"image": [str(photo)] * 50})
    with asking(endpoint=simulator.endpoint, max_connections=3) as ask_row:
        rows = [asyncio.ensure_future(ask_row(row)) for row in dataset]
        await simulator.wait_until(lambda: len(simulator.requests) == 3)
        simulator.faults.clear()
        for row in rows[:3]:
            row.cancel()  # frees its place for the next
        await asyncio.wait(rows)
        assert [row.cancelled() for row in rows] == [True] * 3 + [False] * 47
        assert len(simulator.requests) == 50


async def test_streamed_datasets_are_asked_about_as_they_are_read(hf, simulator, photo):
    dataset = hf.Dataset.from_dict({"image": [str(photo)] * 3}).to_iterable_dataset()

    def read():
        with asking(endpoint=simulator.endpoint) as ask_row:
            assert inspect.iscoroutinefunction(ask_row)
            return list(dataset.map(ask_row))

    rows = await in_thread(read)
    assert all("JPEG picture" in row["caption"] for row in rows)


async def test_leaving_closes_the_client_and_ends_its_thread(simulator, photo):
    def ours():
        return [each for each in threading.enumerate() if each.name == "moondream"]

    with asking(endpoint=simulator.endpoint) as ask_row:
        await ask_row({"image": str(photo)})
        assert simulator.connections.open == 1
        assert len(ours()) == 1
    assert not ours()
    await simulator.wait_until(lambda: simulator.connections.open == 0)
    with pytest.raises(md.ClientClosedError):
        await ask_row({"image": str(photo)})


async def test_the_same_asked_again_comes_from_the_cache(hf, simulator, photo, tmp_path):
    hf.Dataset.from_dict({"image": [str(photo)] * 3}).save_to_disk(tmp_path / "photos")
    for _ in range(2):
        dataset = hf.load_from_disk(str(tmp_path / "photos"))
        answered = await in_thread(ask, dataset, endpoint=simulator.endpoint)
        assert "JPEG picture" in answered[2]["caption"]
        assert len(simulator.requests) == 3


@pytest.mark.slow
async def test_several_processes_ask(hf, simulator, photo, tmp_path):
    # In a process of its own, since `datasets` forks and threads run in this one.
    script = (
        "import datasets, sys\n"
        "from moondream_async.integrations.datasets import ask\n"
        "images = datasets.Dataset.from_dict({'image': [sys.argv[1]] * 10})\n"
        "answered = ask(images, num_proc=2, endpoint=sys.argv[2], api_key='k', rate_limit=1000)\n"
        "print(sum('JPEG picture' in each for each in answered['caption']))\n"
    )
    command = [sys.executable, "-c", script, str(photo), simulator.endpoint]
    ran = await in_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    assert ran.stdout == "10\n", ran.stderr
    assert len(simulator.requests) == 10


def test_pickles_of_the_function_have_the_job_and_no_client(photo):
    import dill

    with asking(endpoint="http://localhost:1/v1", api_key=Secret("k")) as ask_row:
        assert dill.dumps(ask_row) == dill.dumps(dill.loads(dill.dumps(ask_row)))
