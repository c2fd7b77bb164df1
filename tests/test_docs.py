"""The README's snippets, run as they stand."""

import ast
import re
import shutil
import textwrap
from pathlib import Path

import pytest

import moondream_async as md
from moondream_async.batch import batches
from moondream_async.tuning import finetunes

README = Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(
    r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.DOTALL | re.MULTILINE
)


@pytest.fixture
def place(tmp_path, photo, monkeypatch, simulator):
    """A folder with a photo in it, by several names, and the simulator in place of the cloud."""
    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "hall.jpg", "photos/photo.jpg"):
        shutil.copy(photo, tmp_path / name)
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


@pytest.mark.parametrize(
    ("module", "said"),
    [(batches, r"photo\.jpg A bright 640"), (finetunes, r"1 [\d.]+\nPointResult\(")],
    ids=["batches", "finetunes"],
)
async def test_example_of_a_module_runs(module, said, place, capsys):
    example = re.search(r"::\n\n((?: {4}.*\n)+)", module.__doc__)[1]
    namespace = {"md": md, "Path": Path}
    exec(f"async def example():\n{example}", namespace)
    await namespace["example"]()
    assert re.match(said, capsys.readouterr().out)


def test_readme_begins_with_the_two_commands():
    blocks = re.findall(
        r"^```(\w+)\n(.*?)^```$", README.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    assert [kind for kind, _ in blocks[:2]] == ["sh", "sh"]
    assert blocks[0][1].rstrip().endswith("moondream-async demo")
    assert blocks[1][1].rstrip().endswith("-m tests")
