"""Change the package in small ways and see which changes the fast tests do not notice.

    python -m pip install cosmic-ray
    python -m benchmarks.mutate _stream 60    # a room, and how many mutants, chosen by chance

It works in a copy of the project, prints the survivors as diffs, and takes some seconds for each
mutant. Each survivor is a test that is missing, or a line that is.
"""

import argparse
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).parent.parent

# The fast tests of each room, those that fail soonest first.
TESTS = {
    "_protocol": "events sse requests answers documented retry secrets frames two_ways",
    "_stream": "streams leaving clock streams_again passing observing otel two_ways",
    "_call": "retry limits pace calls deadlines observing client",
    "_transport": "transport deadlines proxies fetch secrets calls loops fork",
    "bulk": "bulk pace",
}

# Annotations are no code that runs, and a decorator that is gone is seen by all.
NOT_MUTATED = "core/ReplaceBinaryOperator_BitOr_%"


def main() -> int:
    parser = argparse.ArgumentParser(description="Which changes do the fast tests not notice?")
    parser.add_argument("room", choices=TESTS)
    parser.add_argument("count", type=int, nargs="?", default=60)
    options = parser.parse_args()
    tests = [f"tests/test_{name}.py" for name in TESTS[options.room].split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not slow", "--hypothesis-profile=fast", "--timeout=60", *tests]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        (copy / "config.toml").write_text(
            "[cosmic-ray]\n"
            f'module-path = "moondream_async/{options.room}"\n'
            f'timeout = 300.0\nexcluded-modules = []\ntest-command = "{shlex.join(command)}"\n'
            '[cosmic-ray.distributor]\nname = "local"\n',
            encoding="utf-8",
        )

        def run(program: str, *args: str) -> None:
            tool = Path(sys.executable).with_name(program)
            subprocess.run([tool, *args], cwd=copy, check=True)

        subprocess.run(command, cwd=copy, check=True)  # or else everything would be a survivor
        run("cosmic-ray", "init", "config.toml", "session.sqlite")
        with closing(sqlite3.connect(copy / "session.sqlite")) as session, session:
            session.execute(
                "DELETE FROM work_items WHERE job_id NOT IN (SELECT job_id FROM mutation_specs"
                " WHERE operator_name NOT LIKE ? ORDER BY random() LIMIT ?)",
                [NOT_MUTATED, options.count],
            )
            session.execute(
                "DELETE FROM mutation_specs WHERE job_id NOT IN (SELECT job_id FROM work_items)"
            )
        run("cosmic-ray", "exec", "config.toml", "session.sqlite")
        run("cr-report", "--show-diff", "--surviving-only", "session.sqlite")
    return 0


if __name__ == "__main__":
    sys.exit(main())
