"""In a real browser: the keyboard alone, two visitors at once, presets, sharing, preview, sweeps and dropped files."""

import base64
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from PIL import Image

from app.drawing.session import Session
from app.history.galleries import Visitor
from app.history.png_metadata import write_png
from app.library.library import Library
from app.page.tabs.mix import MixTab
from app.studio import Studio
from shira_diffusers import save_adapter
from tests import tiny
from tests.app.browsing import FORGET, MARKS, PATIENCE, WIDE, Open, drawing_held, expect, new_context, unfold
from tests.app.conftest import SUGGESTION, Folders, served

pytestmark = MARKS
FOCUS = """() => {
  const e = document.activeElement
  const style = getComputedStyle(e)
  const around = getComputedStyle(e.closest('.picker-card, label, .wrap, .container') ?? e)
  const outlined = (s) => s.outlineStyle !== 'none' && s.outlineWidth !== '0px'
  const seen = outlined(style) || outlined(around) || style.boxShadow !== 'none'
  const name = e.getAttribute('aria-label') || e.labels?.[0]?.innerText || e.innerText || e.id || e.tagName
  return [name.trim().split('\\n')[0], seen]
}"""


def wait_for_picture(page: Any, count: int = 1) -> bytes:
    """The newest of this visit's pictures, as bytes of its pixels, once there are so many."""
    expect(page.locator("#gallery .grid-container button")).to_have_count(count, timeout=PATIENCE)
    expect(page.get_by_role("button", name="Generate")).to_be_visible(timeout=PATIENCE)
    return pixels(page, "#picture img")


def set_strength(page: Any, style: str, strength: str) -> None:
    number = page.get_by_label(f"strength of {style}, as a number")
    number.fill(strength)
    number.press("Tab")


def pixels(page: Any, selector: str) -> bytes:
    told = page.locator(selector).evaluate(
        """async (image) => {
          const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer())
          return btoa(String.fromCharCode(...bytes))
        }"""
    )
    with Image.open(io.BytesIO(base64.b64decode(told))) as image:
        return image.convert("RGB").tobytes()


# -------------------------------------------------------------------- the keyboard


def tab_to(page: Any, name: str, most: int = 40) -> list[tuple[str, bool]]:
    """Press Tab until something of this name has the focus; what had it on the way."""
    way: list[tuple[str, bool]] = []
    for _ in range(most):
        page.keyboard.press("Tab")
        way.append(tuple(page.evaluate(FOCUS)))
        if way[-1][0] == name:
            return way
    raise AssertionError(f"{name} was not reached: {way}")


def test_a_picture_without_a_mouse(open_page: Open, session: Session) -> None:
    page = open_page()
    expect(page.get_by_role("button", name="Generate")).to_be_enabled(timeout=PATIENCE)
    page.get_by_label("Prompt", exact=True).focus()
    way = tab_to(page, "Generate", most=6)  # not across all styles
    way += tab_to(page, "bluefire")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    expect(page.get_by_role("checkbox", name="paintings")).to_be_checked()
    way += tab_to(page, "strength of paintings")
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    expect(page.get_by_label("strength of paintings, as a number")).to_have_value("0.8")
    page.get_by_label("Prompt", exact=True).focus()
    tab_to(page, "Generate")
    page.keyboard.press("Enter")
    drawn = wait_for_picture(page)
    mix = {"bluefire": 1.0, "paintings": 0.8}
    assert drawn == session.generate(SUGGESTION, mix, 7, 2).image.tobytes()
    names = [name for name, _ in way]
    order = ["Generate", "Seed", "bluefire", "strength of paintings"]
    assert [name for name in names if name in order] == order  # as they stand on the page, each once
    assert not [name for name, seen in way if not seen], "no focus is seen"


# -------------------------------------------------------------------- two visitors


