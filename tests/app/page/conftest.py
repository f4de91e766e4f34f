"""What the tests of the page share."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def open_page(browser: Any, url: str) -> Iterator[Any]:
    """Opens a tab of the app: see ``browsing.pages``."""
    from tests.app.browsing import pages  # Playwright may be missing

    with pages(browser, url) as open_at:
        yield open_at
