"""Screenshots of every tab on the demo model, for the README and the docs: ``make screenshots``.

Runs only where the environment variable SCREENSHOTS names a folder; it then holds ``app.png`` (Mix), ``app-dark.png``,
``app-phone.png``, and the other tabs as ``app-compare.png``, ``app-compare-dark.png`` and so on.
"""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.serve import ASSETS
from app.studio import Studio
from tests.app.browsing import MARKS, PATIENCE, PHONE, WIDE, expect, new_context
from tests.app.conftest import served

FOLDER = os.environ.get("SCREENSHOTS", "")
pytestmark = [*MARKS, pytest.mark.skipif(not FOLDER, reason="SCREENSHOTS names no folder to write to")]
LOOKS = {"": (WIDE, "light"), "-dark": (WIDE, "dark"), "-phone": (PHONE, "light"), "-phone-dark": (PHONE, "dark")}
MOST = 250_000  # bytes of a picture
PROMPTS = tuple(f"a picture of a {what}" for what in (
    "parrot on a teal background", "fox on a navy background", "red apple on a teal background",
))  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The app as it is started without options, with a few pictures in its history."""
    studio = Studio.open(str(ASSETS / "emoji-diffusion"), ASSETS / "adapters", tmp_path_factory.mktemp("demo"))
    with served(studio) as url:
        yield url
    studio.close()


@pytest.mark.parametrize("look", LOOKS)
def test_every_tab(browser: Any, demo: str, look: str) -> None:
    size, theme = LOOKS[look]
    context = new_context(browser, size)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(f"{demo}?__theme={theme}")
    page.get_by_role("button", name="Generate").wait_for()
    mix(page)
    shoot(page, f"app{look}")
    for tab, act in (("Compare", compare), ("Series", draw_series), ("Interference", interfere), ("Train", None),
                     ("Library", inspect), ("History", choose)):  # fmt: skip
        page.get_by_role("tab", name=tab, exact=True).click()
        if act:
            act(page)
        shoot(page, f"app-{tab.lower()}{look}")
    context.close()


def mix(page: Any) -> None:
    """Draw with the styles that the page opens with."""
    for count, prompt in enumerate(PROMPTS, 1):
        page.get_by_label("Prompt", exact=True).fill(prompt)
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#gallery .grid-container button")).to_have_count(count, timeout=PATIENCE)
        expect(page.get_by_role("button", name="Generate")).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#lora")).to_contain_text("fusing a LoRA", timeout=PATIENCE)


def compare(page: Any) -> None:
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("#strip td img")).to_have_count(4, timeout=PATIENCE)
    expect(page.get_by_role("button", name="Draw", exact=True)).to_be_visible(timeout=PATIENCE)


def draw_series(page: Any) -> None:
    page.get_by_role("button", name="Draw the series").click()
    expect(page.locator("#pictures td img")).to_have_count(6, timeout=PATIENCE)
    expect(page.get_by_role("button", name="Draw the series")).to_be_visible(timeout=PATIENCE)


def interfere(page: Any) -> None:
    page.get_by_role("button", name="Compare them").click()
    expect(page.locator("#interference-pictures img")).to_have_count(4, timeout=PATIENCE)
    expect(page.locator("#interference-summary .verdict")).to_be_visible(timeout=PATIENCE)


def inspect(page: Any) -> None:
    page.get_by_role("button", name="Inspect bluefire").click()
    page.locator("#inspected .layers").wait_for()


def choose(page: Any) -> None:
    page.locator("#kept .grid-container button").first.click()
    page.locator("#kept-picture img").wait_for()


def shoot(page: Any, name: str) -> None:
    page.evaluate("window.scrollTo(0, 0)")
    page.mouse.move(0, 0)
    page.wait_for_timeout(600)  # what fades in has come
    path = Path(FOLDER) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(io.BytesIO(page.screenshot())) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < MOST, path
