"""Imports, and the first call: what does the start of a program cost?

Each in an interpreter of its own, in turns; what an interpreter takes that does nothing
is taken off, round by round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

from benchmarks.bench import Bench
from benchmarks.results import Outcome, Table, Target

NAME = "imports"
TITLE = "Imports, construction and the first call"
NOTHING = "the interpreter"
AIOHTTP = "import aiohttp"
US = "import moondream_async"
BOTH = "import moondream_async, and a client made"
CODE = {
    NOTHING: "pass",
    AIOHTTP: "import aiohttp",
    US: "import moondream_async",
    BOTH: "import moondream_async as md; md.MoondreamClient(endpoint='http://127.0.0.1:1/v1')",
    "import httpx": "import httpx",
    "import httpx2": "import httpx2",
    "import httpx2, and a client made": "import httpx2; httpx2.AsyncClient()",
    "import openai": "import openai",
    "import openai, and a client made": "import openai; openai.AsyncOpenAI(api_key='none')",
    "import moondream (official SDK)": "import moondream",
}
# The client is made beforehand on another loop, so that its imports are not measured.
FIRST = """
import asyncio, json, sys, time
from benchmarks import contenders

module = contenders.load(sys.argv[1])

async def construct():
    async with module.open(sys.argv[2] + "/kind=call/v1", 10):
        pass

async def main():
    begun = time.process_time()
    async with module.open(sys.argv[2] + "/kind=call/v1", 10) as session:
        await session.call()
        first = time.process_time()
        for _ in range(20):
            await session.call()
        rest = (time.process_time() - first) / 20
    return first - begun, rest

asyncio.run(construct())
print(json.dumps(asyncio.run(main())))
"""
OWN = (
    "A quarter of the import is msgspec with the `typing_extensions` and `inspect` that it loads; "
    "most of the rest is making the types of events, answers and requests."
)
FIRST_CALLS = {
    "floor: aiohttp, post": "floor_aiohttp",
    "moondream_async": "moondream",
    "httpx2": "httpx2_sse",
}


def run(bench: Bench) -> Outcome:
    bench.say(f"{NAME}: {len(CODE)} programs")
    rounds = 2 if bench.quick else 7
    seconds: dict[str, list[float]] = {}
    calls: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as elsewhere:
        code = {what: each for what, each in CODE.items() if _runs(each, elsewhere)}
        for _ in range(rounds):
            for what, each in code.items():
                seconds.setdefault(what, []).append(_cpu(each, elsewhere))
    for _ in range(rounds):
        for what, name in FIRST_CALLS.items():
            if name in bench.left_out:
                continue
            output = subprocess.run(
                [sys.executable, "-c", FIRST, name, bench.origin],
                stdout=subprocess.PIPE,
                check=True,
            ).stdout
            calls.setdefault(what, []).append(json.loads(output))
    nothing = seconds.pop(NOTHING)
    imports = Table(
        "less what the interpreter itself takes",
        "ms of CPU",
        {
            what: [(value - none) * 1e3 for value, none in zip(values, nothing, strict=True)]
            for what, values in seconds.items()
        },
        floor=AIOHTTP,
        us=BOTH,
        digits=0,
    )
    first = Table(
        "first call on a fresh loop",
        "ms of CPU",
        {what: [a * 1e3 for a, _ in values] for what, values in calls.items()},
        floor="floor: aiohttp, post",
        us="moondream_async",
    )
    later = Table(
        "later calls",
        "ms of CPU",
        {what: [b * 1e3 for _, b in values] for what, values in calls.items()},
        floor="floor: aiohttp, post",
        us="moondream_async",
    )
    targets = [
        Target("import, of import aiohttp", imports.ratio(US, AIOHTTP), 0.35, obstacle=OWN),
        Target(
            "import and construction, of import aiohttp",
            imports.ratio(BOTH, AIOHTTP),
            1.2,
            obstacle=OWN,
        ),
    ]
    return Outcome(NAME, TITLE, [imports, first, later], targets)


def _runs(code: str, directory: str) -> bool:
    command = [sys.executable, "-c", code]
    return not subprocess.run(command, cwd=directory, capture_output=True, check=False).returncode


def _cpu(code: str, directory: str) -> float:
    """Return the seconds of the processor that an interpreter takes for some code."""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=directory)
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    return usage.ru_utime + usage.ru_stime
