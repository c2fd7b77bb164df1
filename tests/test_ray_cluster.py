"""The Ray Data stage on a real cluster of several processes, all on loopback."""

import logging
import os
import signal
import tempfile
import threading
import time
import uuid
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from simulate import simulator_process

import moondream_async as md
from moondream_async.integrations.ray import SkillStage, ask

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),  # Ray takes most of a minute to start on a busy machine
    pytest.mark.skipif(find_spec("ray") is None, reason="needs: python -m pip install '.[ray]'"),
    pytest.mark.filterwarnings("default"),  # what Ray and pandas warn of is theirs
]

KEY = "the-key-in-the-environment-of-the-workers"
REFUSED = "a-key-that-was-passed-and-is-refused"


@pytest.fixture(scope="module")
def cluster():
    """Ray with two CPUs; gives the folder of its logs. It leaves no process behind."""
    mark = uuid.uuid4().hex
    # Not pytest's folder: Ray's sockets lie there, and their paths may not be long.
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOONDREAM_TEST_CLUSTER", mark)  # all its processes inherit these
        patch.setenv("MOONDREAM_API_KEY", KEY)
        patch.delenv("MOONDREAM_ENDPOINT", raising=False)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        context = ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100_000_000,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
        try:
            assert context.address_info["node_ip_address"] == "127.0.0.1"
            ray.data.DataContext.get_current().enable_progress_bars = False
            yield Path(folder)
        finally:
            ray.shutdown()
        while processes_with(mark):
            time.sleep(0.05)


def processes_with(mark):
    """The processes, but for this one, that have this in their environment."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in environ.read_bytes() and environ.parent.name != str(os.getpid()):
                found.append(environ.parent.name)
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


@pytest.fixture(autouse=True)
def _nothing_left_open(cluster):
    """Ray keeps some sockets of this process open for good; `cluster` looks for processes."""


@pytest.fixture
def server():
    with simulator_process(KEY) as server:
        yield server


@pytest.fixture
def held_server():
    """One that answers nothing until it is told to go on."""
    with simulator_process(KEY, held=True) as server:
        yield server


def rows_of(images, blocks):
    """A dataset with numbered rows."""
    import ray

    items = [{"number": number, "image": image} for number, image in enumerate(images)]
    return ray.data.from_items(items, override_num_blocks=blocks)


def wait_for(condition):
    while not condition():
        time.sleep(0.02)


def go_on_when_open(server, most, first=lambda: None):
    """Let its requests go on once so many are open; return the thread that waits for that."""

    def wait():
        wait_for(lambda: server.tell()["most_open"] == most)
        first()
        server.go()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_two_actors_ask_with_their_key_have_many_requests_open_and_share_the_rate(
    held_server, photo
):
    pictures = [str(photo)] * 60 + ["gone.jpg"] * 10
    thread = go_on_when_open(held_server, 16)
    answered = ask(
        rows_of(pictures, 14),  # enough blocks to keep both busy
        actors=2,
        endpoint=held_server.endpoint,
        max_connections=8,
        rate_limit=40,
        timeout=md.Timeout(first_event=None),
    ).materialize()
    thread.join()
    types = dict(zip(answered.schema().names, map(str, answered.schema().types), strict=True))
    new = ["caption", "request_id", "finish_reason", "error_type", "error_message"]
    assert types == {"number": "int64", "image": "string", **dict.fromkeys(new, "string")}
    rows = sorted(answered.take_all(), key=lambda row: row["number"])
    assert [row["number"] for row in rows] == list(range(70))
    assert all("JPEG picture" in row["caption"] for row in rows[:60])
    assert {row["error_type"] for row in rows[:60]} == {None}
    assert {row["error_type"] for row in rows[60:]} == {"ImageError"}
    told = held_server.tell()
    assert told["requests"] == 60
    # One of the two sent 30 at least, each 1/20 of a second after the one before.
    assert told["span"] >= 29 / 20 * 0.99


def test_a_refused_key_ends_the_run_and_is_printed_nowhere(server, cluster, photo, capfd):
    from ray.exceptions import UserCodeException

    rows = rows_of([str(photo)] * 40, 4)
    answered = ask(rows, actors=1, api_key=REFUSED, endpoint=server.endpoint)
    answered.explain()
    with pytest.raises(UserCodeException) as caught:
        answered.materialize()
    assert "AuthenticationError: Invalid API key" in str(caught.value)
    shown = f"{answered!r} {answered} {answered.stats()} {caught.value!r} {caught.value}"
    assert REFUSED not in shown
    assert REFUSED not in "".join(capfd.readouterr())
    logs = [path for path in cluster.rglob("*") if path.is_file()]
    assert len(logs) > 10
    assert not [path for path in logs if REFUSED.encode() in path.read_bytes()]


def test_a_killed_worker_loses_no_row_and_doubles_none(held_server, photo, tmp_path):
    import ray

    class Known(SkillStage):  # within the test, so that it goes to the workers by value
        def __init__(self, **arguments):
            super().__init__(**arguments)
            (tmp_path / str(os.getpid())).touch()

        def __del__(self):
            (tmp_path / f"{os.getpid()}.gone").touch()

    def workers():
        return sorted(int(path.name) for path in tmp_path.iterdir() if not path.suffix)

    answered = rows_of([str(photo)] * 64, 8).map_batches(
        Known,
        fn_constructor_kwargs={
            "actors": 2,
            "endpoint": held_server.endpoint,
            "max_connections": 8,
            "timeout": md.Timeout(first_event=None),
        },
        batch_format="pyarrow",
        batch_size=8,
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=0.25,
    )
    killed = []

    def kill_one():
        killed.append(workers()[0])
        os.kill(killed[0], signal.SIGKILL)

    thread = go_on_when_open(held_server, 16, first=kill_one)  # both are in the middle
    rows = answered.take_all()
    thread.join()
    assert Counter(row["number"] for row in rows) == Counter(range(64))
    assert all("JPEG picture" in row["caption"] for row in rows)
    assert held_server.tell()["requests"] == 64 + 8  # those of the killed one went out again
    # Ray lets go of the stage, which closes its client, in each worker that ends by itself.
    left = {pid for pid in workers() if pid not in killed}
    assert left
    wait_for(lambda: all((tmp_path / f"{pid}.gone").exists() for pid in left))
