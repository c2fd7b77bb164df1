"""A real browser, where there is one."""

import shutil
from contextlib import asynccontextmanager

import pytest

NEEDS = "needs: python -m pip install '.[browser]'"
PATIENCE_MS = 30_000  # on a busy machine


@asynccontextmanager
async def chromium(*arguments):
    """Open a browser; skip the test where there is none."""
    playwright = pytest.importorskip("playwright.async_api", reason=NEEDS)
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("needs a browser: apt-get install chromium")
    playwright.expect.set_options(timeout=PATIENCE_MS)
    async with playwright.async_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-gpu", *arguments]
        browser = await driver.chromium.launch(executable_path=found, args=arguments)
        yield browser
        await browser.close()
