"""Change a room of the package in small ways and see which changes the fast tests do not notice.

    python -m pip install cosmic-ray coverage
    python -m benchmarks.mutate _stream 60 --map /tmp/map.json

First all fast tests run once, with coverage.py, which notes the tests that run each line; `--map`
keeps these notes for the next room. Then each mutant is judged by the tests that run its line: 8
of them, and if all pass, 30 and 140 more. First come those that run a line of the changed function
which few others run, and the quick ones; in turns with one test of each function.
A test that fails, or that does not end in time, kills the mutant. Functions that only a forked
child runs are not noted; they are judged by the tests of forks.

The mutants are cosmic-ray's, a random choice, at most one at a place. Some are left out: mutants
that change nothing (in annotations, overloads and code for type checkers; ``is`` for ``==``), and
mutants that every test would notice (operators of bits in place of arithmetic).
"""

import argparse
import ast
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from coverage import Coverage

ROOT = Path(__file__).parent.parent
ROOMS = ("_protocol", "_stream", "_call", "_transport", "bulk")

# The tests of what these rooms do; other tests, as of the simulator, only use the rooms.
TESTS = (  # noqa: SIM905 - shorter so
    "events sse requests answers documented retry secrets frames two_ways chat malformed"
    " streams leaving clock streams_again passing observing otel interruptible everywhere closing"
    " arrival limits pace calls deadlines client skills faults hostile foreign fuzz errors"
    " transport proxies fetch loops races fork types bulk runs batch tuning work"
    " owner batch_results loops_end"
).split()
OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", "--hypothesis-profile=fast"]
OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is loaded before the forks

FORKS = "tests/test_fork.py"
STAGES = ((8, 4.0), (30, 10.0), (140, 30.0))  # the most tests of each, and the most seconds

LEFT_OUT = re.compile(
    r"core/(VariableReplacer|VariableInserter"
    r"|ReplaceComparisonOperator_(Is_Eq|IsNot_NotEq|(Eq|NotEq|[LG]tE?)_Is(Not)?)"
    r"|ReplaceBinaryOperator_(Add|Sub|Mul|Div|FloorDiv|Mod)_(Pow|.Shift|Bit\w+))"
)

Position = tuple[int, int]


class Mutant(NamedTuple):
    """One change of one file."""

    path: str
    operator: str
    occurrence: int
    start: Position


class Seen:
    """A pytest plugin: which tests run which lines of the rooms, and how long each takes."""

    def __init__(self, coverage: Coverage) -> None:
        self.coverage = coverage
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()

    def pytest_collection_finish(self) -> None:
        """Import all rooms: else the first test that needs a module would seem to run all of it."""
        for path in (path for room in ROOMS for path in room_files(Path.cwd(), room)):
            import_module(path.removesuffix(".py").replace("/", ".").removesuffix(".__init__"))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Let the lines that run from now on be this test's."""
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Add what a test took; one that does not pass as it is can judge no mutant."""
        self.seconds[report.nodeid] += report.duration
        if not report.passed:
            self.failed.add(report.nodeid)


def room_files(root: Path, room: str) -> list[str]:
    found = sorted((root / "moondream_async" / room).rglob("*.py"))
    return [path.relative_to(root).as_posix() for path in found]


def in_child(copy: Path, task: Any, limit: float) -> tuple[int | None, str]:
    """Run a task in a fork, which has loaded all but the package; its status and output."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            status = 70
            try:
                os.setsid()
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                os.chdir(copy)
                os.environ["PYTHONPATH"] = sys.path[0] = str(copy)
                status = task()
            except BaseException:  # noqa: BLE001 - the fork ends here, whatever it is
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        end = time.monotonic() + limit
        found, status = os.waitpid(child, os.WNOHANG)
        while not found and time.monotonic() < end:
            time.sleep(0.02)
            found, status = os.waitpid(child, os.WNOHANG)
        if not found:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        output.seek(0)
        text = output.read().decode(errors="replace")
        return (os.waitstatus_to_exitcode(status) if found else None), text


def run_tests(copy: Path, tests: list[str], limit: float) -> tuple[int | None, str]:
    return in_child(copy, lambda: pytest.main([*OPTIONS, "--timeout=20", *tests]), limit)


