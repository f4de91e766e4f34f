"""The page in a real browser: the main path, what goes wrong, and a phone's width."""

import re
from pathlib import Path
from typing import Any
from unicodedata import category

import pytest

import app
from app.drawing import random_settings
from app.drawing.session import Session
from tests.app.browsing import MARKS, PATIENCE, PHONE, WIDE, Open, drawing_held, expect, unfold
from tests.app.conftest import SUGGESTION

pytestmark = MARKS

SCROLLED = """async () => {
  for (let last; last !== scrollY; await new Promise((then) => setTimeout(then, 500))) last = scrollY
}"""
"""Wait until the page scrolls no more."""


def generate(page: Any) -> None:
    before = page.locator("#gallery .grid-container button").count()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#gallery .grid-container button")).to_have_count(before + 1, timeout=PATIENCE)
    expect(page.get_by_role("button", name="Generate")).to_be_visible(timeout=PATIENCE)


def fact(page: Any, label: str) -> str:
    """A figure below the picture; of what is in a fold, too."""
    return page.locator("#facts div", has_text=label).last.locator("b").text_content()


def test_the_main_path(open_page: Open) -> None:
    page = open_page(WIDE)
    expect(page.get_by_label("Prompt")).to_have_value(SUGGESTION)
    expect(page.get_by_role("checkbox", name="bluefire")).to_be_checked()
    expect(page.get_by_role("checkbox", name="paintings")).not_to_be_checked()
    page.get_by_role("button", name="use the words “sks fire”").click()
    expect(page.get_by_label("Prompt")).to_have_value(f"{SUGGESTION}, sks fire")
    page.get_by_label("Prompt").fill(SUGGESTION)

    generate(page)
    expect(page.locator("#picture img")).to_be_visible()
    assert page.locator("#picture img").evaluate("image => image.complete && image.naturalWidth") == 16
    assert re.fullmatch(r"[\d.]+ ms", fact(page, "to switch"))
    assert re.fullmatch(r"[\d.]+ %", fact(page, "of weights changed"))
    assert float(fact(page, "of weights changed").split()[0]) > 0
    assert fact(page, "seed") == "7"
    expect(page.locator("#facts b").first).to_have_text("7")  # what an artist looks for comes first
    expect(page.locator("#facts").get_by_text("to switch")).not_to_be_visible()
    page.get_by_text("The switch", exact=True).click()
    expect(page.locator("#facts").get_by_text("to switch")).to_be_visible()
    expect(page.locator("#gallery .caption-label")).to_have_text(["bluefire"])

    page.get_by_role("checkbox", name="bluefire").uncheck()
    generate(page)
    assert fact(page, "of weights changed") == "0.00 %"
    expect(page.locator("#gallery .caption-label")).to_have_text(["base", "bluefire"])  # the newest first


