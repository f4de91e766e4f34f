"""In a real browser: the picture and the settings agree, and nothing is lost, whatever happens to page and server."""

import base64
import io
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.drawing.session import Session
from app.history.png_metadata import write_png
from tests.app.browsing import MARKS, PATIENCE, WIDE, Open, drawing_held, expect, new_context
from tests.app.conftest import SUGGESTION, Folders, free_port, popen_warm

pytestmark = MARKS
DROP = """([selector, name, content]) => {
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0))
  const files = new DataTransfer()
  files.items.add(new File([bytes], name, { type: 'image/png' }))
  const stays = { dataTransfer: files, bubbles: true, cancelable: true }
  return !document.querySelector(selector).dispatchEvent(new DragEvent('drop', stays))
}"""
UNCOVERED = """(picture) => {
  const box = picture.getBoundingClientRect()
  return document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2) === picture
}"""


def draw(page: Any, seed: int) -> str:
    """Draw with a seed; the address of the picture."""
    page.get_by_label("Seed", exact=True).fill(str(seed))
    drawn = page.locator("#gallery .grid-container button").count()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#gallery .grid-container button")).to_have_count(drawn + 1, timeout=PATIENCE)
    expect(page.get_by_role("button", name="Generate")).to_be_visible(timeout=PATIENCE)
    return source(page)


def source(page: Any) -> str:
    return str(page.locator("#picture img").get_attribute("src"))


def expect_facts(page: Any, seed: int, styles: str) -> None:
    expect(page.locator("#facts .prose > div").first).to_have_text(f"{seed}seed")
    expect(page.locator("#facts p")).to_have_text(f"“{SUGGESTION}” · {styles} · 2 steps · guidance 3")


def test_a_picture_is_shown_with_its_settings_and_says_what_has_changed_since(open_page: Open) -> None:
    page = open_page(WIDE)
    changed, use = page.locator("#changed"), page.get_by_role("button", name="Use these settings")
    first, second = draw(page, 11), draw(page, 12)
    expect(changed).to_have_text("")
    page.get_by_role("checkbox", name="paintings").check()
    expect(changed).to_have_text("Changed since drawn: styles")
    page.get_by_role("checkbox", name="paintings").uncheck()
    expect(changed).to_have_text("")
    expect(use).to_be_hidden()

    page.get_by_role("checkbox", name="paintings").check()
    page.get_by_label("Prompt", exact=True).fill("a big dog")
    page.locator("#gallery .thumbnail-item").last.click()
    expect(page.locator("#picture img")).to_have_attribute("src", first)
    expect_facts(page, 11, "bluefire")
    expect(changed).to_have_text("Changed since drawn: prompt, styles, seed")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a big dog")  # looking changes nothing
    page.route("**/queue/join*", lambda route: None)  # held until the route is gone
    page.reload()
    expect(page.get_by_role("button", name="Generate")).to_be_disabled()  # or what is kept would cover what it draws
    page.unroute_all()
    expect(page.get_by_role("button", name="Generate")).to_be_enabled(timeout=PATIENCE)
    expect(changed).to_have_text("Changed since drawn: prompt, styles, seed")
    expect(page.locator("#picture img")).to_have_attribute("src", first)
    use.click()
    expect(changed).to_have_text("")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(SUGGESTION)
    expect(page.get_by_label("Seed", exact=True)).to_have_value("11")
    expect(page.get_by_role("checkbox", name="paintings")).not_to_be_checked()
    expect(page.locator("#picture img")).to_have_attribute("src", first)
    page.get_by_role("button", name="Undo", exact=True).click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a big dog")

    page.get_by_role("tab", name="History").click()
    page.locator("#kept .grid-container button").first.click()
    page.locator("#history").get_by_role("button", name="Send to Mix").click()
    expect(page.locator("#picture img")).to_have_attribute("src", second)
    expect_facts(page, 12, "bluefire")
    expect(changed).to_have_text("")


