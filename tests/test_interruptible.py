"""`interruptible`: what Ctrl-C does in a block, in the loops that people run."""

import asyncio
import os
import signal
import threading

import pytest
from programs import STRICT, needs, running

import moondream_async as md

PROGRAM = """
import asyncio, sys
import moondream_async as md

async def describe(client, name):
    async with client.caption({photo!r}, stream=True) as stream:
        async for piece in stream:
            print(name, "reads", flush=True)

async def main():
    async with md.MoondreamClient() as client:
        try:
            with md.interruptible():
                await asyncio.gather(describe(client, "one"), describe(client, "two"))
            print("goes on")
        finally:
            print(client.stats().open_streams, "open", flush=True)

{runner}
"""

RUNNERS = [
    pytest.param("asyncio.run(main())", id="asyncio"),
    pytest.param("import uvloop; uvloop.run(main())", id="uvloop", marks=needs("uvloop")),
]


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("runner", RUNNERS)
async def test_ctrl_c_ends_every_block_and_the_program(runner, simulator, photo, interruptible):
    simulator.faults.append("stall=1,times=2")
    program = PROGRAM.format(photo=str(photo), runner=runner)
    environment = {"MOONDREAM_ENDPOINT": simulator.endpoint}
    async with running(*STRICT, "-c", program, **environment) as process:
        await process.until(lambda said: "one reads" in said and "two reads" in said)
        process.interrupt()
        await simulator.wait_until(lambda: all(each.disconnected for each in simulator.requests))
        status, said, complaints = await process.end()

    assert status in (-signal.SIGINT, 130)
    assert said.splitlines()[-1] == "0 open"
    assert "goes on" not in said
    assert complaints[-1] == "KeyboardInterrupt"
    assert [line for line in complaints if "Warning" in line or "never" in line] == []


async def test_block_that_is_interrupted_raises_and_later_ones_run(client, simulator, photo):
    simulator.faults.append("stall=2")
    read = []

    async def read_and_interrupt():
        with md.interruptible():
            async with client.caption(photo, stream=True) as stream:
                async for piece in stream:
                    read.append(piece)
                    if len(read) == 2:
                        interrupt()

    with pytest.raises(KeyboardInterrupt):
        await read_and_interrupt()
    with md.interruptible():
        answer = await client.caption(photo)

    assert len(read) == 2
    assert answer.caption


async def test_second_interrupt_does_not_wait_for_the_block():
    closed = []

    async def stubborn():
        with md.interruptible():
            asyncio.get_running_loop().call_soon(interrupt)
            try:
                await asyncio.Event().wait()
            finally:
                interrupt()
                closed.append("late")

    with pytest.raises(KeyboardInterrupt):
        await stubborn()
    assert closed == []


async def test_handler_of_the_program_is_back_after_the_last_block():
    before = signal.getsignal(signal.SIGINT)
    first, second = md.interruptible(), md.interruptible()

    first.__enter__()
    second.__enter__()
    assert signal.getsignal(signal.SIGINT) is not before
    second.__exit__(None, None, None)
    assert signal.getsignal(signal.SIGINT) is not before
    first.__exit__(None, None, None)

    assert signal.getsignal(signal.SIGINT) is before


def test_block_in_another_thread_runs_as_without(photo, moondream_simulator):
    answers = []

    async def ask():
        async with md.MoondreamClient() as client:
            with md.interruptible():
                answers.append((await client.caption(photo)).caption)

    thread = threading.Thread(target=asyncio.run, args=[ask()])
    thread.start()
    thread.join()

    assert len(answers) == 1