def test_a_reload_loses_nothing_and_changes_are_undone(
    open_page: Open, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    surprise = session.checked("a big dog", {"paintings": 0.9}, 5, 2)
    monkeypatch.setattr(random_settings, "settings", lambda session: surprise)  # some suggestions here are too long
    page = open_page(WIDE)
    prompt, seed = page.get_by_label("Prompt"), page.get_by_label("Seed", exact=True)
    undo = page.get_by_role("button", name="Undo", exact=True)
    prompt.fill("a big cat")
    page.get_by_role("checkbox", name="paintings").check()
    page.get_by_label("strength of paintings, as a number").fill("0.6")
    seed.fill("23")
    generate(page)
    kept = page.evaluate("localStorage['shira-settings']")
    prompt.fill("")  # cannot be drawn, and is kept as well
    page.wait_for_function("kept => localStorage['shira-settings'] !== kept", arg=kept)
    page.wait_for_timeout(600)  # what changes together is undone together
    page.get_by_role("button", name="Surprise me").click()
    expect(page.locator("#gallery .grid-container button")).to_have_count(2, timeout=PATIENCE)
    undo.click()
    for _ in range(2):  # as it was, then after a reload
        expect(prompt).to_have_value("")
        expect(seed).to_have_value("23")
        expect(page.get_by_role("checkbox", name="bluefire")).to_be_checked()
        expect(page.get_by_label("strength of paintings, as a number")).to_have_value("0.6")
        expect(page.get_by_label("number input for Steps")).to_have_value("2")
        expect(page.locator("#gallery .caption-label").last).to_have_text("bluefire + paintings 0.6")
        page.reload()
    expect(page.locator("#gallery .grid-container button")).to_have_count(2, timeout=PATIENCE)
    undo.click()
    expect(prompt).to_have_value("a big cat")


def test_a_reload_keeps_what_was_typed_in_other_tabs(open_page: Open) -> None:
    page = open_page(WIDE, "Series")
    prompts, words = page.get_by_label("Prompts, one per line"), page.get_by_label("What the pictures show")
    prompts.fill("an owl")
    page.get_by_label("Fixed: each prompt").check()
    unfold(page, page.get_by_role("tab", name="Train", exact=True))
    words.fill("a sks cat")
    page.wait_for_function("() => localStorage['shira-series'] && localStorage['shira-train']")
    page.wait_for_timeout(300)  # each field is stored by itself
    page.reload()
    expect(words).to_have_value("a sks cat")
    unfold(page, page.get_by_role("tab", name="Series"))
    expect(prompts).to_have_value("an owl")
    expect(page.get_by_label("Fixed: each prompt")).to_be_checked()
    expect(page.get_by_label("Pictures of each")).to_have_value("2")


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_the_picture_stays_in_view_beside_whatever_is_moved(open_page: Open, size: tuple[int, int]) -> None:
    page = open_page(size)
    if size == WIDE:  # above the fold
        for control in (page.get_by_label("Seed", exact=True), page.get_by_label("number input for Steps"),
                        page.get_by_label("Preset", exact=True), page.get_by_label("Live preview")):  # fmt: skip
            expect(control).to_be_in_viewport(ratio=1)
    generate(page)
    page.evaluate(SCROLLED)  # Generate scrolls smoothly to the picture
    slider = page.get_by_label("strength of paintings", exact=True)
    slider.evaluate("slider => window.scrollTo(0, slider.getBoundingClientRect().top + scrollY - innerHeight / 2)")
    for seen in (page.locator("#picture img"), slider, page.get_by_role("button", name="Generate")):
        expect(seen).to_be_in_viewport(ratio=1)
    slider.click()  # nothing lies over it


def test_side_by_side(open_page: Open) -> None:
    page = open_page(WIDE)
    page.get_by_label("strength of paintings", exact=True).press("ArrowLeft")  # whoever moves a style, sees it
    expect(page.get_by_role("checkbox", name="paintings")).to_be_checked()
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("button", name="Draw").click()
    labels = ["base", "bluefire", "paintings", "mix"]
    expect(page.locator("#strip th")).to_have_text(labels, timeout=PATIENCE)
    expect(page.get_by_text("Choose a picture to see it large.")).to_be_visible(timeout=PATIENCE)
    page.locator("#strip").get_by_role("button", name="base").click()
    page.locator("#compare").get_by_role("button", name="Send to Mix").click()
    expect(page.get_by_role("checkbox", name="bluefire")).not_to_be_checked()


def test_the_history_sends_a_picture_to_mix(open_page: Open) -> None:
    page = open_page(WIDE)
    page.get_by_label("Seed", exact=True).fill("11")
    generate(page)
    page.get_by_label("Seed", exact=True).fill("12")
    page.get_by_role("tab", name="History").click()
    page.locator("#kept .grid-container button").first.click()
    page.locator("#history").get_by_role("button", name="Send to Mix").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("11")


def test_suggestions_dice_and_the_enter_key(open_page: Open) -> None:
    page = open_page(WIDE)
    page.get_by_role("button", name="a big dog").click()
    expect(page.get_by_label("Prompt")).to_have_value("a big dog")
    page.get_by_role("button", name="Random seed").click()
    expect(page.get_by_label("Seed", exact=True)).not_to_have_value("7")
    page.set_viewport_size({"width": 800, "height": 900})  # two narrow columns
    card, inside = (page.locator(each).bounding_box() for each in ("#details", "#details input[type=range] >> nth=1"))
    assert inside["x"] + inside["width"] <= card["x"] + card["width"]


def test_each_tab_has_an_address_and_the_back_button_leads_to_the_one_before(open_page: Open) -> None:
    page = open_page(WIDE)
    address = page.url
    for name in ("Library", "History", "Mix"):
        page.get_by_role("tab", name=name).click()
        expect(page).to_have_url(f"{address}#{name.lower()}")
    page.go_back()
    expect(page.get_by_role("tab", name="History")).to_have_attribute("aria-selected", "true")
    with page.context.new_page() as other:
        other.goto(page.url)
        expect(other.locator("#whose")).to_be_visible(timeout=PATIENCE)
    page.go_back()
    expect(page.locator("#library-table")).to_be_visible()
    page.go_back()
    expect(page.get_by_role("tab", name="Mix")).to_have_attribute("aria-selected", "true")
    assert page.url == address


def test_icons_need_no_emoji_font() -> None:
    """Symbols are drawn: a system without a font for them shows empty boxes."""
    texts = {file: file.read_text(encoding="utf-8") for file in Path(app.__file__).parent.rglob("*.[jcp][sy]*")}
    assert len(texts) > 50
    symbols = [(file.name, each) for file, text in texts.items() for each in text if category(each) == "So"]
    assert not symbols


def test_what_is_left_out_is_shown_with_the_reason(open_page: Open) -> None:
    left_out = open_page(WIDE).locator("#refused")
    expect(left_out).to_contain_text("stranger: adapter does not fit")
    expect(left_out).to_contain_text("broken: broken.safetensors cannot be read")


def test_an_error_is_a_sentence_and_the_page_goes_on(open_page: Open) -> None:
    page = open_page(WIDE)
    page.get_by_label("Prompt").fill("abcdefghijklmno")
    page.get_by_role("button", name="Generate").click()
    toast = page.get_by_text("The prompt is too long: the model reads 16 tokens, got 17; shorten it")
    expect(toast).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#picture .error")).to_be_hidden()  # Gradio's badge over the picture
    page.get_by_label("Prompt").fill(SUGGESTION)
    page.get_by_label("Seed", exact=True).fill("-5")
    page.get_by_role("button", name="Generate").click()
    toast = page.get_by_text("The seed must be a whole number from 0 to 4294967295, or -1 to draw one, got -5")
    expect(toast).to_be_visible()
    page.get_by_label("Seed", exact=True).fill("5")
    generate(page)
    expect(page.locator("#picture img")).to_be_visible()


def test_stop_ends_a_generation(open_page: Open, session: Session) -> None:
    page = open_page(WIDE)
    page.get_by_label("number input for Steps").fill("100")
    with drawing_held(session):
        page.get_by_role("button", name="Generate").click()
        page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Generate")).to_be_visible(timeout=PATIENCE)
    assert session.active == {}
    page.get_by_label("number input for Steps").fill("2")
    generate(page)


def test_on_a_phone_nothing_is_wider_than_the_screen(open_page: Open) -> None:
    page = open_page(PHONE)
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) == PHONE[0]
    generate(page)
    expect(page.locator("#picture img")).to_be_in_viewport(timeout=PATIENCE)
    expect(page.locator("#facts")).to_contain_text("to switch")
    assert page.evaluate(width) == PHONE[0]
    box = page.get_by_role("button", name="Generate").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE[0]

    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("Two styles, a grid").check()
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("#strip td img")).to_have_count(15, timeout=PATIENCE)
    box = page.locator("#strip td img").last.bounding_box()
    assert box["x"] + box["width"] <= PHONE[0]  # a row of five

    page.get_by_role("tab", name="History").click()
    expect(page.get_by_text("Favourites", exact=True)).to_be_in_viewport(ratio=1)
    page.locator("#kept .grid-container button").first.click()
    expect(page.locator("#kept-picture img")).to_be_in_viewport(ratio=0.9)  # below the gallery
