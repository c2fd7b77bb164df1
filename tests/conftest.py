"""What tests share: a simulator, a client of it, a picture, and a look at what is left behind."""

import gc
import logging
import os
import signal
import socket
from pathlib import Path

import forked
import pytest
from hypothesis import settings
from own_clock import OwnClock

import moondream_async as md
from moondream_async.simulator import SAMPLE_IMAGE, Simulator

# How many inputs are tried; a busy machine is no failure. "fast" is for the runs on the other
# Python versions, "thorough" for a search by hand: pytest --hypothesis-profile=thorough.
settings.register_profile("gate", max_examples=50, deadline=None)
settings.register_profile("fast", max_examples=15, deadline=None)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile("gate")

pytest_plugins = [
    "commands",
    "bulk_runs",
    "examples",
]  # the docstrings stand outside of this folder

# Keeps Ray on loopback. It is read when Ray is imported, by whichever test is the first.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

# Programs that are run, and not imported in search of doctests: each needs what it shows. (Not
# in a file of their folder's: it would stand in the way of whoever imports this one.)
collect_ignore = [
    str(path)
    for path in Path(__file__).parent.glob("recipes/*.py")
    if not path.name.startswith("test_")
]


@pytest.fixture
def clock(monkeypatch):
    return OwnClock(monkeypatch)


@pytest.fixture
def anyio_backend(request):
    if request.node.get_closest_marker("own_time") is None:
        return "asyncio"  # what aiohttp runs on
    return "asyncio", {"loop_factory": request.getfixturevalue("clock").new_loop}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in ("MOONDREAM_API_KEY", "MOONDREAM_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


FDS = "/proc/self/fd"


def open_sockets() -> set[str]:
    """The sockets of this process, where the system can tell."""
    found = set()
    if not os.path.isdir(FDS):  # noqa: PTH112 - pathlib takes five times as long, twice a test
        return found
    for number in os.listdir(FDS):  # noqa: PTH208 - likewise
        try:
            target = os.readlink(f"{FDS}/{number}")  # noqa: PTH115 - likewise
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


@pytest.fixture(autouse=True)
def _nothing_left_open(_clean_environment):
    """Fail a test that leaves a socket behind; warnings, being errors, find the rest."""
    before = open_sockets()
    yield
    left = open_sockets() - before
    if left:
        gc.collect()  # only to say, by its warnings, what it was
    assert not left, f"{len(left)} sockets left open"


@pytest.fixture
def silence(_nothing_left_open, caplog):
    """No log record, and, once all garbage is gone, no warning."""
    yield
    gc.collect()
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING] == []


@pytest.fixture
def interruptible():
    """What ignores Ctrl-C, as background jobs of some shells do, passes that on to its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def dialect():
    """What the simulator speaks; to be parametrized."""
    return "cloud"


@pytest.fixture
async def simulator(dialect):
    async with Simulator(dialect) as simulator:
        yield simulator


@pytest.fixture
async def client(simulator):
    async with md.MoondreamClient(endpoint=simulator.endpoint) as client:
        yield client


@pytest.fixture
def nobody():
    """An endpoint where nobody listens."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{reserved.getsockname()[1]}/v1"


@pytest.fixture
def photo():
    return SAMPLE_IMAGE


LONGEST = ("test_ray_cluster.py", "test_web_page.py", "test_recipes_apps.py", "test_typing.py")


def pytest_sessionstart(session):
    """Before the workers of xdist: what they fork programs from, imports all once."""
    if session.config.getoption("numprocesses", None) and not session.config.option.collectonly:
        forked.share()


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, each in a worker of its own.

    Every worker is given as many tests as the others, one after the other in this list, and
    takes more from the others when it is done.
    """
    share = len(items) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    longest = {name: [item for item in items if item.path.name == name] for name in LONGEST}
    items[:] = [item for item in items if item.path.name not in LONGEST]
    for number, found in enumerate(longest.values()):
        items[number * share : number * share] = found


def pytest_collection_finish(session):
    """Spare the collector, which many tests call, a look at all that pytest has loaded."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser):
    parser.addoption("--fault-report", action="store_true", help="print the fault table")
    parser.addoption(
        "--disconnect-report",
        action="store_true",
        help="print how long requests outlive the browsers that they were made for",
    )


_fault_report = pytest.StashKey[list[str]]()
_disconnect_report = pytest.StashKey[list[str]]()


def pytest_configure(config):
    config.stash[_fault_report] = []
    config.stash[_disconnect_report] = []


@pytest.fixture
def fault_report(request):
    """Where the fault table notes a line a fault."""
    return request.config.stash[_fault_report]


@pytest.fixture
def disconnect_report(request):
    """Where a line is noted for each browser that went away."""
    return request.config.stash[_disconnect_report]


def pytest_terminal_summary(terminalreporter, config):
    reports = {"--fault-report": _fault_report, "--disconnect-report": _disconnect_report}
    for option, key in reports.items():
        if config.getoption(option):
            terminalreporter.section(option)
            for line in config.stash[key]:
                terminalreporter.write_line(line)
