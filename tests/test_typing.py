"""What a type checker sees of the surface is what a caller gets."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_a_caller_that_uses_the_whole_surface_is_well_typed(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path)]

    run = subprocess.run(
        [*command, str(HERE / "typing" / "api.py")],
        capture_output=True,
        check=False,
        cwd=HERE.parent,
        text=True,
        timeout=300,
    )

    assert run.returncode == 0, run.stdout + run.stderr
