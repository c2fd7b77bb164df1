"""What type checkers see of the surface, and of the README, is what a caller gets.

Each checker runs once, over `typing/api.py` and the README's snippets. A line there with
``type: ignore`` is a mistake that both must find: one that does not need it is an error.
"""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import get_args

import pytest

import moondream_async as md
from moondream_async._values import Value

ROOT = Path(__file__).parent.parent
API = ROOT / "tests" / "typing" / "api.py"
# What a snippet may leave out, and as most programs are checked that are not libraries.
HEAD = """# pyright: standard
# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, misc"
import asyncio
from pathlib import Path
import moondream_async as md
key = ""
async def snippet() -> None:
"""


@pytest.fixture
def files(tmp_path):
    """The files to check: the surface's, and one for each snippet of the README."""
    readme = (ROOT / "README.md").read_text("utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    paths = [tmp_path / f"readme_{number}.py" for number in range(len(snippets))]
    for path, snippet in zip(paths, snippets, strict=True):
        path.write_text(HEAD + textwrap.indent(snippet, "    "), encoding="utf-8")
    return [API, *paths]


def mypy(files, place):
    # The linters' cache, in which most of it is checked already.
    return ["mypy", "--strict", *map(str, files)]


def basedpyright(files, place):
    settings = {
        "include": [str(path) for path in files],
        "extraPaths": [str(ROOT)],
        "pythonVersion": "3.11",
        "typeCheckingMode": "strict",
        "reportUnnecessaryTypeIgnoreComment": "error",
    }
    (place / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    return ["basedpyright", "--project", str(place), "--pythonpath", sys.executable]


@pytest.mark.slow
@pytest.mark.parametrize("checker", [mypy, basedpyright], ids=lambda each: each.__name__)
def test_the_surface_and_the_readme_are_well_typed(checker, files, tmp_path):
    pytest.importorskip(checker.__name__, reason=f"{checker.__name__} is not installed")
    command = [sys.executable, "-m", *checker(files, tmp_path)]

    run = subprocess.run(command, capture_output=True, check=False, cwd=ROOT, text=True)

    assert run.returncode == 0, run.stdout + run.stderr


KINDS = [  # Result's own keys are those that the others have beside theirs
    kind
    for name in md.__all__
    if isinstance(kind := getattr(md, name), type)
    and issubclass(kind, Value)
    and kind is not md.Result
]


def words(hint):
    """All words of a type: of its ``Literal``s, wherever they stand in it."""
    parts = get_args(hint)
    return {hint} if isinstance(hint, str) else {word for part in parts for word in words(part)}


def test_type_checkers_are_told_every_key():
    for kind in KINDS:
        (base,) = kind.__orig_bases__
        assert words(base) == {name for name in kind.__annotations__ if name[0] != "_"}, kind
