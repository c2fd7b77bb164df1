"""Who may import whom, read from the syntax trees; and what importing the package loads.

A room is a module or a package right below `moondream_async`. Imports run one way, also
those inside functions: from the end of `ROOMS` towards its beginning.
"""

import ast
import functools
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import moondream_async

pytestmark = pytest.mark.slow  # the same on every Python

PACKAGE = Path(moondream_async.__file__).parent

# Each imports of those before it only, as DESIGN.md draws them. A new room takes its place here.
ROOMS = [
    "_version",
    "errors",
    "_checks",
    "types",
    "_values",
    "results",
    "_protocol",
    "_images",
    "_draw",
    "_transport",
    "_stream",
    "_call",
    "_server",
    "_skills",
    "batch",
    "tuning",
    "bulk",
    "watch",
    "frames",
    "_client",
    "_ft",
    "__init__",
    "simulator",
    "web",
    "integrations",
    "cli",
    "__main__",
]
PURE = {"_version", "errors", "_checks", "types", "_values", "results", "_protocol", "_images"}

EXCEPTIONS = {
    # A result draws itself over its picture, and only then is Pillow needed.
    ("results", "_draw"),
}


class Import(NamedTuple):
    """One name that one module imports."""

    file: str
    line: int
    target: str
    """In full, as ``moondream_async.types.Point`` or ``aiohttp.web``."""
    for_types: bool
    """Whether it stands in an ``if TYPE_CHECKING:``."""
    at_once: bool
    """Whether it is done as the module is loaded, and not in a function's time."""

    @property
    def importer(self):
        """The room that it stands in."""
        return room_of(PACKAGE / self.file)

    @property
    def room(self):
        """The room that it reaches into, "__init__" for the surface; None outside the package."""
        package, _, rest = self.target.partition(".")
        room = rest.partition(".")[0]
        return None if package != PACKAGE.name else room if room in ROOMS else "__init__"


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_name(path):
    parts = (PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path):
    """Every import of a file, wherever in it it stands."""
    file = path.relative_to(PACKAGE)
    package = (PACKAGE.name, *file.parts[:-1])  # of this module, or that it is

    def walk(node, *, for_types, at_once):
        at_once = at_once and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        only_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            within = for_types or (only_types and child in node.body)
            names = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) + 1 - child.level] if child.level else ()
                module = [*base, *filter(None, [child.module])]
                names = [".".join([*module, alias.name]) for alias in child.names]
            for name in names:
                yield Import(str(file), child.lineno, name, within, at_once)
            yield from walk(child, for_types=within, at_once=at_once)

    yield from walk(tree_of(path), for_types=False, at_once=True)


@functools.cache
def imports():
    return [each for path in sources() for each in imports_of(path)]


def test_imports_run_one_way_but_for_the_exceptions():
    assert {room_of(path) for path in sources()} <= set(ROOMS)  # every room has its place

    against = [
        each
        for each in imports()
        if each.room and ROOMS.index(each.room) > ROOMS.index(each.importer)
    ]

    assert {(each.importer, each.room) for each in against} == EXCEPTIONS, against


def loaded_first(each, names):
    """The modules that must be loaded before the one that this import stands in goes on."""
    importer = module_name(PACKAGE / each.file)
    target = each.target if each.target in names else each.target.rpartition(".")[0]
    parts = target.split(".")
    packages = {".".join(parts[:end]) for end in range(1, len(parts))}
    return {target} | {name for name in packages if not f"{importer}.".startswith(f"{name}.")}


def test_no_module_waits_for_itself_so_that_each_can_be_the_first():
    names = {module_name(path) for path in sources()}
    graph = {name: set() for name in names}
    for each in imports():
        if each.room and each.at_once and not each.for_types:
            importer = module_name(PACKAGE / each.file)
            graph[importer] |= loaded_first(each, names) - {importer}

    assert set(TopologicalSorter(graph).static_order()) == names  # or a CycleError, with its circle


