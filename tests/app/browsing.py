"""Chromium for tests of the page: opened at a size, and nothing may have gone wrong in it at the end."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

import pytest

from app.drawing.session import Session

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
_BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")  # the first needs least
CHROMIUM = next(filter(None, map(shutil.which, _BROWSERS)), None)
MARKS = [
    pytest.mark.browser,
    # a page of Gradio that takes its connection for lost loads itself again (gradio-app/gradio#12907), if rarely
    pytest.mark.flaky(reruns=1),
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]
WIDE, PHONE = (1280, 900), (390, 844)
PATIENCE = 120_000  # milliseconds
expect.set_options(timeout=PATIENCE)  # machines of tests are busy
FORGET = "if (!sessionStorage.opened) { localStorage.clear(); sessionStorage.opened = true }"
"""A tab begins as a new visitor's, and remembers when it is reloaded."""
UNDER_WAY = ("AbortError: signal is aborted", "Unexpected error Connection errored out")
"""What Gradio says of requests that a reload finds under way."""
FRAMES = """async () => {
  for (let frame = 0; frame < 4; frame++) await new Promise((next) => requestAnimationFrame(() => setTimeout(next, 40)))
}"""
Open = Callable[..., Any]
"""``open_page(size=WIDE, tab="Mix")``"""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a window."""
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


def new_context(browser: Any, size: tuple[int, int]) -> Any:
    """A visitor's browser, which shares nothing with another's."""
    phone = size == PHONE
    return browser.new_context(
        viewport={"width": size[0], "height": size[1]}, is_mobile=phone, has_touch=phone, reduced_motion="reduce"
    )


def _shared_context(browser: Any, size: tuple[int, int]) -> Any:
    """The one of this size for tests that need no visitor of their own: it has the page's scripts by now."""
    known = [each for each in browser.contexts if each.pages and each.pages[0].viewport_size["width"] == size[0]]
    if known:
        return known[0]
    context = new_context(browser, size)
    context.new_page()  # stays open and tells the size
    return context


@contextmanager
def drawing_held(session: Session) -> Iterator[None]:
    """No picture is begun while the body runs: it is another visitor's turn."""
    hold = Event()
    session.queue.submit("another visitor", hold.wait)
    try:
        yield
    finally:
        hold.set()


def unfold(page: Any, control: Any) -> None:
    """Open a tab or a fold, and type no sooner than a person: frames later Gradio sets its values once more."""
    control.click()
    page.evaluate(FRAMES)


@contextmanager
def pages(browser: Any, url: str) -> Iterator[Open]:
    """Opens tabs of the app, with few steps in Mix.

    At the end, no error was on the console and nothing was asked of other servers.
    """
    opened, requests, faults = [], [], []

    def open_at(size: tuple[int, int] = WIDE, tab: str = "Mix") -> Any:
        page = _shared_context(browser, size).new_page()
        opened.append(page)
        page.set_default_timeout(PATIENCE)
        page.add_init_script(FORGET)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        errors = lambda message: message.type == "error" and not message.text.startswith(UNDER_WAY)  # noqa: E731
        page.on("console", lambda message: faults.append(message.text) if errors(message) else None)
        page.goto(url)
        page.get_by_role("button", name="Generate").wait_for()
        page.get_by_label("number input for Steps").fill("2")
        if tab != "Mix":  # the first one
            unfold(page, page.get_by_role("tab", name=tab, exact=True))
        return page

    yield open_at
    for page in opened:
        page.close()
    assert not faults, faults
    assert not [request for request in requests if not request.startswith((url, "data:", "blob:"))]
