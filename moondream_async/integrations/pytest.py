"""A fixture for users' tests: a simulator that gives the answers that a test scripts.

pytest loads this module wherever the package is installed. A test that takes the fixture
`moondream_simulator` has a `SimulatorThread` of its own, on a free port of this machine::

    def test_text_is_passed_on_while_it_is_written(http, moondream_simulator, photo):
        answer = moondream_simulator.script.caption(["A red", " circle."], hold_after=1)
        with http.stream("POST", "/describe", content=photo.read_bytes()) as response:
            pieces = response.iter_text()
            assert next(pieces) == "A red"  # and the rest is yet to be written
            answer.release()
            assert "".join(pieces) == " circle."

Here `http` is an HTTP client of the user's application, which runs in the test's event
loop, in a thread or in another process. A test of a streamed response needs a real socket,
since the in-memory transports of httpx and Starlette wait for the response's end. The
application needs no change: during the test ``MOONDREAM_ENDPOINT`` names the simulator and
``MOONDREAM_API_KEY`` is not set, for every client made without `endpoint` and `api_key`.

Plain tests and ``async def`` tests under any plugin can use these attributes:

- `script` has a method for each skill: ``script.caption("A red circle.")`` is the answer to
  the next caption. Without a script the answer is a measurement of the picture. With
  `hold_after` an answer stops in the middle until its `release`.
- `faults` takes failures: ``faults.append("status=503,retry_after=1")``. A scripted answer
  takes them as `fault`. ``moondream-async serve --fault help`` lists all faults.
- `requests` holds the requests received: each has its `path`, its decoded `body`, its
  `images` as bytes of files, and `disconnected`, which is true if its client went away.
- `wait_until` blocks until a condition is true; ``await ...until`` is for coroutines.

A test fails if a scripted answer was not taken by a request, or a fault did not strike,
unless the test has failed before. Answers and faults for any number of requests
(``times=None``, ``times=always``) are exempt.

The marker takes the arguments of `Simulator`, and `allow_unused`::

    @pytest.mark.moondream_simulator(dialect="station", allow_unused=True)

With an `api_key` in the marker the simulator accepts this key alone, and
``MOONDREAM_API_KEY`` is set to it. For a server that several tests share, write a fixture
around `SimulatorThread`.
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
    """Register the marker."""
    config.addinivalue_line("markers", _MARKER)


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Remember whether a test failed: then unused answers are no further failure."""
    item.stash[_has_failed] = call.excinfo is not None


@pytest.fixture
def moondream_simulator(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SimulatorThread]:
    """A server of the Moondream API with scripted answers.

    Its endpoint is in the environment while the test runs.
    """
    # Every session of pytest loads this module; the simulator is loaded when it is used.
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