def make_map(copy: Path, path: Path) -> dict[str, Any]:
    """Run all the tests once; return the lines' tests and the tests' seconds."""

    def task() -> int:
        coverage = Coverage(data_file=None, source=["moondream_async"])
        coverage.start()
        seen = Seen(coverage)
        chosen = [f"tests/test_{name}.py" for name in TESTS] + ["moondream_async"]
        pytest.main([*OPTIONS[1:], "--timeout=120", *chosen], plugins=[seen])
        coverage.stop()
        data = coverage.get_data()
        passed = [test for test in seen.seconds if test not in seen.failed]
        numbers = {test: number for number, test in enumerate(passed)}
        lines = {
            Path(file).relative_to(copy).as_posix(): {
                line: [numbers[test] for test in tests if test in numbers]
                for line, tests in data.contexts_by_lineno(file).items()
            }
            for file in data.measured_files()
            if any(f"moondream_async/{room}/" in file for room in ROOMS)
        }
        found = {"lines": lines, "tests": [(test, seen.seconds[test]) for test in passed]}
        path.write_text(json.dumps(found), encoding="utf-8")
        return 0

    _, output = in_child(copy, task, 3600.0)
    print(output, flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def spans_left_out(source: str) -> Iterator[tuple[Position, Position]]:
    for node in ast.walk(ast.parse(source)):
        left_out: list[Any] = []
        if isinstance(node, ast.arg | ast.AnnAssign):
            left_out = [node.annotation]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            left_out = [node.returns]
            if any("overload" in ast.unparse(each) for each in node.decorator_list):
                left_out = [*node.decorator_list, node]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            left_out = [node if ast.unparse(node.test) == "TYPE_CHECKING" else node.test]
            yield (node.lineno, node.col_offset), (node.lineno, node.col_offset + 2)
        elif isinstance(node, ast.Module):  # types have a `|`, too
            left_out = [
                each
                for each in node.body
                if isinstance(each, ast.Assign)
                and isinstance(each.value, ast.BinOp | ast.Subscript)
            ]
        for each in filter(None, left_out):
            yield (each.lineno, each.col_offset), (each.end_lineno, each.end_col_offset)


def mutants(copy: Path, room: str) -> Iterator[Mutant]:
    for path in room_files(copy, room):
        source = (copy / path).read_text(encoding="utf-8")
        lines = source.splitlines()
        left_out = list(spans_left_out(source))
        nodes = list(ast_nodes(get_ast(source)))
        for name in operator_names():
            if LEFT_OUT.match(name):
                continue
            operator = get_operator(name)()
            places = (place for node in nodes for place in operator.mutation_positions(node))
            for occurrence, (start, _) in enumerate(places):
                is_marker = re.match(r"\*\s*,", lines[start[0] - 1][start[1] :])  # of parameters
                if not is_marker and not any(begin <= start < end for begin, end in left_out):
                    yield Mutant(path, name, occurrence, start)


def tests_of(source: str, line: int, seen: dict[str, list[int]]) -> list[int]:
    """The tests that run a line; for one that the import runs, those that run what it makes."""
    if seen.get(str(line)):
        return seen[str(line)]
    holders = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.stmt) and _first_line(node) <= line <= (node.end_lineno or 0)
    ]
    holder = max(holders, key=lambda node: (node.lineno, -(node.end_lineno or 0)))
    if seen.get(str(holder.lineno)):
        return seen[str(holder.lineno)]
    if isinstance(holder, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        lines = range(holder.lineno, (holder.end_lineno or 0) + 1)
    else:
        named = re.match(r"\W*(\w+)", ast.unparse(holder))
        word = re.compile(rf"\b{named[1]}\b" if named else "$.")
        lines = [n for n, text in enumerate(source.splitlines(), 1) if word.search(text)]
    found = [test for number in lines for test in seen.get(str(number), [])]
    return list(dict.fromkeys(found)) or list({test for tests in seen.values() for test in tests})


def _first_line(node: ast.stmt) -> int:
    """The line where a statement begins, with its decorators."""
    return min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])