@pytest.fixture(scope="module")
def couple(browser: Any) -> Iterator[tuple[Any, Any]]:
    """Two browsers, which share nothing."""
    ada, bob = new_context(browser, WIDE), new_context(browser, WIDE)
    yield ada, bob
    ada.close()
    bob.close()


@contextmanager
def visitor(context: Any, url: str) -> Iterator[Any]:
    """A page of one of them."""
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.add_init_script(FORGET)
    page.goto(url)
    page.get_by_role("button", name="Generate").wait_for()
    page.get_by_label("number input for Steps").fill("4")
    yield page
    page.close()


def test_two_browsers_at_once(couple: tuple[Any, Any], url: str, session: Session) -> None:
    """Each gets what it would get alone, and sees nothing of the other's mix."""
    with visitor(couple[0], url) as ada, visitor(couple[1], url) as bob:
        ada.get_by_role("checkbox", name="bluefire").uncheck()
        ada.get_by_role("checkbox", name="paintings").check()
        set_strength(bob, "bluefire", "0.5")
        for page in (ada, bob):
            page.get_by_role("button", name="Generate").click()
        hers, his = wait_for_picture(ada), wait_for_picture(bob)
        assert hers == session.generate(SUGGESTION, {"paintings": 1.0}, 7, 4).image.tobytes()
        assert his == session.generate(SUGGESTION, {"bluefire": 0.5}, 7, 4).image.tobytes()
        expect(ada.get_by_role("checkbox", name="bluefire")).not_to_be_checked()
        expect(bob.get_by_role("checkbox", name="paintings")).not_to_be_checked()
        expect(ada.get_by_label("strength of bluefire, as a number")).to_have_value("1")
        expect(bob.locator("#gallery .grid-container button")).to_have_count(1)


