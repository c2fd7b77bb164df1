"""What users' tests get: the fixture here, as everybody has it, and pytest in sub-runs."""

import asyncio
import concurrent.futures
import os
import re
import socket
import textwrap
import threading
from pathlib import Path

import pytest
from programs import run as run_program

import moondream_async as md
from moondream_async.integrations import pytest as plugin
from moondream_async.simulator import SAMPLE_IMAGE, Simulator, SimulatorThread

TEXT = "A red circle."
HERE = Path(__file__).parent
RECIPE = HERE / "recipes" / "test_streaming_route.py"
README = HERE.parent / "README.md"


def ask():
    """What an application does that makes its client by itself."""

    async def caption():
        async with md.MoondreamClient() as client:
            return (await client.caption(SAMPLE_IMAGE)).caption

    return asyncio.run(caption())


# -- the fixture ---------------------------------------------------------------------------


def test_plain_test_has_a_server_that_says_what_it_is_told_to(moondream_simulator):
    moondream_simulator.script.caption(TEXT)

    assert ask() == TEXT
    [request] = moondream_simulator.requests
    assert request.path == "/v1/caption"
    assert request.images == [SAMPLE_IMAGE.read_bytes()]


async def test_coroutine_has_the_same_server(moondream_simulator):
    answer = moondream_simulator.script.query(["A red", " circle."], hold_after=1)

    async with (
        md.MoondreamClient() as client,
        client.query(SAMPLE_IMAGE, "What is it?", stream=True) as stream,
    ):
        assert await anext(stream.chunk) == "A red"
        await moondream_simulator.until(lambda: moondream_simulator.requests[0].held)
        answer.release()
        assert await stream.text() == "A red circle."
    await moondream_simulator.until(lambda: moondream_simulator.connections.open == 0)