def test_the_picture_stays_while_the_next_is_drawn_and_is_compared_with_it(open_page: Open, session: Session) -> None:
    page = open_page(WIDE)
    first = draw(page, 11)
    with drawing_held(session):
        page.get_by_label("Seed", exact=True).fill("12")
        page.get_by_role("button", name="Generate").click()
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        expect(page.locator("#picture [data-testid=status-tracker]")).to_be_visible()
        assert page.locator("#picture img").evaluate(UNCOVERED)
        expect(page.locator("#changed")).to_have_text("Changed since drawn: seed")
    expect(page.locator("#picture img")).not_to_have_attribute("src", first, timeout=PATIENCE)
    second = source(page)
    compare = page.get_by_role("button", name="Hold to compare")
    compare.hover()
    page.mouse.down()
    expect(page.locator("#picture img")).to_have_attribute("src", first)
    page.mouse.up()
    expect(page.locator("#picture img")).to_have_attribute("src", second)
    compare.focus()
    page.keyboard.down("Enter")
    expect(page.locator("#picture img")).to_have_attribute("src", first)
    page.keyboard.up("Enter")
    expect(page.locator("#picture img")).to_have_attribute("src", second)


def test_a_failed_restore_leaves_the_box_open_and_no_drop_leaves_the_page(
    open_page: Open, session: Session, tmp_path: Path
) -> None:
    write_png(session.generate("a big dog", {"paintings": 0.6}, 21, 2), tmp_path / "good.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    page = open_page(WIDE)

    def drop(path: Path, target: str = "#facts") -> bool:
        return bool(page.evaluate(DROP, [target, path.name, base64.b64encode(path.read_bytes()).decode()]))

    assert drop(tmp_path / "plain.png")
    expect(page.get_by_text("This picture carries no settings")).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#restore input[type=file]")).to_have_count(1)  # as before
    assert drop(tmp_path / "good.png")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a big dog")
    expect(page.locator("#facts .prose > div").first).to_have_text("21seed")
    assert pixels(page) == session.generate("a big dog", {"paintings": 0.6}, 21, 2).image.tobytes()
    expect(page.locator("#changed")).to_have_text("")
    page.locator("#restore input[type=file]").evaluate("box => box.remove()")  # as while a file is on its way
    for target in ("#facts", "#restore", "#header", "#prompt textarea"):
        assert drop(tmp_path / "good.png", target)


def pixels(page: Any) -> bytes:
    with Image.open(io.BytesIO(page.request.get(source(page)).body())) as image:
        return image.convert("RGB").tobytes()


@pytest.fixture
def start(folders: Folders, tmp_path: Path) -> Iterator[Callable[[], tuple[subprocess.Popen[bytes], str]]]:
    """Starts the app as a process of its own, always at one port over one folder."""
    port, processes = free_port(), []

    def start() -> tuple[subprocess.Popen[bytes], str]:
        named = {"--base": folders.base, "--adapters": folders.adapters, "--data": tmp_path, "--port": port}
        options = [str(each) for pair in named.items() for each in pair]
        process = popen_warm(["", "-m", "app", *options], stdout=subprocess.PIPE)
        processes.append(process)
        while process.stdout and b"Running on" not in process.stdout.readline():
            assert process.poll() is None
        return process, f"http://127.0.0.1:{port}"

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_a_page_outlives_a_server_that_is_killed_in_mid_drawing(browser: Any, start: Any) -> None:
    server, url = start()
    context = new_context(browser, WIDE)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    page.get_by_label("number input for Steps").fill("2")
    page.get_by_label("Prompt", exact=True).fill("a big dog")
    first = draw(page, 11)
    page.get_by_label("number input for Steps").fill("100")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("button", name="Stop")).to_be_visible(timeout=PATIENCE)
    server.kill()
    expect(page.get_by_text("Connection to the server was lost")).to_be_visible(timeout=PATIENCE)
    start()
    expect(page.get_by_text("Generate draws it again")).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a big dog")
    expect(page.get_by_label("number input for Steps")).to_have_value("100")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("11")
    expect(page.locator("#picture img")).to_have_attribute("src", first)
    expect(page.locator("#changed")).to_have_text("Changed since drawn: steps")
    page.get_by_label("number input for Steps").fill("2")
    draw(page, 12)
    context.close()
