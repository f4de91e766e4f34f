"""What the tests of the page share."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    """Chromium without a window, one for all files: it has the page's scripts from the first on."""
    from tests.app.browsing import chromium  # Playwright may be missing

    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Any, url: str) -> Iterator[Any]:
    """Opens a tab of the app: see ``browsing.pages``."""
    from tests.app.browsing import pages  # Playwright may be missing

    with pages(browser, url) as open_at:
        yield open_at
