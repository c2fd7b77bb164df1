"""Recipes are programs: nothing here is imported to look for doctests but what are tests."""

from pathlib import Path

collect_ignore = [
    each.name for each in Path(__file__).parent.glob("*.py") if not each.name.startswith("test_")
]
