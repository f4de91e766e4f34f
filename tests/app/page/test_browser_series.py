"""Series, sheets over any settings, and what few settings change, in a real browser."""

import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.drawing.session import Session
from app.history.galleries import Visitor
from app.studio import Studio
from tests.app.browsing import MARKS, PATIENCE, PHONE, WIDE, Open, drawing_held, expect, unfold
from tests.app.conftest import SUGGESTION

pytestmark = MARKS


def draw(page: Any, button: str, view: str, count: int) -> Any:
    """Draw a sheet; returns its pictures, not those of the sheet before it."""
    page.locator(view).evaluate("sheet => sheet.querySelectorAll('table').forEach(each => each.dataset.before = '')")
    page.get_by_role("button", name=button, exact=True).click()
    expect(page.locator(f"{view} [data-before]")).to_have_count(0, timeout=PATIENCE)
    expect(page.locator(f"{view}-told")).to_contain_text("Choose a picture", timeout=PATIENCE)
    pictures = page.locator(f"{view} td img")
    expect(pictures).to_have_count(count)
    expect(page.get_by_role("button", name=button, exact=True)).to_be_visible(timeout=PATIENCE)
    return pictures


def choose(page: Any, label: str, option: str) -> None:
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()
    expect(page.get_by_label(label, exact=True)).to_have_value(option)
    expect(page.get_by_role("option")).to_have_count(0)


def take(page: Any, name: str) -> None:
    page.get_by_role("link", name=name).or_(page.get_by_role("button", name=name)).first.click()


def test_a_series_is_drawn_taken_away_and_drawn_again(open_page: Open, session: Session, tmp_path: Path) -> None:
    page = open_page(WIDE, "Series")
    page.get_by_label("Prompts, one per line").fill("a red cat\n\na big dog")
    pictures = draw(page, "Draw the series", "#pictures", 4)
    expect(page.locator("#pictures th")).to_have_text(["a red cat", "a big dog"])
    expect(page.locator("#pictures .sheet-caption")).to_have_text(["seed 7", "seed 8", "seed 9", "seed 10"])
    expect(pictures.nth(2)).to_have_attribute("alt", "a big dog · seed 9")
    with page.expect_download() as download:
        take(page, "Download all as a zip")
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.namelist()[3:] == ["004 a big dog · seed 10.png", "005 sheet.png"]
        with archive.open("003 a big dog · seed 9.png") as file, Image.open(file) as image:
            expected = session.generate("a big dog", {"bluefire": 1.0}, 9, 2).image
            assert image.convert("RGB").tobytes() == expected.tobytes()

    page.get_by_label("Random: from a seed").check()
    draw(page, "Draw the series", "#pictures", 4)
    drawn = page.locator("#pictures .sheet-caption").all_inner_texts()
    expect(page.get_by_label("First seed")).to_have_value(drawn[0].removeprefix("seed "))
    page.get_by_label("+1: each picture").check()
    draw(page, "Draw the series", "#pictures", 4)
    assert page.locator("#pictures .sheet-caption").all_inner_texts() == drawn
    page.get_by_label("Fixed: each prompt").check()
    page.get_by_label("First seed").fill("5")
    draw(page, "Draw the series", "#pictures", 4)
    expect(page.locator("#pictures .sheet-caption")).to_have_text(["seed 5", "seed 6", "seed 5", "seed 6"])


def test_a_series_stops_and_says_what_is_wrong(open_page: Open, session: Session) -> None:
    page = open_page(WIDE)
    page.get_by_label("number input for Steps").fill("60")
    unfold(page, page.get_by_role("tab", name="Series"))
    page.get_by_label("Prompts, one per line").fill(" ")
    page.get_by_role("button", name="Draw the series").click()
    expect(page.get_by_text("No prompt: write one per line")).to_be_visible(timeout=PATIENCE)
    page.get_by_label("Prompts, one per line").fill("a red cat")
    page.get_by_label("Pictures of each").fill("20")
    page.get_by_role("button", name="Draw the series").click()
    expect(page.locator("#pictures td img").first).to_be_visible(timeout=PATIENCE)
    with drawing_held(session):
        page.get_by_label("First seed").fill("5")  # for the next series
        page.locator("#series").get_by_role("button", name="Stop").click()
    expect(page.locator("#pictures-told")).to_contain_text(re.compile(r"Stopped, \d+ of 20 drawn\."), timeout=PATIENCE)
    assert page.locator("#pictures td img").count() < 20 and session.active == {}
    expect(page.get_by_label("First seed")).to_have_value("5")
    with page.expect_download() as download:
        take(page, "Download the sheet")
    assert Image.open(download.value.path()).width > 16


