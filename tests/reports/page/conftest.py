"""A browser for the tests of pages."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright


@pytest.fixture(scope="module")
def chromium(browser: str) -> Iterator[Browser]:
    """Chrome or Chromium without a window, which reaches no network."""
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        running = playwright.chromium.launch(executable_path=browser, args=arguments)
        yield running
        running.close()