def function_at(source: str, line: int) -> tuple[int, int]:
    """The first and the last line in the innermost function that has a line in its body."""
    spans = [
        (node.body[0].lineno, node.end_lineno or 0)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return max((span for span in spans if span[0] <= line <= span[1]), default=(line, line))


def rarity(source: str, line: int, seen: dict[str, list[int]]) -> dict[int, int]:
    """For each test, how many run the line of the same function that the fewest tests run."""
    begin, end = function_at(source, line)
    runs = sorted((seen.get(str(number), []) for number in range(begin, end + 1)), key=len)
    return {test: len(tests) for tests in reversed(runs) for test in tests}


def in_order(tests: list[tuple[int, float, str]]) -> list[str]:
    """In turns one of the rarest, and one of each function before the second of any."""
    count: Counter[str] = Counter()
    places = []
    for rare, seconds, test in sorted(tests):
        function = test.partition("[")[0]
        places.append((count[function], rare, seconds, test))
        count[function] += 1
    pairs = zip(sorted(places), sorted(tests), strict=True)
    return list(dict.fromkeys(each[-1] for pair in pairs for each in pair))


def first_of(tests: list[str], seconds: dict[str, float], number: int, most: float) -> list[str]:
    chosen: list[str] = []
    for test in tests[:number]:
        most -= seconds.get(test, 1.0)
        if most < 0:
            break
        chosen.append(test)
    return chosen


def judge(copy: Path, mutant: Mutant, seen: dict[str, Any]) -> tuple[str | None, str]:
    """Return how the mutant died, "" if it did not, None if it is no Python; and what it was."""
    file = copy / mutant.path
    source = file.read_text(encoding="utf-8")
    mutated = mutate_code(source, get_operator(mutant.operator)(), mutant.occurrence)
    before, after = source.splitlines(), (mutated or "").splitlines()
    changed = [(a, b) for a, b in zip(before, after, strict=False) if a != b][:1] or [("", "")]
    what = f"{changed[0][0].strip()}  →  {changed[0][1].strip()}"
    try:
        compile(mutated or "", mutant.path, "exec")
    except SyntaxError:
        return None, what
    lines = seen["lines"].get(mutant.path, {})
    rare = rarity(source, mutant.start[0], lines)
    numbers = tests_of(source, mutant.start[0], lines)
    begin, end = function_at(source, mutant.start[0])
    if begin < end and not rare:
        numbers = [n for n, (test, _) in enumerate(seen["tests"]) if FORKS in test]
    seconds = dict(seen["tests"])
    tests = [
        (rare.get(n, 0).bit_length(), seen["tests"][n][1], seen["tests"][n][0]) for n in numbers
    ]
    rest = in_order(tests)
    try:
        file.write_text(mutated or "", encoding="utf-8")
        for number, most in STAGES:
            chosen = first_of(rest, seconds, number, most)
            rest = rest[len(chosen) :]
            for cached in file.parent.glob(f"__pycache__/{file.stem}.*"):
                cached.unlink()  # it is told by the second and the size, which may be the same
            if not chosen:
                continue
            limit = 30 + 3 * sum(seconds.get(test, 1.0) for test in chosen)
            status, output = run_tests(copy, chosen, limit)
            if status:
                failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - |$)", output, re.MULTILINE)
                return (failed[1] if failed else f"status {status}: {output[-200:]}"), what
            if status is None:
                return "hangs", what
    finally:
        file.write_text(source, encoding="utf-8")
        for cached in file.parent.glob(f"__pycache__/{file.stem}.*"):
            cached.unlink()
    return "", f"{what}  ({len(tests)} tests run it)"


def main() -> int:
    parser = argparse.ArgumentParser(description="Which changes do the fast tests not notice?")
    parser.add_argument("room", choices=ROOMS)
    parser.add_argument("count", type=int, nargs="?", default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--map", type=Path, help="keep which tests run which lines, or use it")
    options = parser.parse_args()
    for name in ("aiohttp.web", "anyio.pytest_plugin", "hypothesis", "PIL.Image", "msgspec"):
        import_module(name)  # once, for all the forks
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve() / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        kept = options.map or copy.parent / "map.json"
        if kept.exists():
            seen = json.loads(kept.read_text(encoding="utf-8"))
        else:
            seen = make_map(copy, kept.resolve())
        found = list(mutants(copy, options.room))
        random.Random(options.seed).shuffle(found)
        places = {(mutant.path, mutant.start): mutant for mutant in reversed(found)}
        print(f"{options.room}: {len(found)} mutants at {len(places)} places", flush=True)
        judged = 0
        survivors = []
        for mutant in found:
            if judged == options.count:
                break
            if places[mutant.path, mutant.start] is not mutant:
                continue
            death, what = judge(copy, mutant, seen)
            if death is None:
                continue
            judged += 1
            where = f"{mutant.path}:{mutant.start[0]}: {what}"
            print(f"{judged}: {death or 'SURVIVES'}\n    {where}", flush=True)
            if not death:
                survivors.append(where)
        print(f"{options.room}: {judged} mutants, {judged - len(survivors)} killed")
        print("\n".join(survivors))
    return 0


if __name__ == "__main__":
    sys.exit(main())
