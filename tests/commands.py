"""The command line within this process; its fixtures are there without an import.

Only what is about signals, terminals and streams that close runs in a process: see `programs`.
"""

import contextlib
import os
import threading

import pytest

import moondream_async as md
from moondream_async.cli import main


def is_one_line(text):
    return text.startswith("moondream-async: ") and text.endswith("\n") and text.count("\n") == 1


@pytest.fixture
def command(moondream_simulator, tmp_path, monkeypatch, capsys):
    """Runs the command line in a folder of its own; gives its status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    # Between two looks at a batch: a server that goes on with each look needs no time.
    monkeypatch.setitem(md.Batches.wait.__kwdefaults__, "interval", 0.01)

    def run(*args, stdin=b"", **environment):
        with monkeypatch.context() as patch, on_stdin(stdin) as file:
            patch.setattr("sys.stdin", file)
            for name, value in environment.items():
                patch.setenv(name, value)
            status = main([*map(str, args)])
        return (status, *capsys.readouterr())

    return run


@contextlib.contextmanager
def on_stdin(data):
    """Give a command something to read, at most what a pipe holds."""
    before, (ours, its) = os.dup(0), os.pipe()
    os.write(its, data)
    os.close(its)
    os.dup2(ours, 0)
    os.close(ours)
    try:
        with open(0, encoding="utf-8", closefd=False) as file:
            yield file
    finally:
        os.dup2(before, 0)
        os.close(before)


@contextlib.contextmanager
def meanwhile(act):
    """Do something in a thread while a command runs.

    A command that fails may leave the thread at a pipe: it must not hold up the end.
    """
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    yield
    thread.join(60)
    assert not thread.is_alive()