def test_no_module_imports_from_the_package_as_a_whole_from_inside():
    """It would work only when all of it has been loaded."""
    outside = {"__main__", "cli", "simulator", "integrations", "web"}

    assert {each.importer for each in imports() if each.room == "__init__"} <= outside


def test_the_pure_rooms_know_no_loop_no_clock_no_date_and_no_chance():
    forbidden = {
        "aiohttp", "anyio", "asyncio", "concurrent", "http", "multiprocessing", "random", "secrets",
        "select", "selectors", "socket", "ssl", "subprocess", "time", "urllib3", "uuid", "yarl",
    }  # fmt: skip
    pure = [each for each in imports() if each.importer in PURE and not each.for_types]
    asked = [
        (path.name, node.lineno)
        for path in sources()
        if room_of(path) in PURE
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and node.attr in ("now", "utcnow", "today")
    ]

    assert [each for each in pure if each.target.split(".")[0] in forbidden] == []
    assert asked == []


def test_the_transport_alone_imports_the_client_of_aiohttp():
    of_aiohttp = [each for each in imports() if each.target.split(".")[0] == "aiohttp"]
    of_servers = {each.target for each in of_aiohttp if each.importer in ("simulator", "web")}

    importers = {each.importer for each in of_aiohttp if not each.for_types}
    assert importers == {"_transport", "simulator", "web"}
    assert of_servers <= {"aiohttp.hdrs", "aiohttp.web"}


def test_the_simulator_shares_nothing_with_the_client_but_its_types():
    """A shared decoder would share its mistakes."""
    shared = {each.room for each in imports() if each.importer == "simulator" and each.room}

    assert shared <= {"simulator", "types", "results"}


def test_nothing_imports_an_integration():
    assert {each.importer for each in imports() if each.room == "integrations"} <= {"integrations"}


# -- private names of others ---------------------------------------------------------------


def test_private_names_and_modules_of_other_libraries_are_used_in_one_place():
    """A private name is of ours where some module of ours defines or sets it."""
    ours = {"_fields", "_asdict", "_replace", "_getframe"}  # these are public
    used = set()
    for path in sources():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                ours.add(node.name)
            elif isinstance(node, ast.Name):
                ours.add(node.id)
            elif isinstance(node, ast.Attribute):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                    ours.add(node.attr)
                if node.attr.startswith("_") and not node.attr.startswith("__"):
                    used.add((path.relative_to(PACKAGE).as_posix(), node.attr))
    private = {
        (each.file, each.target)
        for each in imports()
        if each.target.startswith(("anyio._", "aiohttp._", "asyncio._"))
    }

    foreign = {(file, name) for file, name in used if name not in ours} | private
    assert {file for file, _ in foreign} <= {"_transport/private.py"}, foreign


# -- what is loaded when -------------------------------------------------------------------

OURS = [
    "moondream_async._draw",
    "moondream_async.batch.batches",
    "moondream_async.tuning.finetunes",
]
HEAVY = ["aiohttp", "anyio", "asyncio", "PIL", "svg", "typer", "rich", *OURS]


def loaded_by(code):
    """Run `code` in a fresh Python; return which of the heavy modules it has loaded."""
    script = (
        f"{code}\nimport json, sys\nprint(json.dumps([x for x in {HEAVY} if x in sys.modules]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=False, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


CLIENT = "client = md.MoondreamClient(endpoint='http://127.0.0.1:9/v1')"


@pytest.mark.parametrize(
    ("code", "loaded"),
    [
        ("assert md.__version__; md.DetectResult(objects=[md.Region(0, 0, 1, 1)])", []),
        (CLIENT, ["aiohttp", "anyio", "asyncio"]),  # what its first call would wait for
        (f"{CLIENT}; client.batches; client.tuning", ["aiohttp", "anyio", "asyncio", *OURS[1:]]),
    ],
    ids=["package and results", "client", "batches and tuning"],
)
def test_no_more_is_loaded_than_what_is_asked_for_needs(code, loaded):
    assert loaded_by(f"import moondream_async as md; {code}") == loaded
