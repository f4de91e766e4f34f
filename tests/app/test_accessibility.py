"""Every tab, light and dark, before axe-core: no serious finding."""

from typing import Any

import pytest

from tests.app.browsing import MARKS, WIDE

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
pytestmark = MARKS
TABS = ("Mix", "Compare", "Interference", "Train", "Library", "History")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_serious_finding_on_any_tab(browser: Any, url: str, theme: str) -> None:
    page = browser.new_page(viewport={"width": WIDE[0], "height": WIDE[1]})
    page.goto(f"{url}?__theme={theme}")
    page.get_by_role("button", name="Generate").wait_for()
    # what the parts of the page are called does not depend on the theme
    rules = {"runOnly": ["color-contrast"]} if theme == "dark" else None
    found = []
    for tab in TABS:
        page.get_by_role("tab", name=tab, exact=True).click()
        page.wait_for_timeout(500)  # it fades in, and faded text has little contrast
        for violation in axe.Axe().run(page, options=rules).response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                found += [(tab, violation["id"], node["html"][:120]) for node in violation["nodes"]]
    page.close()
    assert not found