def test_pictures_open_large_and_make_more_like_them(open_page: Open) -> None:
    page = open_page(WIDE, "Series")
    page.get_by_label("Prompts, one per line").fill("a red cat")
    draw(page, "Draw the series", "#pictures", 2)
    page.get_by_role("button", name="a red cat · seed 7").click()
    large = page.get_by_role("dialog", name="Picture")
    expect(large.get_by_role("img")).to_be_visible()
    assert large.get_by_role("img").bounding_box()["width"] > 400
    page.keyboard.press("ArrowRight")
    expect(large).to_contain_text("a red cat · seed 8")
    page.keyboard.press("Escape")
    expect(large).to_be_hidden()
    expect(page.get_by_role("button", name="a red cat · seed 8")).to_be_focused()
    page.keyboard.press("Enter")
    large.get_by_role("button", name="More like this").click()
    expect(page.locator("#pictures td img")).to_have_count(4, timeout=PATIENCE)
    expect(page.locator("#pictures-told")).to_contain_text("from a picture", timeout=PATIENCE)
    page.locator("#pictures td button").first.click()
    large.get_by_role("button", name="Send to Mix").click()
    unfold(page, page.get_by_role("button", name="More settings"))
    expect(page.locator("#start img")).to_be_visible()
    seeds = page.locator("#pictures .sheet-caption").all_inner_texts()
    page.locator("#stage").get_by_role("button", name="More like this").click()  # the picture that Mix shows
    expect(page.locator("#pictures .sheet-caption")).not_to_have_text(seeds, timeout=PATIENCE)
    expect(page.locator("#pictures td img")).to_have_count(4, timeout=PATIENCE)


def test_a_sheet_over_any_settings_has_its_axes_named(open_page: Open, session: Session) -> None:
    page = open_page(WIDE)
    page.get_by_role("checkbox", name="paintings").check()
    unfold(page, page.get_by_role("tab", name="Compare"))
    page.get_by_label("Any settings, a sheet").check()
    page.get_by_label("Values").first.fill("0, 1")
    choose(page, "From top to bottom", "Words of the prompt")
    page.get_by_label("Values").nth(1).fill("red, big")
    choose(page, "A table for each", "Seed")
    page.get_by_label("Values").nth(2).fill("3, 4")
    pictures = draw(page, "Draw", "#strip", 8)
    expect(page.locator("#strip .sheet-axes").first).to_have_text("bluefire → words ↓")
    expect(page.locator("#strip caption")).to_have_text(["seed 3", "seed 4"])
    expect(page.locator("#strip table").first.locator("th")).to_have_text(["0", "1", "red", "big"])
    expect(page.locator("#strip-told")).to_contain_text("In each picture: paintings · steps 2")
    expect(pictures.nth(7)).to_have_attribute("alt", "bluefire 1, words big, seed 4")
    page.locator("#strip td button").nth(7).click()
    page.locator("#compare").get_by_role("button", name="Send to Mix").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a big cat")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("4")