@pytest.fixture(scope="module")
def crowded(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an app with 40 adapters, whose visitors have histories of their own."""
    root = tmp_path_factory.mktemp("crowded")
    for number in range(40):
        shutil.copy(folders.adapters / "bluefire.safetensors", root / f"style {number:02}.safetensors")
    studio = Studio.open(str(folders.base), root, root / "data", shared=False)
    with served(studio) as url:
        yield url
    studio.close()
    assert len(studio.galleries.of(Visitor(""))) == 0


def test_of_many_styles_a_page_is_shown_and_those_that_are_on(couple: tuple[Any, Any], crowded: str) -> None:
    with visitor(couple[0], crowded) as page:
        cards = page.locator(".picker-card")
        expect(cards).to_have_count(24)
        expect(page.locator(".picker-count")).to_have_text("1 of 40 on")
        page.get_by_label("Filter styles").fill("style 3")
        expect(cards).to_have_count(11)  # 30 to 39, and the one that is on
        page.get_by_role("checkbox", name="style 35").check()
        page.get_by_label("Filter styles").fill("nothing like it")
        expect(page.locator(".picker-card .name")).to_have_text(["style 00", "style 35"])
        expect(page.get_by_text("No style has this in its name or words.")).to_be_visible()
        page.get_by_label("Filter styles").fill("")
        expect(page.locator(".picker-card .name").nth(1)).to_have_text("style 35")
        page.get_by_role("button", name="Show 16 of 16 more").click()
        expect(cards).to_have_count(40)
        expect(page.get_by_role("checkbox", name="style 23")).to_be_focused()  # the first of those that came
        page.get_by_role("checkbox", name="style 00").uncheck()
        expect(page.locator(".picker-count")).to_have_text("1 of 40 on")


def test_the_tab_key_crosses_one_card_of_many(couple: tuple[Any, Any], crowded: str) -> None:
    with visitor(couple[0], crowded) as page:
        expect(page.get_by_role("button", name="Generate")).to_be_enabled(timeout=PATIENCE)
        page.get_by_label("Prompt", exact=True).focus()
        way = [name for name, _ in tab_to(page, "Show 16 of 16 more")]
        assert "Generate" in way and [name for name in way if name.startswith("style ")] == ["style 00"]
        page.get_by_role("checkbox", name="style 00").focus()
        for key, name in (("ArrowDown", "01"), ("End", "23"), ("ArrowUp", "22"), ("Home", "00")):
            page.keyboard.press(key)
            expect(page.get_by_role("checkbox", name=f"style {name}")).to_be_focused()
        page.get_by_label("strength of style 05", exact=True).click()  # the card that is used is the one on the way
        page.get_by_label("Prompt", exact=True).focus()
        tab_to(page, "style 05")


def test_thumbnails_come_from_a_folder_of_any_name(
    couple: tuple[Any, Any], folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data #1, 100%?"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(data / "cache"))  # as main does
    studio = Studio.open(str(folders.base), folders.adapters, data)
    with served(studio) as url, visitor(couple[0], url) as page:
        picture = page.locator(".picker-card img").first
        expect(picture).to_be_visible(timeout=PATIENCE)
        page.wait_for_function("image => image.complete", arg=picture.element_handle())
        assert picture.evaluate("image => image.naturalWidth") == 128
    studio.close()


def test_two_browsers_have_histories_of_their_own_if_asked_for(couple: tuple[Any, Any], crowded: str) -> None:
    with visitor(couple[0], crowded) as ada, visitor(couple[1], crowded) as bob:
        ada.get_by_role("button", name="Generate").click()
        wait_for_picture(ada)
        for page, count in ((ada, 1), (bob, 0)):
            unfold(page, page.get_by_role("tab", name="History"))
            expect(page.locator("#pages")).to_contain_text("1 picture" if count else "Nothing yet")
            expect(page.locator("#kept .grid-container button")).to_have_count(count)
        ada.reload()
        ada.get_by_role("tab", name="History").click()
        expect(ada.locator("#kept .grid-container button")).to_have_count(1)


def test_a_page_that_is_loaded_again_tells_of_a_drawing_that_was_lost(
    couple: tuple[Any, Any], url: str, session: Session
) -> None:
    with visitor(couple[0], url) as page:
        page.get_by_label("Prompt", exact=True).fill("a big dog")
        with drawing_held(session):
            page.get_by_role("button", name="Generate").click()
            expect(page.get_by_role("button", name="Stop")).to_be_visible()
            page.reload()
        expect(page.get_by_text("Generate draws it again")).to_be_visible(timeout=PATIENCE)
        expect(page.get_by_label("Prompt", exact=True)).to_have_value("a big dog")
        page.get_by_role("button", name="Generate").click()
        wait_for_picture(page)


def test_what_the_page_shows_when_generate_is_pressed_is_drawn(open_page: Open, session: Session) -> None:
    """However slow the connection is, and whatever is changed meanwhile."""
    page, held = open_page(), []
    expect(page.get_by_role("button", name="Generate")).to_be_enabled(timeout=PATIENCE)
    page.route("**/run/predict", lambda route: held.append(route))
    page.get_by_role("button", name="Generate").click()
    set_strength(page, "bluefire", "0.5")
    expect(page.get_by_label("strength of bluefire", exact=True)).to_have_value("0.5")
    for request in held:
        request.continue_()
    page.unroute("**/run/predict")
    assert wait_for_picture(page) == session.generate(SUGGESTION, {"bluefire": 1.0}, 7, 2).image.tobytes()
    expect(page.locator("#changed")).to_have_text("Changed since drawn: styles")
    expect(page.get_by_label("strength of bluefire", exact=True)).to_have_value("0.5")


def test_a_change_while_a_picture_is_drawn_is_no_new_visit(open_page: Open, session: Session) -> None:
    """What the browser keeps is filled in as the page loads, and never again."""
    page, asked = open_page(), []
    expect(page.get_by_role("button", name="Generate")).to_be_enabled(timeout=PATIENCE)
    with drawing_held(session):
        page.get_by_role("button", name="Generate").click()
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        page.on("request", lambda request: asked.append(request.post_data) if "queue/join" in request.url else None)
        kept = page.evaluate("localStorage['shira-settings']")
        set_strength(page, "bluefire", "0.5")
        page.wait_for_function("kept => localStorage['shira-settings'] !== kept", arg=kept)
        page.get_by_label("number input for Steps").fill("3")
        expect(page.locator("#changed")).to_have_text("")  # nothing is shown
        page.get_by_label("Seed", exact=True).fill("5")
        page.get_by_label("Seed", exact=True).press("Tab")
    wait_for_picture(page)
    expect(page.locator("#changed")).to_have_text("Changed since drawn: styles, seed, steps")
    assert asked == []
    expect(page.get_by_label("strength of bluefire", exact=True)).to_have_value("0.5")


# -------------------------------------------------------------------- what the page keeps


def ready(page: Any) -> Any:
    """The page, once it is filled in."""
    expect(page.get_by_role("button", name="Generate")).to_be_enabled(timeout=PATIENCE)
    page.wait_for_timeout(600)  # what changes before that is part of the loading
    return page


def undo(page: Any) -> None:
    page.get_by_role("button", name="Undo", exact=True).click()


def page_with_moss(open_page: Open, library: Library, folder: Path) -> Any:
    """A page on which no style is on, with one more in the library."""
    library.add(save_adapter(tiny.adapter_for(tiny.pipeline(), 5), folder / "moss.safetensors"), "moss")
    page = ready(open_page())
    page.get_by_role("checkbox", name="bluefire").uncheck()
    return page


def test_a_style_that_is_gone_is_left_out_of_what_is_drawn(open_page: Open, studio: Studio, tmp_path: Path) -> None:
    library = studio.session.library
    page = page_with_moss(open_page, library, tmp_path)
    page.get_by_role("checkbox", name="moss").check()
    page.wait_for_timeout(600)
    library.delete("moss")
    expect(page.get_by_text("“moss” is not among the styles here")).to_be_visible(timeout=PATIENCE)
    page.get_by_test_id("toast-close").click()
    page.get_by_role("button", name="Generate").click()
    wait_for_picture(page)
    expect(page.locator("#gallery .caption-label")).to_have_text("base")
    page.wait_for_timeout(600)
    undo(page)
    expect(page.locator("#changed")).to_have_text("Changed since drawn: styles")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_text("“moss” is not among the styles here")).to_be_visible(timeout=PATIENCE)
    wait_for_picture(page, 2)


def test_a_style_that_is_renamed_stays_on(open_page: Open, studio: Studio, tmp_path: Path) -> None:
    """Under its new name with its strength, in all that the page remembers: Undo, the picture, the storage."""
    library = studio.session.library
    page = page_with_moss(open_page, library, tmp_path)
    set_strength(page, "moss", "0.8")
    page.wait_for_timeout(600)
    page.get_by_role("button", name="Generate").click()
    wait_for_picture(page)
    page.get_by_label("Seed", exact=True).fill("5")
    page.get_by_label("Seed", exact=True).press("Tab")
    page.wait_for_timeout(600)
    library.rename("moss", "lichen")
    library.rename("lichen", "fern")
    expect(page.get_by_role("checkbox", name="fern")).to_be_checked()
    expect(page.get_by_label("strength of fern, as a number")).to_have_value("0.8")
    expect(page.locator("#changed")).to_have_text("Changed since drawn: seed")
    page.get_by_role("button", name="Generate").click()
    wait_for_picture(page, 2)
    expect(page.locator("#gallery .caption-label").first).to_have_text("fern 0.8")
    undo(page)  # the seed, not the name
    expect(page.get_by_label("Seed", exact=True)).to_have_value("7")
    expect(page.get_by_role("checkbox", name="fern")).to_be_checked()
    page.get_by_role("button", name="Use these settings").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("5")
    expect(page.get_by_role("checkbox", name="fern")).to_be_checked()
    page.wait_for_timeout(600)
    library.rename("fern", "moss")
    expect(page.get_by_role("checkbox", name="moss")).to_be_checked()
    library.rename("moss", "fern")
    page.reload()
    expect(page.get_by_role("checkbox", name="fern")).to_be_checked()
    expect(page.get_by_label("strength of fern, as a number")).to_have_value("0.8")
    expect(page.get_by_test_id("toast-body")).to_have_count(0)
    library.delete("fern")


def test_a_new_visitors_first_change_is_undone(couple: tuple[Any, Any], url: str) -> None:
    page = couple[0].new_page()
    page.add_init_script(FORGET)
    page.goto(url)
    ready(page)
    page.get_by_role("checkbox", name="paintings").check()
    page.wait_for_timeout(600)
    undo(page)
    expect(page.get_by_role("checkbox", name="paintings")).not_to_be_checked(timeout=5000)
    page.close()


def test_a_shared_link_is_opened_once(couple: tuple[Any, Any], url: str) -> None:
    link = f"{url}?__theme=dark&settings=%7B%22prompt%22%3A%22a%20big%20dog%22%7D"
    with visitor(couple[0], link) as page:
        prompt = page.get_by_label("Prompt", exact=True)
        expect(prompt).to_have_value("a big dog")
        expect(page).to_have_url(re.compile(r"\?__theme=dark$"), timeout=5000)
        ready(page)
        kept = page.evaluate("localStorage['shira-settings']")
        prompt.fill("a big cat")
        page.wait_for_function("kept => localStorage['shira-settings'] !== kept", arg=kept)
        page.reload()
        ready(page)
        expect(prompt).to_have_value("a big cat")


def test_a_seed_or_width_that_is_emptied_counts_as_it_is_drawn(open_page: Open) -> None:
    page = ready(open_page())
    unfold(page, page.get_by_role("button", name="More settings"))
    for box in ("Seed", "Width, 0 is 16"):
        page.get_by_label(box, exact=True).fill("")
        page.get_by_label(box, exact=True).press("Tab")
    page.get_by_role("button", name="Generate").click()
    wait_for_picture(page)
    expect(page.locator("#changed")).to_have_text("", timeout=5000)


def test_a_start_picture_that_is_none_is_refused_in_a_sentence(open_page: Open, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    page = ready(open_page())
    unfold(page, page.get_by_role("button", name="More settings"))
    page.locator("#start input[type=file]").set_input_files(tmp_path / "notes.png")
    toast = page.get_by_test_id("toast-body")
    expect(toast).to_contain_text("This is no picture to start from: not a picture of PNG", timeout=PATIENCE)


def test_a_search_without_a_match_says_so(open_page: Open) -> None:
    page = open_page(tab="History")
    page.get_by_label("Search prompts, styles and seeds").fill("nothing like it")
    expect(page.locator("#pages")).to_contain_text("No picture has all of these words.", timeout=5000)


def test_the_preview_follows_what_is_not_changed_by_hand(open_page: Open) -> None:
    page = ready(open_page())
    page.get_by_label("Live preview").check()
    shown = page.locator("#picture img")
    expect(shown).to_be_visible()

    def previewed(change: Callable[[], Any]) -> None:
        page.wait_for_timeout(600)
        before = shown.get_attribute("src")
        change()
        expect(shown).not_to_have_attribute("src", before or "", timeout=10_000)

    previewed(lambda: page.get_by_role("button", name="a big dog").click())
    previewed(lambda: page.get_by_role("checkbox", name="paintings").check())
    previewed(lambda: undo(page))
    previewed(lambda: undo(page))
    previewed(lambda: page.get_by_label("number input for Steps").fill("1"))


def test_deleting_a_preset_with_none_chosen_says_to_choose_one(open_page: Open) -> None:
    page = ready(open_page())
    unfold(page, page.get_by_role("button", name="Share, delete a preset"))
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete the preset").click()
    expect(page.get_by_text("Choose a preset first")).to_be_visible(timeout=5000)


# -------------------------------------------------------------------- presets and sharing


def set_mix(page: Any) -> None:
    page.get_by_label("Prompt", exact=True).fill("a big dog")
    page.get_by_role("checkbox", name="bluefire").uncheck()
    set_strength(page, "paintings", "0.6")
    page.get_by_label("Seed", exact=True).fill("21")
    page.get_by_label("Seed", exact=True).press("Tab")


def expect_mix(page: Any) -> None:
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a big dog")
    expect(page.get_by_role("checkbox", name="bluefire")).not_to_be_checked()
    expect(page.get_by_role("checkbox", name="paintings")).to_be_checked()
    expect(page.get_by_label("strength of paintings, as a number")).to_have_value("0.6")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("21")


def test_presets_links_and_json(open_page: Open, couple: tuple[Any, Any], url: str, studio: Studio) -> None:
    for kept in studio.presets.names:  # of a run of this test that failed
        studio.presets.delete(kept)
    page = open_page()
    set_mix(page)
    page.get_by_label("Save settings as").fill("night dog")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_label("Preset", exact=True)).to_have_value("night dog")
    expect(page.get_by_text("Saved as “night dog”.")).to_be_visible()
    page.get_by_label("Seed", exact=True).fill("98")
    replace, name = page.get_by_role("button", name="Replace", exact=True), page.get_by_label("Save settings as")
    # overwritten only when asked again, of the same name
    for typed, seed in ((" night  dog", 21), ("night dog", 21), ("", 98)):
        if typed:
            name.fill(typed)
        expect(replace).to_have_count(int(seed == 98))
        page.locator("#presets").get_by_role("button", name="Save").or_(replace).click()
        expect(replace).to_have_count(int(seed == 21))
        assert studio.presets.get("night dog")["seed"] == seed
    studio.presets.save("night dog", studio.presets.get("night dog") | {"seed": 21})
    page.get_by_label("Preset", exact=True).focus()
    expect(page.get_by_role("option", name="night dog")).to_be_visible()
    page.keyboard.press("Tab")  # changes nothing
    unfold(page, page.get_by_role("button", name="Share, delete a preset"))
    page.get_by_role("button", name="Share", exact=True).click()
    expect(page.get_by_label("Settings as JSON")).to_have_value(re.compile('"seed": 98'))
    page.get_by_label("Preset", exact=True).click()
    page.get_by_role("option", name="night dog").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("21")
    page.get_by_role("button", name="Share", exact=True).click()
    expect(page.get_by_label("Settings as JSON")).to_have_value(re.compile('"seed": 21'))
    link = page.get_by_label("Link").input_value()
    text = page.get_by_label("Settings as JSON").input_value()
    assert json.loads(text)["mix"] == {"paintings": 0.6} and link.startswith(url)

    with visitor(couple[0], link) as other:  # the link holds all
        expect_mix(other)
    with visitor(couple[1], url) as other:  # presets are there for all
        other.get_by_label("Preset", exact=True).click()
        other.get_by_role("option", name="night dog").click()
        expect_mix(other)
        other.get_by_label("Seed", exact=True).fill("1")
        other.get_by_role("button", name="Share, delete a preset").click()
        other.get_by_label("Settings as JSON").fill(text)
        other.get_by_role("button", name="Apply the JSON below").click()
        expect_mix(other)
        other.get_by_label("Settings as JSON").fill(text.replace('"paintings"', '"<i>gone"'))
        other.get_by_role("button", name="Apply the JSON below").click()
        expect(other.get_by_text("“<i>gone” is not among the styles here")).to_be_visible()
        other.get_by_label("Settings as JSON").fill("{<i>")
        other.get_by_role("button", name="Apply the JSON below").click()
        expect(other.get_by_test_id("toast-body").filter(has_text="JSON object, got '{<i>'")).to_be_visible()
        other.once("dialog", lambda dialog: dialog.accept())
        other.get_by_role("button", name="Delete the preset").click()
        expect(other.get_by_label("Preset", exact=True)).to_have_value("")
    assert studio.presets.names == ()


# -------------------------------------------------------------------- preview, sweep, restoring


def test_the_preview_follows_a_slider(open_page: Open, session: Session) -> None:
    page = open_page()
    page.get_by_label("Live preview").check()
    expect(page.locator("#facts")).to_contain_text("to draw, as a preview", timeout=PATIENCE)
    before = page.locator("#picture img").get_attribute("src")
    page.get_by_label("strength of bluefire", exact=True).press("ArrowLeft")
    expect(page.locator("#picture img")).not_to_have_attribute("src", before, timeout=PATIENCE)
    expected = session.generate(SUGGESTION, {"bluefire": 0.95}, 7, 2).image.tobytes()
    page.wait_for_function("() => !document.querySelector('#picture .eta-bar')")
    assert pixels(page, "#picture img") == expected
    expect(page.locator("#gallery")).to_be_hidden()  # previews are not kept


def test_a_preview_that_is_drawn_while_the_page_opens_stays(open_page: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Event()
    show = MixTab._shown_again
    monkeypatch.setattr(MixTab, "_shown_again", lambda *given: seen.wait(60) and show(*given))
    page = open_page()
    page.get_by_label("Live preview").check()
    expect(page.locator("#facts")).to_contain_text("to draw, as a preview")
    expect(page.get_by_role("button", name="Generate")).to_be_disabled()
    seen.set()
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    expect(page.locator("#picture img")).to_be_visible(timeout=1)


def test_a_sweep_shows_progress_can_be_stopped_and_goes_back_to_mix(open_page: Open, session: Session) -> None:
    page = open_page(tab="Compare")
    page.get_by_label("One style at several strengths").check()
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("#strip th")).to_have_text(["0", "0.25", "0.5", "0.75", "1"], timeout=PATIENCE)
    expect(page.get_by_text("Choose a picture to see it large.")).to_be_visible(timeout=PATIENCE)
    page.locator("#strip").get_by_role("button", name="bluefire 0.25").click()
    page.locator("#compare").get_by_role("button", name="Send to Mix").click()
    expect(page.get_by_label("strength of bluefire, as a number")).to_have_value("0.25")

    page.get_by_label("number input for Steps").fill("100")  # so that the grid is not whole before it is held
    page.get_by_label("number input for Steps").press("Tab")
    unfold(page, page.get_by_role("tab", name="Compare"))
    page.get_by_label("Two styles, a grid").check()
    page.get_by_label("from", exact=True).first.fill("9")
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_text("The first strength must be a number from -1 to 2, got 9")).to_be_visible(timeout=PATIENCE)
    page.get_by_label("from", exact=True).first.fill("0")
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("#strip .progress-level, #strip .progress-text").first).to_be_visible(timeout=PATIENCE)
    with drawing_held(session):
        page.locator("#compare").get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Draw")).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#strip-told")).to_have_text(re.compile(r"Stopped, \d+ of 15 drawn\."))
    assert page.locator("#strip td img").count() < 15 and session.active == {}


def test_a_picture_dropped_anywhere_restores_its_settings(open_page: Open, session: Session, tmp_path: Path) -> None:
    picture = session.generate("a big dog", {"paintings": 0.6}, 21, 2)
    write_png(picture, tmp_path / "dog.png")
    content = base64.b64encode((tmp_path / "dog.png").read_bytes()).decode()
    for tab, target in (("Mix", "#facts"), ("History", "#kept")):
        page = open_page(tab=tab)
        page.locator(target).evaluate(
            """(target, content) => {
              const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0))
              const files = new DataTransfer()
              files.items.add(new File([bytes], 'dog.png', { type: 'image/png' }))
              target.dispatchEvent(new DragEvent('drop', { dataTransfer: files, bubbles: true, cancelable: true }))
            }""",
            content,
        )
        expect_mix(page)
