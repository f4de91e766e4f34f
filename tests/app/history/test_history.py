"""History, presets and restoring: what is kept survives, and files of strangers are told apart in a sentence."""

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from app.drawing.restore import restore, to_keep
from app.drawing.session import Session
from app.history.history import History, pages_of
from app.history.png_metadata import MAX_TEXT, read_settings
from app.history.presets import Presets
from app.settings.checks import SettingsError
from app.settings.picture import METADATA_KEY
from shira_diffusers import ShiraError, __version__, save_adapter
from tests import tiny
from tests.app.conftest import SUGGESTION


def test_a_kept_picture_can_be_drawn_again_after_a_restart(session: Session, tmp_path: Path) -> None:
    mix = {"bluefire": {"unet": 0.5}, "paintings": -0.5}
    picture = session.generate(SUGGESTION, mix, 3, 1)
    History(tmp_path).add(picture)
    kept = History(tmp_path).page()[0]
    told = kept.settings
    assert told["version"] == __version__
    hashes = {card.name: card.sha256 for card in session.cards}
    assert told["adapters"]["bluefire"] == {"strength": {"unet": 0.5}, "sha256": hashes["bluefire"]}
    restored = restore(told, session)
    assert restored.notes == ()
    assert session.draw(restored.settings).image.tobytes() == Image.open(kept.path).tobytes() == picture.image.tobytes()


def test_pages_are_newest_first_and_names_are_looked_up(session: Session, tmp_path: Path) -> None:
    history = History(tmp_path)
    (tmp_path / "note.png").write_bytes(b"not of the history")
    names = [history.add(session.generate(SUGGESTION, {}, seed, 1)).name for seed in range(5)]
    assert [kept.name for number in (1, 2, 3) for kept in history.page(number, 2)] == names[::-1]
    assert (pages_of(history.find(), 2), history.page(4, 2), len(history)) == (3, (), 5)
    history.delete(names[2])
    for name in (names[2], "note.png", "../presets.json", str(tmp_path / names[0]), None, 3):
        with pytest.raises(SettingsError, match="no picture named"):
            history.delete(name)
    assert len(history) == 4 and (tmp_path / "note.png").exists()


def test_searches_keep_no_more_texts_than_there_are_pictures(session: Session, tmp_path: Path) -> None:
    history = History(tmp_path, most=2)
    for seed in range(5):
        history.add(session.generate(SUGGESTION, {}, seed, 1))
        assert len(history.find(f"seed {seed}")) == 1
        assert len(history._texts) <= 2


def _with_text(text: str, *, zipped: bool = False) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        info = PngImagePlugin.PngInfo()
        info.add_text(METADATA_KEY, text, zip=zipped)
        Image.new("RGB", (4, 4)).save(path, "png", pnginfo=info)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"\x80\x04K\x01."), "no PNG that can be read"),
        (lambda path: path.write_text("<svg/>"), "no PNG that can be read"),
        (lambda path: Image.new("RGB", (4, 4)).save(path, "jpeg"), "no PNG that can be read"),
        (lambda path: Image.new("RGB", (4, 4)).save(path, "png"), "carries no settings"),
        (_with_text("{"), "must be a JSON object"),
        (_with_text("[1]"), "must be a JSON object"),
        (_with_text("[" * 50_000), "must be a JSON object"),
        (_with_text("x" * (MAX_TEXT + 1)), "too long"),
        (_with_text("x" * 3_000_000, zipped=True), "no PNG that can be read"),  # a bomb of text
    ],
)
def test_a_file_that_holds_no_settings_is_a_sentence(
    tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    write(tmp_path / "a.png")
    with pytest.raises(SettingsError, match=message):
        read_settings(tmp_path / "a.png")


def test_a_picture_too_large_to_decode_is_refused_unread(tmp_path: Path) -> None:
    header = (100_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    chunk = b"IHDR" + header
    size, check = len(header).to_bytes(4, "big"), zlib.crc32(chunk).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + size + chunk + check)
    with pytest.raises(SettingsError, match="no PNG that can be read"):
        read_settings(tmp_path / "a.png")


def test_what_is_different_from_then_is_told(session: Session) -> None:
    given = {
        "prompt": SUGGESTION,
        "mix": {"bluefire": 1.0, "gone": 1.0},
        "model": "other",
        "adapters": {"bluefire": {"sha256": "0"}, "gone": 3},
    }
    restored = restore(given, session)
    assert restored.settings.mix == {"bluefire": 1.0}
    assert [note.split(",")[0].split(" than")[0] for note in restored.notes] == [
        "“bluefire” is a different file now",
        "“gone” is not among the styles here",
        "It was drawn with another model",
    ]


def test_what_has_another_name_by_now_is_found_by_its_hash(session: Session) -> None:
    hashes = {card.name: {"sha256": card.sha256} for card in session.cards}
    given = {"prompt": SUGGESTION, "mix": {"moss": 0.5}, "adapters": {"moss": hashes["bluefire"]}}
    restored = restore(given, session)
    assert restored.settings.mix == {"bluefire": 0.5}
    assert restored.notes == ("“moss” is called “bluefire” here.",)
    swapped = {"bluefire": hashes["paintings"], "paintings": hashes["bluefire"]}
    both = restore({**given, "mix": {"bluefire": 0.1, "paintings": 0.2}, "adapters": swapped}, session)
    assert both.settings.mix == {"bluefire": 0.2, "paintings": 0.1} and len(both.notes) == 2
    twice = restore({**given, "mix": {"moss": 0.5, "bluefire": 1.0}}, session)
    assert twice.settings.mix == {"bluefire": 1.0} and "“moss” is not among the styles here" in twice.notes[0]
    kept = to_keep(twice.settings, session)
    assert kept["adapters"] == {"bluefire": hashes["bluefire"]} and restore(kept, session).notes == ()


def test_what_was_renamed_here_is_found_without_a_hash(session: Session, tmp_path: Path) -> None:
    library = session.library
    library.add(save_adapter(tiny.adapter_for(tiny.pipeline(), 5), tmp_path / "moss.safetensors"))
    then = {"sha256": library.entry("moss").sha256}
    library.rename("moss", "fern")
    given = {"prompt": SUGGESTION, "mix": {"moss": 0.5}}
    for adapters in ({}, {"moss": {"sha256": ""}}, {"moss": then}):
        restored = restore({**given, "adapters": adapters}, session)
        assert restored.settings.mix == restored.then.mix == {"fern": 0.5}
        assert restored.notes == ("“moss” is called “fern” here.",)
    other = restore({**given, "adapters": {"moss": {"sha256": "0" * 64}}}, session)
    assert other.settings.mix == {}  # it is another file
    library.delete("fern")
    assert restore(given, session).settings.mix == {}


def test_presets_survive_a_restart_and_a_broken_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "presets.json"
    Presets(file).save("mine", {"prompt": "a", "mix": {}})
    assert Presets(file).get("mine") == {"prompt": "a", "mix": {}}
    assert json.loads(file.read_text()) == {"mine": {"prompt": "a", "mix": {}}}
    with pytest.raises(TypeError):  # not JSON; a full disk would do the same
        Presets(file).save("other", {"prompt": object()})
    assert os.listdir(tmp_path) == ["presets.json"]
    file.write_text("{")
    with pytest.raises(ShiraError, match="holds no presets"):
        Presets(file)