def test_settings_that_few_change(open_page: Open, studio: Studio, tmp_path: Path) -> None:
    Image.effect_noise((40, 20), 90).convert("RGB").save(tmp_path / "photo.png")
    page = open_page(WIDE)
    expect(page.locator("#tokens")).to_have_text("9 of 16 tokens")
    page.get_by_label("Prompt", exact=True).fill("abcdefghijklmno")
    expect(page.locator("#tokens .over")).to_have_text("17 of 16 tokens")
    page.get_by_label("Prompt", exact=True).fill(SUGGESTION)
    unfold(page, page.get_by_role("button", name="More settings"))
    page.get_by_label("Negative prompt").fill("a big dog")
    choose(page, "Shape", "16:9, 24 × 16")  # noqa: RUF001
    expect(page.get_by_label("Width")).to_have_value("24")
    page.get_by_label("Height").fill("8")
    page.locator("#start input[type=file]").set_input_files(tmp_path / "photo.png")
    expect(page.locator("#start img")).to_be_visible(timeout=PATIENCE)
    page.get_by_label("number input for How much of it to change").fill("0.5")
    page.get_by_label("number input for How much of it to change").press("Tab")
    page.get_by_label("number input for Styles in guidance's negative half").fill("0.5")
    page.get_by_label("number input for Styles in guidance's negative half").press("Tab")
    page.get_by_label("Seed", exact=True).fill("-1")
    page.get_by_label("Seed", exact=True).press("Tab")
    page.get_by_label("number input for Steps").fill("4")
    page.get_by_role("button", name="Generate").click()
    seed = page.locator("#facts .reuse")
    expect(seed).to_be_visible(timeout=PATIENCE)
    size = "image => [image.naturalWidth, image.naturalHeight]"
    assert page.locator("#picture img").evaluate(size) == [24, 8]
    drawn = seed.inner_text()
    history = studio.galleries.of(Visitor(""))
    assert history.page(1, 1)[0].settings["negative_mix"] == 0.5
    expect(page.locator("#changed")).to_have_text("")  # a random seed is none
    page.get_by_label("Height").fill("16")
    expect(page.locator("#changed")).to_have_text("Changed since drawn: height")
    page.get_by_label("Height").fill("8")
    seed.click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value(drawn)
    page.reload()  # the browser keeps them, too
    unfold(page, page.get_by_role("button", name="More settings"))
    expect(page.get_by_label("Negative prompt")).to_have_value("a big dog")
    expect(page.get_by_label("number input for Styles in guidance's negative half")).to_have_value("0.5")
    expect(page.locator("#start img")).to_be_visible(timeout=PATIENCE)
    page.locator("#start").get_by_label("Clear").or_(page.locator("#start").get_by_label("Remove Image")).first.click()
    expect(page.locator("#start img")).to_have_count(0)


def test_the_history_is_searched_marked_packed_and_varied(open_page: Open, studio: Studio) -> None:
    for seed, prompt in ((101, "a wet dog"), (102, "a wet owl"), (103, "a wet dog")):
        studio.galleries.add(Visitor(""), studio.session.generate(prompt, {}, seed, 1))
    page = open_page(WIDE, "History")
    kept = page.locator("#kept .grid-container button")
    expect(page.locator("#pages")).to_contain_text("page 1")
    page.get_by_label("Search prompts").fill("DOG wet seed 10")
    expect(kept).to_have_count(2)
    kept.last.click()
    expect(page.locator("#told")).to_contain_text("101")
    page.get_by_role("button", name="Add to favourites").click()
    expect(page.get_by_role("button", name="Remove from favourites")).to_be_visible()
    page.get_by_label("Search prompts").fill("")
    page.get_by_label("Favourites", exact=True).check()
    expect(kept).to_have_count(1)
    expect(page.locator("#kept .caption-label")).to_have_text("favourite: base")
    page.get_by_role("button", name="Pack these as a zip").click()
    expect(page.get_by_text("Download 1 picture")).to_be_visible()
    with page.expect_download() as download:
        take(page, "Download 1 picture")
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.namelist() == ["001 base.png"]
    page.locator("#history").get_by_role("button", name="More like this").click()
    expect(page.locator("#pictures td img")).to_have_count(4)
    expect(page.locator("#pictures-told")).to_contain_text("a wet dog · from a picture · steps 1")


@pytest.mark.parametrize("tab", ["Series", "Compare"])
def test_on_a_phone_a_sheet_is_no_wider_than_the_screen(open_page: Open, tab: str) -> None:
    page = open_page(PHONE, tab)
    view = {"Series": "#pictures", "Compare": "#strip"}[tab]
    if tab == "Compare":
        page.get_by_label("Any settings, a sheet").check()
    else:
        page.get_by_label("Prompts, one per line").fill("a red cat\na big dog\nan owl")
    pictures = draw(
        page, {"Series": "Draw the series", "Compare": "Draw"}[tab], view, {"Series": 6, "Compare": 20}[tab]
    )
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE[0]
    box = pictures.last.bounding_box()
    assert box["x"] + box["width"] <= PHONE[0]
    page.locator(f"{view} td button").first.click()
    box = page.get_by_role("dialog", name="Picture").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE[0]
    page.get_by_role("button", name="close").click()
