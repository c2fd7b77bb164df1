"""For users' tests: a fixture with a server of the test's own, that says what it is told to.

pytest finds this module by itself wherever the package is installed. A test that takes
`moondream_simulator` has a `SimulatorThread` to itself, on a free port of this machine::

    def test_text_is_passed_on_while_it_is_written(http, moondream_simulator, photo):
        answer = moondream_simulator.script.caption(["A red", " circle."], hold_after=1)
        with http.stream("POST", "/describe", content=photo.read_bytes()) as response:
            pieces = response.iter_text()
            assert next(pieces) == "A red"  # and the rest is yet to be written
            answer.release()
            assert "".join(pieces) == " circle."

There `http` is a client of the user's own application, run in any way: in the test's
event loop, in a thread, in another process. A response that streams needs a real
socket, as the in-memory transports of httpx and Starlette wait for its end. The
application needs to know nothing of the test: while that runs, ``MOONDREAM_ENDPOINT``
is the simulator's, and ``MOONDREAM_API_KEY`` is not set, for every client that is made
without `endpoint` and `api_key`.

What the test can do, from plain functions and from ``async def`` under any plugin:

- `script` says what is answered: ``script.caption("A red circle.")``, likewise for every
  skill. What isn't scripted is answered with measurements of the picture. With
  `hold_after` an answer stops in the middle until its `release`.
- `faults` says what goes wrong: ``faults.append("status=503,retry_after=1")``; so does
  `fault` with a scripted answer. ``moondream-async serve --help`` lists the faults.
- `requests` tells what came: each has its `path`, its decoded `body`, its `images` as the
  files that they are, and what became of it: `disconnected` if its client went away.
- `wait_until` blocks until a condition on these is true; ``await ...until`` is for the tests
  that are coroutines.

A scripted answer that no request took is an error of the test that it was scripted in, and
so is a fault that never struck, unless the test has failed before. Those for any number of
requests (``times=None``, ``times=always``) are exempt.

The marker takes the arguments of `Simulator`, and `allow_unused`::

    @pytest.mark.moondream_simulator(dialect="station", allow_unused=True)

An `api_key` that is given there is the one that the simulator wants to see, and then
``MOONDREAM_API_KEY`` is set to it. For a server that several tests share, make a fixture
of your own around `SimulatorThread`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from moondream_async.simulator import SimulatorThread

_MARKER = (
    "moondream_simulator(dialect='cloud', *, rate=0, api_key=None, allow_unused=False, ...): "
    "how the fixture of this name is set up: the arguments of moondream_async's Simulator, and "
    "whether answers and faults may be left over."
)

_has_failed = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", _MARKER)


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Remember whether a test was left by an exception: then more is left over than it meant."""
    item.stash[_has_failed] = call.excinfo is not None


@pytest.fixture
def moondream_simulator(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SimulatorThread]:
    """A server of the Moondream API that says what it is told to.

    Its endpoint is in the environment while the test runs.
    """
    # Every session of pytest loads this module; only those that use it wait for the server's.
    from moondream_async.simulator import Simulator, SimulatorThread  # noqa: PLC0415

    marker = request.node.get_closest_marker("moondream_simulator")
    arguments, options = (marker.args, dict(marker.kwargs)) if marker else ((), {})
    allow_unused = options.pop("allow_unused", False)
    with SimulatorThread(Simulator(*arguments, **options)) as simulator:
        monkeypatch.setenv("MOONDREAM_ENDPOINT", simulator.endpoint)
        if options.get("api_key"):
            monkeypatch.setenv("MOONDREAM_API_KEY", options["api_key"])
        else:
            monkeypatch.delenv("MOONDREAM_API_KEY", raising=False)
        yield simulator
    if allow_unused or request.node.stash.get(_has_failed, False):
        return
    unused = [f"script.{answer}" for answer in simulator.script.unused]
    unused += [f"fault {fault}" for fault in simulator.faults.unused]
    if unused:
        pytest.fail(
            "no request came for\n  " + "\n  ".join(unused) + f"\nbut these: {simulator.requests}",
            pytrace=False,
        )
