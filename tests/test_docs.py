"""The README's snippets, run as they stand."""

import ast
import re
import shutil
import textwrap
from pathlib import Path

import pytest

import moondream_async as md

README = Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(
    r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.DOTALL | re.MULTILINE
)


@pytest.fixture
def place(tmp_path, photo, monkeypatch, simulator):
    """A folder with a photo in it, and the simulator in place of the cloud."""
    shutil.copy(photo, tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOONDREAM_ENDPOINT", simulator.endpoint)
    return simulator


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
async def test_readme_snippet_runs(number, place, capsys):
    code = SNIPPETS[number].replace("asyncio.run(main())", "await main()")
    body = textwrap.indent(code, "    ")
    namespace = {"md": md, "key": "a key"}
    exec(compile(ast.parse(f"async def snippet():\n{body}"), str(README), "exec"), namespace)
    await namespace["snippet"]()
    printed = capsys.readouterr().out
    if "print(chunk" in code:
        assert len(printed) > 20
    if "client.caption(" in code:
        assert "JPEG picture, mostly white" in printed


def test_readme_begins_with_the_two_commands():
    blocks = re.findall(
        r"^```(\w+)\n(.*?)^```$", README.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    assert [kind for kind, _ in blocks[:2]] == ["sh", "sh"]
    assert blocks[0][1].rstrip().endswith("moondream-async demo")
    assert blocks[1][1].rstrip().endswith("-m tests")
