"""The surface: its names, each once and explained, and the errors as they are drawn."""

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
import types
from itertools import pairwise
from pathlib import Path

import pytest

import moondream_async as md
from moondream_async import errors, results
from moondream_async import types as values
from moondream_async._values import Record, Value
from moondream_async.bulk.results import Results

pytestmark = pytest.mark.slow  # the same on every Python

INIT = Path(md.__file__)

# Classes of the public modules that are no names of the surface.
INTERNAL = {
    "Record",
    "Value",
    "Array",  # says only what of a numpy array is used
}


def with_names():
    """Every module that says which names are its own."""
    names = [
        "moondream_async",
        *(f"moondream_async.{path.parent.name}" for path in INIT.parent.glob("*/__init__.py")),
    ]
    modules = [importlib.import_module(name) for name in names if not name.endswith(".cli")]
    return [module for module in modules if hasattr(module, "__all__")]


def constants_classes_and_the_rest(name):
    return (not name.isupper(), not name[0].isupper(), name)


def test_names_are_sorted_and_each_is_there_once():
    for module in with_names():
        expected = sorted(set(module.__all__), key=constants_classes_and_the_rest)
        assert module.__all__ == expected, module.__name__
        assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_everything_that_is_imported_is_a_name_of_the_surface_which_has_no_logic_of_its_own():
    docstring, *statements = ast.parse(INIT.read_text(encoding="utf-8")).body
    [lazy] = [each for each in statements if isinstance(each, ast.If)]  # what needs anyio
    imported = [
        alias.asname or alias.name
        for node in [*statements, *lazy.body]
        if isinstance(node, ast.ImportFrom) and node.module != "typing"
        for alias in node.names
    ]

    assert sorted(imported, key=constants_classes_and_the_rest) == md.__all__
    assert isinstance(docstring, ast.Expr)
    for each in statements:
        loading = isinstance(each, ast.FunctionDef) and each.name == "__getattr__"
        assert loading or isinstance(each, (ast.ImportFrom, ast.Assign, ast.If)), ast.unparse(each)


def test_every_public_class_is_a_name_of_the_surface():
    for module in (errors, values, results):
        own = {
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and value.__module__ == module.__name__ and name[0] != "_"
        }
        assert own - INTERNAL <= set(md.__all__)


def test_the_package_says_that_it_is_typed():
    assert INIT.with_name("py.typed").is_file()


# -- explained -----------------------------------------------------------------------------


def explained_aliases():
    """Names that are assigned and explained by a string below, as attributes are."""
    found = set()
    for path in INIT.parent.glob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        for node, after in pairwise(body):
            if (
                isinstance(node, ast.Assign)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def test_every_name_and_every_public_method_and_property_is_explained():
    aliases = explained_aliases()
    values = {name: getattr(md, name) for name in md.__all__ if name != "__version__"}
    with_docstrings = {
        name
        for name, value in values.items()
        if isinstance(value, (type, types.FunctionType)) and (value.__doc__ or "").strip()
    }

    assert values.keys() - with_docstrings <= aliases
    assert [name for name, method in methods() if not inspect.getdoc(method)] == []


def methods(*, inherited=True):
    """The public methods and properties of the surface's classes, by whichever class has them."""
    for name in md.__all__:
        cls = getattr(md, name)
        for base in getattr(cls, "__mro__", ()):
            if not base.__module__.startswith("moondream_async"):
                continue
            if not inherited and (
                base in (Value, Record, Results) or base.__name__ in {*md.__all__} - {name}
            ):
                continue
            for attribute, value in vars(base).items():
                known = isinstance(value, (types.FunctionType, property, classmethod))
                if known and not attribute.startswith("_"):
                    yield f"{name}.{attribute}", value


def test_every_skill_says_what_it_raises_and_what_cancelling_does():
    for name in ("caption", "query", "detect", "point", "segment", "chat"):
        doc = inspect.getdoc(getattr(md.MoondreamClient, name))
        for part in ("Args:", "Returns:", "Raises:", "ancelling"):
            assert part in doc, (name, part)


# -- the errors ----------------------------------------------------------------------------


def drawn(cls, indent=0):
    """The errors from `cls` on, each below its first base, with its other bases."""
    others = ", ".join(base.__name__ for base in cls.__bases__[1:])
    yield " " * indent + cls.__name__ + (f"({others})" if others else "")
    for each in vars(errors).values():
        if isinstance(each, type) and each.__bases__[0] is cls:
            yield from drawn(each, indent + 2)


def test_the_errors_are_the_tree_that_is_drawn_at_their_top():
    picture = re.findall(r"^    ( *)(\w+Error(?:\(\w+\))?)(?:  |$)", errors.__doc__, re.MULTILINE)

    assert [indent + name for indent, name in picture] == [*drawn(md.MoondreamError)]


def test_the_reference_has_every_name_and_every_call(tmp_path):
    """`python -m pdoc moondream_async`, as the README says, without a warning."""
    pytest.importorskip("pdoc", reason="needs: python -m pip install '.[docs]'")
    command = [sys.executable, "-W", "error", "-m", "pdoc", "--no-show-source", "moondream_async"]

    run = subprocess.run([*command, "-o", tmp_path], capture_output=True, check=False, text=True)

    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    page = (tmp_path / "moondream_async.html").read_text("utf-8")
    names = {*md.__all__, *(name for name, _ in methods(inherited=False))}
    assert [name for name in sorted(names) if f'id="{name}"' not in page] == []


EXAMPLES = doctest.DocTestParser()


def has_example(docstring, word=""):
    return any(word in each.source for each in EXAMPLES.get_examples(docstring or ""))


# What frameworks and event loops call, and the package itself.
UNSEEN = {
    "BatchRequest.line",
    "EventStream.aclose",
    "EventStream.close",
    "FinetuneClient.aclose",
    "StreamCall.close",
    "StreamCall.send",
    "StreamCall.throw",
    "TuningRequest.payload",
}
# What the package alone makes, and is shown with the call that gives it.
GIVEN = (
    md.BatchFailure,
    md.BatchOutput,
    md.BatchProgress,
    md.BatchUsage,
    md.CallEvent,
    md.ClientStats,
    md.MoondreamError,
    md.StreamEvent,
    md.TrainGroup,  # is made by its class methods
    Record,
)


def test_every_public_callable_has_an_example_of_its_own_or_in_its_class():
    without = [
        name
        for name in md.__all__
        if isinstance(value := getattr(md, name), (type, types.FunctionType))
        and not (isinstance(value, type) and issubclass(value, GIVEN))
        and not has_example(value.__doc__)
    ] + [
        name
        for name, method in methods(inherited=False)
        if not isinstance(method, property)
        and name not in UNSEEN
        and not has_example(inspect.getdoc(method))
        and not has_example(getattr(md, name.partition(".")[0]).__doc__, name.partition(".")[2])
    ]

    assert without == []
