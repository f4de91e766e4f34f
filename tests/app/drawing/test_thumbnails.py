"""Thumbnails come from beside the file or are drawn when nobody waits; the time of a LoRA's fuse is measured here."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from app.drawing.fair_queue import BACKGROUND
from app.drawing.session import Session
from app.drawing.thumbnails import SIDE, Thumbnails
from app.insight import lora_timing
from app.insight.lora_timing import Timings, timings
from app.library.cards import Card
from shira_diffusers.integrations.pipelines import resident_of
from tests import tiny
from tests.app.conftest import Folders
from tests.dreambooth import colour_science as science


@pytest.fixture
def own(folders: Folders, tmp_path: Path) -> Session:
    """A session over a copy of the adapters, one of them with a picture beside it."""
    shutil.copytree(folders.adapters, tmp_path / "adapters")
    Image.new("RGB", (300, 200), "red").save(tmp_path / "adapters" / "bluefire.png")
    return Session.open(str(folders.base), tmp_path / "adapters")


def card(session: Session, name: str) -> Card:
    return next(card for card in session.cards if card.name == name)


def idle(session: Session) -> None:
    session.queue.submit(BACKGROUND, lambda: None).result(60)


def test_the_picture_beside_the_file(own: Session, tmp_path: Path) -> None:
    thumbnails = Thumbnails(own, tmp_path / "thumbnails")
    assert thumbnails.get(card(own, "bluefire")) is None  # asks for it
    idle(own)
    made = thumbnails.get(card(own, "bluefire"))
    assert made and thumbnails.version == 1
    with Image.open(made) as image:
        assert (image.format, image.size) == ("WEBP", (SIDE, SIDE))
        assert image.convert("RGB").getpixel((5, 5))[0] > 240  # type: ignore[index]
    assert Thumbnails(own, tmp_path / "thumbnails").get(card(own, "bluefire")) == made  # after a restart


def test_the_picture_beside_is_upright_on_white_and_in_srgb(own: Session, tmp_path: Path) -> None:
    """As the trainer reads it; its suffix in any case, and side files are none."""
    folder = tmp_path / "adapters"
    (folder / "bluefire.png").unlink()
    (folder / "._bluefire.png").write_bytes(b"no picture")
    pixels = np.zeros((64, 32, 4), np.uint8)
    pixels[:32] = (100, 200, 30, 255)  # above, but below is clear
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    profile = science.rgb_profile(science.ADOBE_RGB, science.ADOBE_CURVE)
    Image.fromarray(pixels).save(folder / "bluefire.PNG", exif=exif, icc_profile=profile)
    thumbnails = Thumbnails(own, tmp_path / "thumbnails")
    thumbnails.get(card(own, "bluefire"))
    idle(own)
    made = thumbnails.get(card(own, "bluefire"))
    assert made is not None
    shown = np.asarray(Image.open(made).convert("RGB"), dtype=np.int16)
    expected = science.rgb_to_srgb(pixels[0, 0, :3], science.ADOBE_RGB, science.ADOBE_CURVE)
    np.testing.assert_allclose(shown[8, 64], 255, atol=4)
    np.testing.assert_allclose(shown[120, 64], expected, atol=6)  # WebP loses a little
    assert np.abs(expected - pixels[0, 0, :3]).max() > 30


def test_one_is_drawn_and_gives_way_to_visitors(own: Session, tmp_path: Path) -> None:
    thumbnails = Thumbnails(own, tmp_path / "thumbnails")
    assert thumbnails.get(card(own, "paintings")) is None
    while not own.active:
        time.sleep(0.001)  # until it is being drawn
    own.submit(own.checked("a red cat", {}, 1, 1), visit="visitor").result(60)
    assert thumbnails.get(card(own, "paintings")) is None  # it has not gone first
    while not (made := thumbnails.get(card(own, "paintings"))):
        idle(own)
    with Image.open(made) as image:
        assert image.size == (SIDE, SIDE) and thumbnails.version == 1
    assert own.active == {}


def test_a_picture_beside_that_is_none_is_passed_over(own: Session, tmp_path: Path) -> None:
    (tmp_path / "adapters" / "bluefire.png").write_bytes(b"no picture")
    thumbnails = Thumbnails(own, tmp_path / "thumbnails")
    thumbnails.get(card(own, "bluefire"))
    idle(own)
    assert thumbnails.get(card(own, "bluefire")) is None and thumbnails.version == 0
    assert not list((tmp_path / "thumbnails").glob("*.tmp"))


def test_switching_and_fusing_a_lora_are_timed_and_change_nothing(own: Session) -> None:
    before = tiny.snapshot(own.pipe)
    state = torch.get_rng_state()
    measured = timings(own)
    assert measured and 0 < measured.switch < 60_000 and 0 < measured.fuse < 60_000 and measured.runs >= 3
    tiny.assert_same_bits(own.pipe, before)
    assert torch.equal(torch.get_rng_state(), state) and resident_of(own.pipe).active == {}


def test_cold_runs_do_not_count_in_either_time(own: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first runs took, 438 and 346 ms, stood on the page of one start, and 33 ms on that of another."""
    fuses, switches = iter([0.438, 0.346, 0.035, 0.033, 0.034]), iter([0.1, 0.05, 0.001, 0.003, 0.002])
    monkeypatch.setattr(lora_timing, "_fuse", lambda *_: next(fuses))
    monkeypatch.setattr(lora_timing, "_switch", lambda *_: next(switches))
    monkeypatch.setattr(lora_timing, "SECONDS", 0)
    assert timings(own) == Timings(pytest.approx(2.0), pytest.approx(34.0), 3)


def test_without_an_adapter_there_is_nothing_to_compare(folders: Folders, tmp_path: Path) -> None:
    assert timings(Session.open(str(folders.base), tmp_path)) is None
