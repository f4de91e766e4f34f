"""Many adapters: the heads of files are enough to start, the rest is read when it is used, and few stay loaded."""

import os
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

import shira_diffusers.library.header_index as header_index
from app.drawing.session import Session
from app.insight.interference import Comparer
from app.library.cards import sha256_of
from app.library.library import Library
from app.settings.checks import SettingsError
from shira_diffusers import load_adapter, save_adapter
from tests import tiny
from tests.app.conftest import SUGGESTION, Folders

COUNT = 6


@pytest.fixture
def folder(pipe: StableDiffusionPipeline, tmp_path: Path) -> Path:
    """Adapters a to f that fit; g, whose head claims what its body does not hold; h, of another model; i, no file."""
    folder = tmp_path / "adapters"
    for number, name in enumerate("abcdef"):
        adapter = tiny.adapter_for(pipe, number + 1).with_metadata(instance_prompt=f"sks {name}", mask="rand")
        save_adapter(adapter, folder / f"{name}.safetensors")
    whole = (folder / "a.safetensors").read_bytes()
    (folder / "g.safetensors").write_bytes(whole[:-100])
    save_adapter(tiny.adapter_for(tiny.sdxl_pipeline(), 3), folder / "h.safetensors")
    (folder / "i.safetensors").write_bytes(b"\xff" * 40)
    return folder


def names(library: Library) -> str:
    return "".join(card.name for card in library.cards)


def test_at_the_start_heads_are_read_and_the_rest_when_nobody_draws(
    pipe: StableDiffusionPipeline, folder: Path
) -> None:
    library = Library(pipe, folder, at_once=2)
    assert names(library) == "abcdefh" and [name for name, _ in library.refused] == ["g", "i"]
    told = {card.name: card for card in library.cards}["c"]
    assert (told.opened, told.entries, told.sha256) == (False, library.cards[0].entries, "")
    assert (told.trigger, told.mask, told.components) == ("sks c", "rand", ("text_encoder", "unet"))
    assert told.density == pytest.approx(library.cards[0].density, rel=1e-4)

    while library.open_next():
        pass
    assert library.loaded == () and library._adapters.stats().device.adapters == 0  # what nobody uses takes no memory
    assert names(library) == "abcdef" and all(card.opened and card.sha256 for card in library.cards)
    assert [name for name, _ in library.refused] == ["g", "h", "i"]
    assert {card.name: card for card in library.cards}["c"].entries == library.cards[0].entries


def test_later_starts_read_no_intact_header(
    pipe: StableDiffusionPipeline, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in folder.iterdir():
        os.utime(file, (1, 1))  # what is young is read again
    first = Library(pipe, folder, tmp_path / "data", at_once=2)
    reads: list[str] = []
    real = header_index.open_adapter
    monkeypatch.setattr(header_index, "open_adapter", lambda path: (reads.append(path.stem), real(path))[1])
    later = Library(pipe, folder, tmp_path / "data", at_once=2)
    assert later.entries == first.entries and len(later.entries) == 9
    assert reads == ["g", "i"]  # what is damaged


def test_few_stay_loaded_and_pictures_are_the_same(
    pipe: StableDiffusionPipeline, folder: Path, folders: Folders, tmp_path: Path
) -> None:
    size = load_adapter(folder / "a.safetensors").nbytes
    mixes = [{"a": 1.0}, {"e": 0.5, "f": 1.0}, {"b": 1.0, "c": 1.0, "d": -0.5}, {"a": 1.0}]
    lavish = Session(pipe, "tiny", Library(pipe, folder), (SUGGESTION,))
    expected = [lavish.generate(SUGGESTION, mix, 3, 1).image.tobytes() for mix in mixes]

    frugal_pipe = StableDiffusionPipeline.from_pretrained(folders.base)
    library = Library(frugal_pipe, folder, at_once=1, room=2 * size)
    session = Session(frugal_pipe, "tiny", library, (SUGGESTION,))
    bits = tiny.snapshot(frugal_pipe)
    for mix, picture in zip(mixes, expected, strict=True):
        drawn = session.generate(SUGGESTION, mix, 3, 1)
        assert drawn.image.tobytes() == picture
        assert {name: told["sha256"] for name, told in drawn.report["adapters"].items()} == {
            name: sha256_of(folder / f"{name}.safetensors") for name in mix
        }
        assert set(library.loaded) <= set(mix) and len(library.loaded) <= 1  # half of the room is for what is idle
        assert library._adapters.stats().device.adapters <= max(2, len(mix))
    tiny.assert_same_bits(frugal_pipe, bits)
    assert Comparer(session).compare(["e", "f"])[0].whole == Comparer(lavish).compare(["e", "f"])[0].whole


def test_what_turns_out_not_to_fit_is_a_sentence_and_left_out(pipe: StableDiffusionPipeline, folder: Path) -> None:
    name = "h"
    session = Session(pipe, "tiny", Library(pipe, folder, at_once=1), (SUGGESTION,))
    before = session.library.version
    with pytest.raises(SettingsError, match=f"'{name}' cannot be used: "):
        session.generate(SUGGESTION, {"a": 1.0, name: 1.0}, 3, 1)
    assert session.active == {} and session.library.version > before
    assert name in dict(session.library.refused) and name not in names(session.library)
    with pytest.raises(SettingsError, match=f"no style named '{name}'"):
        session.generate(SUGGESTION, {name: 1.0}, 3, 1)


def test_a_file_that_is_gone_is_a_sentence(pipe: StableDiffusionPipeline, folder: Path) -> None:
    library = Library(pipe, folder, at_once=1, room=0)
    with library.using(["b"]):
        assert "b" in library.loaded
    with library.using(["c"]):
        assert library.loaded == ("c",)
    (folder / "b.safetensors").unlink()
    with pytest.raises(SettingsError, match=r"'b' cannot be read any more: the file of .* is gone: b\.safetensors"):
        library.using(["b"])


def test_an_adapter_in_use_stays_whatever_is_opened_beside(pipe: StableDiffusionPipeline, folder: Path) -> None:
    library = Library(pipe, folder, at_once=1, room=0)
    with library.using(["a", "b"]):
        library.adapter("c")
        assert library.loaded == ("a", "b")
    with library.using(["d"]):
        assert library.loaded == ("d",)


def test_renaming_and_deleting_those_that_are_not_loaded(
    pipe: StableDiffusionPipeline, folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    first = Library(pipe, tmp_path / "adapters", data)
    first.add(folder / "a.safetensors", "mine")
    library = Library(pipe, folder, data, at_once=1)
    assert not library.entry("mine").opened
    assert library.rename("mine", "ours").name == "ours"
    library.delete("ours")
    assert library.undo().name == "ours"
