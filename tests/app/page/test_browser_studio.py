"""Library, Interference and Train in a real browser: the main path of each, what goes wrong, and a phone's width."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.library.cards import sha256_of
from app.studio import Studio
from shira_diffusers import save_adapter
from tests import loras, tiny
from tests.app.browsing import MARKS, PATIENCE, PHONE, WIDE, Open, expect, pages, unfold
from tests.app.conftest import Folders, served

pytestmark = MARKS


@pytest.fixture
def moss(tmp_path: Path) -> Path:
    adapter = tiny.adapter_for(tiny.pipeline(), 5).with_metadata(instance_prompt="sks <b>moss", mask="rand")
    return save_adapter(adapter, tmp_path / "moss.safetensors")


def choose(page: Any, label: str, option: str) -> None:
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()


def toast(page: Any, text: str) -> None:
    expect(page.get_by_test_id("toast-body").filter(has_text=text).first).to_be_visible(timeout=PATIENCE)


def send(page: Any, *files: Path) -> None:
    page.locator("#adapter-upload input[type=file]").set_input_files(files)


def test_library(open_page: Open, studio: Studio, moss: Path, tmp_path: Path) -> None:
    """Uploaded, looked into, downloaded, renamed, deleted and brought back; what does not fit shows the reason."""
    page = open_page(WIDE, "Library")
    table = page.locator("#library-table")
    expect(table.get_by_role("row")).to_have_count(5)
    expect(table).to_contain_text("Left out: adapter does not fit: ")

    send(page, moss)
    expect(page.locator("#library-added")).to_have_text("Added moss.", timeout=PATIENCE)
    expect(page.locator("#header")).to_contain_text("3 styles")
    expect(table.get_by_role("row").filter(has_text="moss")).to_contain_text("“sks <b>moss”")
    expect(table.get_by_role("row").filter(has_text="moss").locator("img")).to_be_visible(timeout=PATIENCE)  # drawn
    page.get_by_role("button", name="Inspect moss").click()
    expect(page.locator("#inspected")).to_contain_text(sha256_of(moss))
    expect(page.locator("#inspected .layers")).to_contain_text("unet.down_blocks.0.resnets.0.conv1.weight")
    name = "🌿 Ada's wet fern, 100 %"
    for new in (" ", f"../{name}"):
        page.get_by_role("button", name="Rename moss").click()
        page.get_by_label("New name of moss").fill(new)
        page.get_by_role("button", name="Save", exact=True).last.click()
        if new == " ":
            toast(page, "'moss' needs a name to be renamed to")
            page.get_by_label("New name of moss").press("Escape")
    expect(page.locator("#library-said")).to_have_text(f"moss is now {name}.")
    with page.expect_download() as download:
        page.get_by_role("button", name=f"Download {name}").click()
    assert download.value.suggested_filename == f"{name}.safetensors"
    assert sha256_of(Path(download.value.path())) == sha256_of(moss)
    page.get_by_role("button", name=f"Delete {name}").click()
    expect(page.locator("#library-said")).to_have_text(f"Deleted {name}. Undo brings it back.")
    expect(table.get_by_role("row")).to_have_count(5)
    page.get_by_role("button", name=f"Undo delete of {name}").click()
    expect(table.get_by_role("row")).to_have_count(6)
    assert name in [card.name for card in studio.session.cards]

    expect(page.get_by_role("button", name="Delete bluefire")).to_have_count(0)  # it came with the app
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"PK\x03\x04")
    send(page, broken)
    toast(page, "like a pickle, which is never loaded")
    studio.session.library.delete(name)


def test_of_several_files_those_that_are_refused_stay_named(
    open_page: Open, studio: Studio, moss: Path, tmp_path: Path
) -> None:
    page = open_page(WIDE, "Library")
    (tmp_path / "cut & short.safetensors").write_bytes(moss.read_bytes()[:200])
    (tmp_path / "zip.safetensors").write_bytes(b"PK\x03\x04")
    send(page, tmp_path / "cut & short.safetensors", moss, tmp_path / "zip.safetensors")
    refused = ("“cut & short” is damaged", "“zip” cannot be read")
    said = ".*".join(("Added moss", *(rf"\. Not added: {each}" for each in refused), r"get the adapter as.+\."))
    expect(page.locator("#library-added")).to_have_text(re.compile(said), timeout=PATIENCE)
    for each in refused:
        toast(page, each)
    studio.session.library.delete("moss")


def test_many_are_found_named_as_twins_and_deleted_at_once(open_page: Open, studio: Studio, moss: Path) -> None:
    page = open_page(WIDE, "Library")
    table = page.locator("#library-table")
    send(page, moss)
    expect(page.locator("#library-added")).to_have_text("Added moss.", timeout=PATIENCE)
    send(page, moss)
    expect(page.locator("#library-added")).to_have_text("Added moss-2, the same file as moss.", timeout=PATIENCE)
    expect(table.get_by_role("row").filter(has_text="moss-2")).to_contain_text("The same file as “moss”")
    expect(table.get_by_text("The same file as")).to_have_count(1)
    page.get_by_label("Filter adapters").fill("MOSS")
    expect(table.locator("tbody").get_by_role("row")).to_have_count(2)
    expect(table.get_by_role("status")).to_have_text("2 of 6 adapters")
    page.get_by_label("Choose all that can be deleted").check()
    page.get_by_role("button", name="Delete 2 chosen").click()
    expect(page.locator("#library-said")).to_have_text("Deleted 2 adapters. Undo brings them back.")
    expect(table.get_by_role("status")).to_have_text("0 of 4 adapters")
    page.get_by_role("button", name="Undo delete of 2 adapters").click()
    expect(table.get_by_role("status")).to_have_text("2 of 6 adapters")
    studio.session.library.delete("moss", "moss-2")


def test_a_lora_is_converted(open_page: Open, studio: Studio, tmp_path: Path) -> None:
    """The Library offers it where it cannot take the file as it is."""
    unet = loras.adapted(tiny.unet(), loras.UNET)
    loras.of_diffusers(tmp_path, unet)
    (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / "fern.safetensors")
    page = open_page(WIDE, "Library")
    expect(page.locator("#convert-lora")).not_to_be_visible()
    send(page, tmp_path / "fern.safetensors")
    expect(page.locator("#library-added")).to_contain_text("fern.safetensors is a LoRA", timeout=PATIENCE)
    page.get_by_role("button", name="Convert to SHiRA at 2 %").click()
    said = re.compile(r"Converted fern, which reproduces \d+ % of the LoRA's effect")
    expect(page.locator("#library-added")).to_contain_text(said, timeout=PATIENCE)
    expect(page.locator("#convert-lora")).not_to_be_visible()
    assert "fern" in [card.name for card in studio.session.cards]
    studio.session.library.delete("fern")


def test_a_lora_in_the_folder_of_adapters_is_converted(browser: Any, folders: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    loras.of_diffusers(folder, loras.adapted(tiny.unet(), loras.UNET))
    (folder / "pytorch_lora_weights.safetensors").rename(folder / "fern.safetensors")
    studio = Studio.open(str(folders.base), folder, tmp_path / "data")
    with served(studio) as url, pages(browser, url) as open_page:
        page = open_page(WIDE, "Library")
        expect(page.locator("#library-table .reason")).to_have_text("Left out: a LoRA; Convert makes an adapter of it")
        page.get_by_role("button", name="Convert fern").click()
        said = re.compile(r"Converted fern-2, which reproduces \d+ % of the LoRA's effect")
        expect(page.locator("#library-said")).to_contain_text(said, timeout=PATIENCE)
    assert [card.name for card in studio.session.cards] == ["fern-2"]
    studio.close()


def test_interference(open_page: Open) -> None:
    page = open_page(WIDE, "Interference")
    page.get_by_role("button", name="Compare them").click()
    expect(page.locator("#interference-summary h3")).to_have_text("bluefire + paintings", timeout=PATIENCE)
    labels = ["base", "bluefire", "paintings", "bluefire + paintings"]
    expect(page.locator("#interference-pictures .caption-label")).to_have_text(labels, timeout=PATIENCE)
    expect(page.locator("#interference-summary .verdict")).to_contain_text("a hint, no more", timeout=PATIENCE)
    expect(page.locator("#interference-summary")).to_contain_text("of their entries")
    cells = page.locator("#interference-heat .cells i")
    expect(cells.first).to_have_attribute("title", "text_encoder.encoder.layers.0.mlp.fc1.weight: 18.6 %")
    page.get_by_label("AWOR").check()
    expect(page.locator("#interference-heat .legend")).to_contain_text("100 % is orthogonal")
    page.get_by_text("All layers as a table").click()
    expect(page.get_by_role("row").filter(has_text="unet.down_blocks.0.resnets.0.conv1.weight")).to_be_visible()
    page.get_by_role("button", name="Use suggested strengths").click()
    for name in ("bluefire", "paintings"):
        expect(page.get_by_role("checkbox", name=name)).to_be_checked()
        expect(page.get_by_label(f"strength of {name}, as a number")).to_have_value("1")
    expect(page.get_by_label("number input for Guidance")).to_have_value("2")
    expect(page.get_by_label("number input for Steps")).to_have_value("2")  # the others stay


def test_a_training_from_pictures_to_the_library(open_page: Open, studio: Studio, tmp_path: Path) -> None:
    """A real one, followed in the page; a second one is cancelled, resumed, and its checkpoint added."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (16, 16), name).save(pictures / f"{name}.png")
    (pictures / "red.txt").write_text("a red cat")
    page = open_page(WIDE, "Train")
    expect(page.locator("#estimate")).to_contain_text("entries", timeout=PATIENCE)
    expect(page.locator("#progress")).to_contain_text("No trainings yet")
    page.get_by_role("button", name="Start training").click()
    toast(page, "The prompt is empty")

    page.locator("#train-files input[type=file]").set_input_files(sorted(pictures.iterdir()))
    expect(page.locator("#train-pictures img")).to_have_count(2, timeout=PATIENCE)
    expect(page.locator(".caption-count")).to_have_text(
        "2 pictures, 1 caption; without one, a picture shows the words below"
    )
    expect(page.get_by_label("Caption of red.png")).to_have_value("a red cat")
    page.get_by_label("Caption of blue.png").fill("a blue cat")
    expect(page.locator(".caption-count")).to_have_text("2 pictures, 2 captions")
    page.get_by_label("Name", exact=True).fill("tiny style")
    page.get_by_label("What the pictures show").fill("a sks cat")
    unfold(page, page.get_by_role("button", name="How it learns"))
    page.get_by_label("number input for Training steps").fill("8")
    page.get_by_label("number input for Training steps").press("Enter")
    page.get_by_role("button", name="Start training").click()
    state = page.locator("#progress .state")
    expect(state).to_have_text("running", timeout=PATIENCE)
    expect(state).to_have_text("finished", timeout=PATIENCE)
    expect(page.locator("#progress")).to_contain_text("in the library as “tiny style”")
    expect(page.locator("#progress svg.curve")).to_be_visible()
    expect(page.locator("#samples img").first).to_be_visible()
    training = studio.trainings.all[0]
    assert training.recipe.sample_prompt == "a sks cat"  # what it learns, where nothing else was asked for
    folder = studio.data / "trainings" / training.id / "pictures"
    assert [file.read_text() for file in sorted(folder.glob("*.txt"))] == ["a blue cat", "a red cat"]
    assert "tiny style" in [card.name for card in studio.session.cards]
    page.get_by_role("button", name="Mix it").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a sks cat")
    expect(page.get_by_role("checkbox", name="tiny style")).to_be_checked()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("7")  # as it was
    expect(page.get_by_label("number input for Steps")).to_have_value("2")
    unfold(page, page.get_by_role("tab", name="Train", exact=True))

    page.get_by_label("number input for Training steps").fill("3000")
    page.get_by_label("number input for Training steps").press("Enter")
    page.get_by_role("button", name="Start training").click()
    expect(state).to_have_text("running", timeout=PATIENCE)
    page.get_by_role("button", name="Cancel").click()
    expect(state).to_have_text("cancelled", timeout=PATIENCE)
    studio.trainings.discard(studio.trainings.all[0].id)  # another visitor was quicker
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Discard").click()
    toast(page, "There is no training")
    expect(state).to_have_text("finished", timeout=PATIENCE)
    asked: list[str] = []
    page.once("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    page.get_by_role("button", name="Discard").click()
    assert asked == ["Discard? This cannot be undone."]
    expect(state).to_have_text("finished")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Discard").click()
    expect(page.locator("#progress")).to_contain_text("No trainings yet", timeout=PATIENCE)
    assert studio.trainings.all == ()


CUT = """() => {
  const out = (each) => each.getBoundingClientRect().right > innerWidth
  const spills = (each) => getComputedStyle(each).overflowX === 'visible' && each.scrollWidth > each.clientWidth + 1
  const over = (each) => each.matches('button.lg') && spills(each)
  const parts = document.querySelectorAll('#tabs :is(button, input, h3, h4, p, b, th, td, dd)')
  return [...parts].filter((each) => out(each) || over(each)).map((each) => each.innerText)
}"""


@pytest.fixture
def long_name(studio: Studio, tmp_path: Path) -> Iterator[str]:
    """An adapter whose name is as long as can be and holds no place to break it."""
    adapter = tiny.adapter_for(tiny.pipeline(), 6)
    entry = studio.session.library.add(save_adapter(adapter, tmp_path / "long.safetensors"), "W" * 60)
    yield entry.name
    if entry in studio.session.library.entries:
        studio.session.library.delete(entry.name)


@pytest.mark.parametrize("tab", ["Library", "Interference", "Train"])
def test_on_a_phone_nothing_is_wider_than_the_screen(open_page: Open, tab: str, long_name: str) -> None:
    page = open_page(PHONE, tab)
    if tab == "Interference":
        choose(page, "Adapters", long_name)
        page.locator("#header").click()
    button = {"Library": f"Inspect {long_name}", "Interference": "Compare them", "Train": "How it learns"}[tab]
    page.get_by_role("button", name=button).click()
    shown = {"Library": "#inspected .layers", "Interference": "#interference-heat .cells", "Train": "#how"}[tab]
    expect(page.locator(shown).first).to_be_visible(timeout=PATIENCE)
    if tab == "Library":
        expect(page.locator("#inspected")).to_be_in_viewport()  # below what was pressed
        rule = "row => getComputedStyle(row).borderBottomStyle"
        assert page.locator("#library-table tbody tr").first.evaluate(rule) == "solid"
        page.get_by_role("button", name=f"Delete {long_name}").click()
        expect(page.locator("#library-said")).to_contain_text("Deleted")
    if tab == "Interference":
        expect(page.locator("#interference-summary h3").last).to_contain_text(long_name)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE[0] and page.evaluate(CUT) == []