async def test_server_is_there_for_other_processes(moondream_simulator, photo):
    moondream_simulator.script.caption(TEXT)

    assert await run_program("caption", photo) == (0, f"{TEXT}\n", "")
    assert [request.status for request in moondream_simulator.requests] == [200]


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv("MOONDREAM_ENDPOINT", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("MOONDREAM_API_KEY", "the user's own")


def test_users_own_key_and_endpoint_are_out_of_reach(environment, moondream_simulator):
    assert os.environ["MOONDREAM_ENDPOINT"] == moondream_simulator.endpoint
    assert "MOONDREAM_API_KEY" not in os.environ


@pytest.mark.moondream_simulator("kestrel")
def test_marker_names_the_dialect(moondream_simulator):
    assert repr(moondream_simulator).startswith("<SimulatorThread kestrel: http://127.0.0.1:")


@pytest.mark.moondream_simulator(api_key="right")
def test_key_of_the_marker_is_asked_for(moondream_simulator, monkeypatch):
    assert os.environ["MOONDREAM_API_KEY"] == "right"
    assert "JPEG picture" in ask()
    monkeypatch.setenv("MOONDREAM_API_KEY", "wrong")
    with pytest.raises(md.AuthenticationError):
        ask()


@pytest.mark.moondream_simulator(allow_unused=True)
def test_answers_may_be_left_over_when_the_marker_says_so(moondream_simulator):
    moondream_simulator.script.caption(TEXT)
    moondream_simulator.faults.append("status=503")


def test_answers_and_faults_for_any_number_of_requests_may_be_left_over(moondream_simulator):
    moondream_simulator.script.caption(TEXT, times=None)
    moondream_simulator.faults.append("status=503,times=always")


# -- the server in its thread --------------------------------------------------------------


def test_nothing_is_left_of_the_server_when_it_is_left():
    before = set(threading.enumerate())
    with SimulatorThread() as simulator:
        port = int(simulator.endpoint.split(":")[2].removesuffix("/v1"))
        connection = socket.create_connection(("127.0.0.1", port))
        simulator.wait_until(lambda: simulator.connections.open == 1)
    with connection:
        assert connection.recv(1) == b""
    assert set(threading.enumerate()) <= before
    assert repr(simulator) == "<SimulatorThread cloud: not listening>"


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize("way", ["wait_until", "until"])
def test_leaving_ends_who_waits_in_another_thread_and_leaves_no_task(way):
    before = set(threading.enumerate())
    asked = threading.Event()  # set by the condition, which is never true

    def wait():
        waited = getattr(simulator, way)(asked.set, timeout=60)
        return waited and asyncio.run(waited)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        with SimulatorThread() as simulator:
            waiting = pool.submit(wait)
            asked.wait()
        with pytest.raises(RuntimeError, match="was left"):
            waiting.result()
    assert set(threading.enumerate()) <= before


def test_place_that_is_taken_is_an_error_where_it_is_entered():
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        simulator = SimulatorThread(Simulator(port=taken.getsockname()[1]))
        with pytest.raises(OSError, match="address already in use"):
            simulator.__enter__()
    assert set(threading.enumerate()) <= before


async def test_waiting_in_vain_ends_with_what_was_received(moondream_simulator):
    moondream_simulator.script.caption(TEXT)
    await asyncio.to_thread(ask)
    told = pytest.raises(TimeoutError, match=r"not so within 0.01 seconds; .*/caption: 200")
    with told:
        await asyncio.to_thread(moondream_simulator.wait_until, lambda: False, timeout=0.01)
    with told:
        await moondream_simulator.until(lambda: False, timeout=0.01)
    with pytest.raises(RuntimeError, match="until"):
        moondream_simulator.wait_until(lambda: True)  # which would hold up the loop


def test_error_in_a_condition_is_raised_where_it_is_waited_for(moondream_simulator):
    with pytest.raises(IndexError):
        moondream_simulator.wait_until(lambda: moondream_simulator.requests[0].held)


# -- pytest itself -------------------------------------------------------------------------

pytest_plugins = ["pytester"]


@pytest.fixture
def run(pytester, monkeypatch):
    """Run tests as users do: a pytest of their own, in which every warning is an error."""
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", raising=False)

    def run(source, *arguments):
        pytester.makepyfile(textwrap.dedent(source))
        return pytester.runpytest_subprocess("-Werror", "--strict-markers", *arguments)

    return run


@pytest.mark.slow
def test_plugin_is_found_and_is_light_and_quiet_where_it_is_not_used(run):
    result = run(
        """
        import sys

        def test_what_is_loaded():
            heavy = {"aiohttp", "anyio", "asyncio", "PIL", "ssl", "moondream_async.simulator"}
            assert "moondream_async.integrations.pytest" in sys.modules
            assert heavy.isdisjoint(sys.modules), heavy & sys.modules.keys()

        def test_no_other_plugin_is_needed(moondream_simulator):
            assert moondream_simulator.requests == []
        """,
        # Others' plugins, which may load anything.
        *("-p", "no:anyio", "-p", "no:xdist", "-p", "no:timeout", "-p", "no:pytester"),
    )
    result.assert_outcomes(passed=2)


@pytest.mark.slow
def test_every_test_has_a_server_to_itself_and_what_was_never_asked_for_is_an_error(run):
    result = run(
        """
        import asyncio
        import pytest
        import moondream_async as md
        from moondream_async.simulator import SAMPLE_IMAGE

        async def captions():
            async with md.MoondreamClient() as client:
                return [(await client.caption(SAMPLE_IMAGE)).caption for _ in range(3)]

        @pytest.mark.parametrize("number", range(3))
        def test_plain(moondream_simulator, number):
            moondream_simulator.script.caption(str(number), times=3)
            assert asyncio.run(captions()) == [str(number)] * 3

        @pytest.mark.anyio
        @pytest.mark.parametrize("anyio_backend", ["asyncio"])
        async def test_with_anyio(moondream_simulator):
            moondream_simulator.script.caption("anyio", times=3)
            assert await captions() == ["anyio"] * 3
            assert len(moondream_simulator.requests) == 3

        @pytest.mark.moondream_simulator(dialect="station")
        def test_with_the_marker(moondream_simulator):
            assert "station" in repr(moondream_simulator)

        def test_unused(moondream_simulator):
            moondream_simulator.script.caption("A red circle.", times=2)
            moondream_simulator.faults.append("status=503,retry_after=1")

        def test_failed_before(moondream_simulator):
            moondream_simulator.script.caption("A red circle.")
            assert False

        def test_skipped(moondream_simulator):
            moondream_simulator.script.caption("A red circle.")
            pytest.skip()

        @pytest.mark.moondream_simulator(dialekt="station")
        def test_misspelled(moondream_simulator):
            pass
        """,
        "-n1",
    )
    result.assert_outcomes(passed=6, failed=1, skipped=1, errors=2)
    result.stdout.fnmatch_lines(
        [
            "no request came for",
            "  script.caption('A red circle.', times=2)",
            "  fault status=503,retry_after=1",
            "but these: []",
            "*unexpected keyword argument 'dialekt'*",
        ]
    )


def test_marker_is_in_the_list_of_markers(pytestconfig):
    assert plugin._MARKER in pytestconfig.getini("markers")


# -- the documents -------------------------------------------------------------------------


def documented():
    """The examples of the fixture, wherever they are printed."""
    lines = re.split(r"::$", plugin.__doc__, maxsplit=1, flags=re.MULTILINE)[1]
    yield pytest.param(re.match(r"(?:\n|    .*\n)+", lines)[0], id="module")
    blocks = re.findall(
        r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    for block in blocks:
        if "moondream_simulator" in block:
            yield pytest.param(block, id="README")


@pytest.mark.parametrize("block", list(documented()))
def test_example_is_one_that_runs(block):
    example = textwrap.dedent(block).strip()

    assert "def test_" in example
    assert example in RECIPE.read_text(encoding="utf-8")
