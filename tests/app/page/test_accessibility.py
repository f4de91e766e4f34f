"""Every tab, light and dark, before axe-core: no serious finding."""

import json
from typing import Any

import pytest

from tests.app.browsing import MARKS, PHONE, WIDE, new_context

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
pytestmark = MARKS
TABS = ("Mix", "Compare", "Series", "Interference", "Train", "Library", "History")
# what the parts of the page are called does not depend on the theme
RULES: dict[str, dict[str, Any]] = {"light": {}, "dark": {"runOnly": ["color-contrast"]}}


def fill(page: Any) -> None:
    """A picture, a message, and the pointer on the button that stands out."""
    page.get_by_label("number input for Steps").fill("1")
    page.get_by_role("button", name="Generate").click()
    page.locator("#picture img").wait_for()
    page.get_by_label("Prompt", exact=True).fill(" ")
    page.get_by_role("button", name="Generate").click()
    page.get_by_test_id("toast-body").wait_for()
    page.get_by_role("button", name="Generate").hover()


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_no_serious_finding_on_any_tab(browser: Any, url: str, size: tuple[int, int]) -> None:
    context = new_context(browser, size)
    page = context.new_page()
    page.goto(f"{url}?__theme=light")
    page.get_by_role("button", name="Generate").wait_for()
    # colours that fade have little contrast on the way
    page.add_style_tag(content="* { transition: none !important; animation: none !important }")
    page.evaluate(axe.Axe().axe_script)
    found = []
    fill(page)
    for tab in TABS:
        page.get_by_role("tab", name=tab, exact=True).click()
        page.wait_for_timeout(200)  # it asks the server for what is new
        for theme, rules in RULES.items():
            page.evaluate("theme => document.body.classList.toggle('dark', theme === 'dark')", theme)
            told = page.evaluate(f"axe.run({json.dumps({'resultTypes': ['violations'], **rules})})")
            for violation in told["violations"]:
                if violation["impact"] in ("serious", "critical"):
                    found += [(tab, theme, violation["id"], node["html"][:120]) for node in violation["nodes"]]
        page.evaluate("document.body.classList.remove('dark')")
    context.close()
    assert not found
