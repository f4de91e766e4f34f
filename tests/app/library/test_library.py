"""The library shows what fits, says why the rest does not, and takes in, renames, deletes and brings back."""

import io
import json
import os
import pickle
import shutil
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load, save

from app.drawing.session import Session
from app.drawing.suggestions import FALLBACK_SUGGESTIONS, first_mix, first_pair, read_suggestions
from app.library import library as library_module
from app.library.cards import one_sentence, sha256_of
from app.library.library import Library
from app.library.uploads import UploadError, is_lora
from app.page.tabs import library as library_tab
from app.settings.checks import SettingsError
from shira_diffusers import ShiraAdapter, ShiraError, convert_lora, save_adapter
from shira_diffusers.adapters.base_probes import probe_base
from shira_diffusers.cli.convert import CALIBRATION_PROMPTS, calibration_of
from tests import loras, tiny
from tests.app.conftest import SUGGESTIONS, Folders


@pytest.fixture
def library(pipe: StableDiffusionPipeline, folders: Folders, tmp_path: Path) -> Library:
    return Library(pipe, folders.adapters, tmp_path / "data", max_upload_mb=2)


@pytest.fixture
def upload(pipe: StableDiffusionPipeline, tmp_path: Path) -> Path:
    adapter = tiny.adapter_for(pipe, 5).with_metadata(instance_prompt="sks moss", mask="rand")
    return save_adapter(adapter, tmp_path / "moss.safetensors")


def names(library: Library) -> list[str]:
    return [card.name for card in library.cards]


def files(library: Library) -> list[str]:
    assert library._folder
    return sorted(path.name for path in library._folder.iterdir())


def test_what_fits_is_loaded_and_described(pipe: StableDiffusionPipeline, folders: Folders) -> None:
    before = tiny.snapshot(pipe)
    library = Library(pipe, folders.adapters)
    assert names(library) == ["bluefire", "paintings"] and library.loaded == ()  # nothing is, until it is used
    tiny.assert_same_bits(pipe, before)

    bluefire = library.cards[0]
    adapter = tiny.adapter_for(pipe, 1)
    assert (bluefire.entries, bluefire.density) == (adapter.nnz, adapter.density)
    file = folders.adapters / "bluefire.safetensors"
    assert (bluefire.megabytes, bluefire.sha256) == (file.stat().st_size / 1e6, sha256_of(file))
    assert (bluefire.trigger, bluefire.mask, bluefire.note) == ("sks fire", "rand", "")
    assert (bluefire.origin, bluefire.base, bluefire.components) == ("bundled", "tiny", ("text_encoder", "unet"))
    assert library.cards[1].trigger == ""
    assert json.loads(json.dumps(bluefire.as_dict()))["metadata"]["base_model"] == "tiny"


def test_what_does_not_fit_is_left_out_with_the_reason(pipe: StableDiffusionPipeline, folders: Folders) -> None:
    refused = dict(Library(pipe, folders.adapters).refused)
    assert refused.keys() == {"broken", "stranger"}
    assert "does not fit" in refused["stranger"]
    assert refused["broken"].startswith("broken.safetensors cannot be read")
    assert not any("\n" in reason for reason in refused.values())


def test_a_name_that_is_taken_is_left_out(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    save_adapter(tiny.adapter_for(pipe, 1), tmp_path / "bluefire.safetensors")
    save_adapter(tiny.adapter_for(pipe, 2), tmp_path / "bluefire")
    library = Library(pipe, tmp_path)
    assert names(library) == ["bluefire"]
    assert library.refused == (("bluefire-2", "the name 'bluefire' is in use by another file; rename one of the two"),)


def test_side_files_take_no_names(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    """``._moss.safetensors`` came first and became "moss"; of two names alike after tidying, the tidy one stays."""
    for place in (tmp_path / "bundled", tmp_path / "data" / "adapters"):
        origin = place.name
        for name in (f"{origin} moss.safetensors", f"{origin} FIRE.SAFETENSORS", f"-{origin} fern.safetensors"):
            save_adapter(tiny.adapter_for(pipe, 1), place / name)
            (place / f"._{name}").write_bytes(b"\x00\x05\x16\x07")
        save_adapter(tiny.adapter_for(pipe, 1), place / f"{origin} fern.safetensors")
        (place / f".{origin} moss.safetensors").write_bytes(b"")
    library = Library(pipe, tmp_path / "bundled", tmp_path / "data")
    assert names(library) == [
        f"{origin} {name}" for origin in ("bundled", "adapters") for name in ("fern", "FIRE", "moss")
    ]
    assert [name for name, _ in library.refused] == ["bundled fern-2", "adapters fern-2"]
    assert {entry.path.name for entry in library.entries if not entry.fits} == {
        "-bundled fern.safetensors",
        "-adapters fern.safetensors",
    }


def test_a_suffix_in_capitals_survives_deleting_and_renaming(
    library: Library, upload: Path, pipe: StableDiffusionPipeline, folders: Folders, tmp_path: Path
) -> None:
    upload.rename(tmp_path / "data" / "adapters" / "MOSS.SAFETENSORS")
    library = Library(tiny.pipeline(), folders.adapters, tmp_path / "data")
    library.delete("MOSS")
    assert library.deleted == ("MOSS",)
    assert library.undo().fits
    assert library.rename("MOSS", "fern").fits
    assert files(library) == ["fern.safetensors"]


def test_a_folder_of_peft_among_the_bundled_ones(pipe: StableDiffusionPipeline, peft: Path, tmp_path: Path) -> None:
    """As the library of services has it; loaded, glanced at, looked into."""
    shutil.copytree(peft, tmp_path / "bundled" / "strokes")
    weights = tmp_path / "bundled" / "strokes" / "adapter_model.safetensors"
    for at_once in (24, 0):
        library = Library(tiny.pipeline(), tmp_path / "bundled", at_once=at_once)
        (entry,) = library.entries
        assert entry.fits and (entry.name, entry.opened) == ("strokes", at_once > 0)
        assert (entry.file, entry.megabytes) == (weights, weights.stat().st_size / 1e6)
        assert library.inspect("strokes").kind == "PEFT SHiRA adapter"
        assert library.adapter("strokes").nnz > 0
        assert library.entry("strokes").sha256 == sha256_of(weights)


def test_another_base_is_noted_on_the_card(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    adapter = tiny.adapter_for(pipe, 1)
    other = {name: torch.randn_like(weight) for name, weight in tiny.weights_of(pipe).items()}
    probed = ShiraAdapter(adapter.deltas, adapter.metadata, probe_base(adapter.deltas, other))
    save_adapter(probed, tmp_path / "foreign.safetensors")
    (card,) = Library(pipe, tmp_path).cards
    assert "another model (tiny)" in card.note


def test_metadata_of_strangers_is_fit_to_be_shown(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    odd = {
        "instance_prompt": "a\x1b[2J\u202eb",
        "long": "x" * 10**5,
        "path": "/etc/passwd",
        **{f"key {i}": "" for i in range(500)},
    }
    save_adapter(tiny.adapter_for(pipe, 1).with_metadata(**odd), tmp_path / "odd.safetensors")
    (card,) = Library(pipe, tmp_path).cards
    assert "path" not in card.metadata
    assert card.trigger == "a\\x1b[2J\\u202eb"
    assert len(json.dumps(card.as_dict())) < 10_000


def test_an_empty_folder_is_an_empty_library(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    library = Library(pipe, tmp_path)
    assert (library.cards, library.refused) == ((), ())
    with pytest.raises(SettingsError, match="--data"):
        library.add(tmp_path / "any.safetensors")


# -------------------------------------------------------------------- adding


def test_an_upload_is_copied_loaded_and_there_after_a_restart(
    library: Library, upload: Path, pipe: StableDiffusionPipeline, folders: Folders, tmp_path: Path
) -> None:
    before, bits = library.version, tiny.snapshot(pipe)
    entry = library.add(upload)
    assert entry.fits and library.version > before
    assert (entry.name, entry.origin, entry.trigger) == ("moss", "yours", "sks moss")
    assert names(library) == ["bluefire", "paintings", "moss"]
    assert entry.sha256 == sha256_of(upload) == sha256_of(library.entry("moss").path)
    tiny.assert_same_bits(pipe, bits)
    again = Library(tiny.pipeline(), folders.adapters, tmp_path / "data")
    assert again.cards == library.cards


def test_a_name_that_is_taken_gets_a_number(library: Library, upload: Path) -> None:
    assert library.add(upload, "Bluefire").name == "Bluefire-2"
    assert library.add(upload, "../../bluefire.safetensors").name == "bluefire-3"
    assert files(library) == ["Bluefire-2.safetensors", "bluefire-3.safetensors"]


def test_an_adapter_of_another_model_is_kept_with_the_reason_and_can_be_deleted(
    library: Library, folders: Folders
) -> None:
    entry = library.add(folders.adapters / "stranger.safetensors")
    assert not entry.fits and "does not fit" in entry.reason and str(folders.adapters) not in entry.reason
    assert entry.as_dict()["fits"] is False
    assert ("stranger-2", entry.reason) in library.refused
    library.delete("stranger-2")
    assert files(library) == []


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    """The folder that PEFT's SHiRA tuner writes."""
    from peft import ShiraConfig, get_peft_model

    model = get_peft_model(tiny.unet(), ShiraConfig(r=2, target_modules=["to_q"], init_weights=False))
    model.save_pretrained(tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "tiny"}))
    return tmp_path / "peft"


def test_what_peft_wrote_is_taken_in(library: Library, peft: Path) -> None:
    entry = library.add(peft / "adapter_model.safetensors")
    assert entry.fits and entry.components == ("unet",) and entry.metadata["source"] == "peft"
    assert "adapter_config.json did not come with it" in entry.note
    assert library.inspect("adapter_model").kind == "PEFT SHiRA adapter"


def test_what_peft_wrote_becomes_ours_with_its_config(library: Library, peft: Path, folders: Folders) -> None:
    bare = library.add(peft / "adapter_model.safetensors", "bare")
    card = library.add(peft / "adapter_model.safetensors", "whole", peft / "adapter_config.json")
    assert card.fits and (card.base, card.mask, card.note, card.components) == ("tiny", "rand", "", ("unet",))
    assert library.inspect("whole").kind == "SHiRA adapter" and card.sha256 == sha256_of(card.path)
    tiny.assert_same_adapter(library.adapter("whole"), library.adapter("bare"))
    again = Library(StableDiffusionPipeline.from_pretrained(folders.base), folders.adapters, peft.parent / "data")
    assert {each.name: each.base for each in again.cards} | {"bare": "", "whole": "tiny"} == {
        each.name: each.base for each in again.cards
    }
    library.delete(bare.name, card.name)
    assert files(library) == []


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (b"{", "adapter_config.json is not JSON"),
        (b"\xff\xfe", "do not go together"),
        (b"[" * 10**5, "do not go together"),
        (b'{"peft_type": "LORA"}', "type 'LORA', expected 'SHIRA'"),
        (b" " * 1_000_001, "too large"),
    ],
)
def test_a_config_that_is_none_is_refused(library: Library, peft: Path, config: bytes, sentence: str) -> None:
    (peft / "adapter_config.json").write_bytes(config)
    with pytest.raises(UploadError, match=sentence) as caught:
        library.add(peft / "adapter_model.safetensors", "x", peft / "adapter_config.json")
    assert (
        str(peft.parent) not in str(caught.value)
        and files(library) == []
        and names(library)
        == [
            "bluefire",
            "paintings",
        ]
    )


def test_peft_layers_of_another_model_are_listed_with_the_reason(library: Library, peft: Path) -> None:
    weights = load((peft / "adapter_model.safetensors").read_bytes())
    strange = {key.replace("down_blocks.1", "down_blocks.7"): tensor for key, tensor in weights.items()}
    (peft / "adapter_model.safetensors").write_bytes(save(strange))
    entry = library.add(peft / "adapter_model.safetensors", "x", peft / "adapter_config.json")
    assert not entry.fits and "does not fit" in entry.reason


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA as kohya's trainers write it."""
    unet, text = loras.adapted(tiny.unet(), loras.UNET), loras.adapted(tiny.text_encoder(), loras.TEXT)
    return loras.of_kohya(tmp_path_factory.mktemp("lora") / "my style.safetensors", unet, text)


def test_a_lora_is_converted(library: Library, lora: Path, pipe: StableDiffusionPipeline) -> None:
    assert is_lora(lora)
    card = library.convert(lora)
    assert (card.name, card.fits, card.note, card.origin) == ("my style", True, "", "yours")
    draw = calibration_of(pipe, CALIBRATION_PROMPTS)
    expected = convert_lora(lora, pipe, 0.02, calibration=draw, dtype=torch.float16).adapter
    tiny.assert_same_adapter(library.adapter("my style"), expected)
    assert card.metadata["effect_kept"] == expected.metadata["effect_kept"]
    assert card.metadata["lora"] == "“my style”" and files(library) == ["my style.safetensors"]
    assert library.convert(lora, "my style").name == "my style-2"


def test_a_lora_of_peft_is_converted_with_its_config(library: Library, tmp_path: Path) -> None:
    loras.of_peft(tmp_path / "peft", tiny.unet(), ["to_q"])
    weights, config = (tmp_path / "peft" / f"adapter_{name}" for name in ("model.safetensors", "config.json"))
    assert is_lora(weights) and library.convert(weights, "fern", config).fits
    assert files(library) == ["fern.safetensors"]
    before = library.entries
    for broken in (None, weights):
        with pytest.raises(UploadError, match=r"“fern”|JSON|utf-8"):
            library.convert(weights, "fern", broken)
    assert library.entries == before and files(library) == ["fern.safetensors"]


def test_what_cannot_be_converted_leaves_nothing(library: Library, lora: Path, upload: Path, tmp_path: Path) -> None:
    wide = loras.adapted(tiny.unet(block_out_channels=(32, 96)), loras.UNET)
    other = loras.of_diffusers(tmp_path / "wide", wide) / "pytorch_lora_weights.safetensors"
    (tmp_path / "cut.safetensors").write_bytes(lora.read_bytes()[:-9])
    before = library.entries
    for file, sentence in (
        (other, "“x” cannot be loaded into this model by diffusers"),
        (upload, "“x” is a SHiRA adapter already"),
        (tmp_path / "cut.safetensors", "“x” cannot be read"),
    ):
        with pytest.raises(UploadError, match=sentence) as caught:
            library.convert(file, "x")
        assert str(tmp_path) not in str(caught.value) and "\n" not in str(caught.value)
        assert library.entries == before and files(library) == []
    assert not is_lora(upload) and not is_lora(tmp_path / "cut.safetensors")


def zipped() -> bytes:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(10**7))
    return bomb.getvalue()


def header(claimed: int, text: bytes = b"{}") -> bytes:
    return claimed.to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "cannot be read"),
        (b"no adapter", "cannot be read"),
        (zipped(), "like a pickle, which is never loaded"),
        (pickle.dumps({"a": 1}), "like a pickle, which is never loaded"),
        (header(2**63), "its header claims 9223372036854775808 bytes"),
        (header(2**31, b'{"a":1}'), "its header claims"),
        (header(10**6, b"{" + b" " * 10), "its header claims"),
        (header(10**5, b"[" * 10**5), "cannot be read"),
        (header(2), "holds no tensors"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read"),
        (save({"a.lora_A.weight": torch.zeros(2, 2)}), "it looks like a LoRA"),
        (save({"a": torch.zeros(2, 2)}), "is not a SHiRA adapter"),
        (bytes(3 * 10**6), "is too large: 2 MB at most"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_other_files_are_refused_in_a_sentence_and_leave_nothing(
    library: Library, tmp_path: Path, content: bytes, sentence: str
) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    before = library.entries
    with pytest.raises(UploadError) as caught:
        library.add(file, "../<b>x")
    assert sentence in str(caught.value)
    assert str(tmp_path) not in str(caught.value) and "\n" not in str(caught.value)
    assert files(library) == [] and library.entries == before


def test_a_file_cannot_claim_more_than_it_holds(library: Library, upload: Path, tmp_path: Path) -> None:
    raw = upload.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    told = json.loads(raw[8 : 8 + length])
    key = next(key for key in told if key != "__metadata__")
    told[key]["shape"] = [2**40]
    text = json.dumps(told).encode()
    forged = tmp_path / "forged.safetensors"
    forged.write_bytes(header(len(text), text) + raw[8 + length :])
    with pytest.raises(UploadError, match="cannot be read"):
        library.add(forged)
    forged.write_bytes(raw[:-10])
    with pytest.raises(UploadError, match="cannot be read"):
        library.add(forged)


def test_a_full_library_takes_no_more(library: Library, upload: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_module, "MAX_YOURS", 1)
    library.add(upload)
    with pytest.raises(UploadError, match="full"):
        library.add(upload)
    assert files(library) == ["moss.safetensors"]


def test_what_a_crash_left_is_swept_at_the_start(
    library: Library, upload: Path, folders: Folders, tmp_path: Path
) -> None:
    library.add(upload)
    library.delete("moss")
    assert library._folder
    (library._folder / ".upload-abc.safetensors").write_bytes(b"half")
    (tmp_path / "data" / "trash" / "1000~old.safetensors").write_bytes(b"deleted in 1970")
    again = Library(tiny.pipeline(), folders.adapters, tmp_path / "data")
    assert files(again) == [] and again.deleted == ("moss",)


# -------------------------------------------------------------------- renaming, deleting, bringing back


def test_renaming_keeps_the_adapter(library: Library, upload: Path, pipe: StableDiffusionPipeline) -> None:
    library.add(upload)
    with library.using(["moss"]):
        assert library.loaded == ("moss",)
    card = library.rename("moss", "Wet moss.safetensors")
    assert (card.name, card.sha256) == ("Wet moss", sha256_of(upload))
    assert library.loaded == ()
    with library.using(["Wet moss"]):
        assert library.loaded == ("Wet moss",)
    assert files(library) == ["Wet moss.safetensors"]
    assert library.rename("Wet moss", "wet MOSS").name == "wet MOSS"
    assert library.rename("wet MOSS", "wet MOSS").name == "wet MOSS"
    assert library.rename("wet MOSS", "AC/DC").name == "AC-DC"
    assert files(library) == ["AC-DC.safetensors"]
    assert library.rename("AC-DC", "../../../x").path.parent == card.path.parent


def test_earlier_names_lead_to_an_adapter_until_another_has_them(library: Library, upload: Path) -> None:
    library.add(upload)
    library.rename("moss", "lichen")
    assert library.rename("lichen", "fern").was == ("moss", "lichen")
    assert "was" not in library.entry("fern").as_dict()
    library.add(upload, "lichen")
    assert (library.entry("fern").was, library.entry("lichen").was) == (("moss",), ())
    library.delete("lichen")
    assert library.entry("fern").was == ("moss",)
    assert library.rename("fern", "moss").was == ("fern",)
    for number in range(20):
        library.rename(library.entries[-1].name, f"style {number}")
    assert library.entries[-1].was[-1] == "style 18" and len(library.entries[-1].was) == 8


def test_a_name_can_be_renamed_to_no_other_adapters(library: Library, upload: Path) -> None:
    library.add(upload)
    with pytest.raises(SettingsError, match="is taken"):
        library.rename("moss", "BLUEFIRE")
    with pytest.raises(SettingsError, match="no adapter named 'nobody'"):
        library.rename("nobody", "x")
    with pytest.raises(SettingsError, match="no adapter is chosen"):
        library.delete(None)
    with pytest.raises(SettingsError, match="'moss' needs a name to be renamed to, got none"):
        library.rename("moss", "  ")
    for strange in (None, 5, {"a": 1}):
        with pytest.raises(SettingsError, match=r"'moss' needs a name to be renamed to, got (none|5|\{'a': 1\})$"):
            library.rename("moss", strange)
    with pytest.raises(SettingsError, match="no adapter named"):
        library.delete(["moss"])
    assert names(library) == ["bluefire", "paintings", "moss"]


def test_what_came_with_the_app_stays(library: Library, folders: Folders) -> None:
    before = sorted(folders.adapters.rglob("*"))
    with pytest.raises(SettingsError, match="came with the app and cannot be deleted"):
        library.delete("bluefire")
    with pytest.raises(SettingsError, match="came with the app and cannot be renamed"):
        library.rename("bluefire", "x")
    assert sorted(folders.adapters.rglob("*")) == before and "bluefire" in names(library)


def test_deleting_can_be_undone(library: Library, upload: Path, pipe: StableDiffusionPipeline) -> None:
    library.add(upload)
    library.add(upload, "fern")
    with library.using(["moss", "bluefire"]):
        pass
    library.delete("moss", "fern")
    assert names(library) == ["bluefire", "paintings"] and library.loaded == ("bluefire",)
    assert library.deleted == ("fern", "moss")
    assert library.undo().name == "fern"
    library.add(upload, "moss")
    assert library.undo("moss").name == "moss-2"
    assert sorted(names(library)) == ["bluefire", "fern", "moss", "moss-2", "paintings"]
    with pytest.raises(SettingsError, match="nothing to bring back"):
        library.undo()
    with pytest.raises(SettingsError, match=r"^no adapter named 'x{12}\.\.\.x{13}' was deleted$"):
        library.undo("x" * 10**6)


def test_what_was_deleted_together_comes_back_together(library: Library, upload: Path) -> None:
    for name in ("moss", "fern", "ivy"):
        library.add(upload, name)
    assert library.twin(library.entry("fern")) == "ivy" and not library.twin(library.entry("bluefire"))
    library.delete("ivy")
    library.delete("fern", "moss")
    assert library.deleted_last == ("fern", "moss")
    assert [card.name for card in library.undo_all()] == ["fern", "moss"]
    assert library.deleted_last == ("ivy",)
    assert [card.name for card in library.undo_all()] == ["ivy"]
    with pytest.raises(SettingsError, match="nothing to bring back"):
        library.undo_all()


def test_all_are_deleted_or_none(library: Library, upload: Path) -> None:
    library.add(upload)
    with pytest.raises(SettingsError, match="'bluefire' came with"):
        library.delete("moss", "bluefire")
    assert "moss" in names(library) and library.deleted == ()


def test_an_error_in_the_middle_of_deleting_brings_all_back(
    library: Library, upload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.add(upload)
    library.add(upload, "fern")
    before, move = files(library), os.replace

    def refuse_fern(source: Path, target: Path) -> None:
        if source.name == "fern.safetensors":
            raise PermissionError(1, "Operation not permitted")
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", refuse_fern)
        with pytest.raises(PermissionError):
            library.delete("moss", "fern")
    assert files(library) == before and library.deleted == ()
    with library.using(["moss", "fern"]):
        assert library.loaded == ("moss", "fern")


def test_a_file_that_is_gone_is_deleted(library: Library, upload: Path, tmp_path: Path) -> None:
    for name in ("moss", "fern", "ivy"):
        library.add(upload, name)
    library.entry("fern").path.unlink()
    assert library.delete("moss", "fern") == library.deleted == ("moss",)
    assert names(library) == ["bluefire", "paintings", "ivy"]
    (tmp_path / "data" / "trash").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        library.delete("ivy")
    assert "ivy" in names(library)


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (["a", "b"], "Deleted 2 adapters. Undo brings them back."),
        (["a"], "Deleted 2 adapters. Undo brings <b>a</b> back."),
        ([], "Deleted 2 adapters."),
    ],
)
def test_only_what_undo_brings_back_is_promised(kept: list[str], said: str) -> None:
    assert library_tab._deleted(["a", "b"], kept) == said


def test_changes_beside_drawing_do_not_disturb_pictures(folders: Folders, tmp_path: Path, upload: Path) -> None:
    session = Session.open(str(folders.base), folders.adapters, tmp_path / "data")
    mix = {"bluefire": 1.0, "paintings": -0.5}
    alone = session.generate("a red cat", mix, 1, 2).image.tobytes()
    library, faults, done = session.library, list[Any](), threading.Event()

    def change() -> None:
        try:
            for _ in range(5):
                library.add(upload)
                library.rename("moss", "fern")
                library.delete("fern")
                library.undo()
                library.delete("fern")
        except ShiraError as error:
            faults.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=change)
    thread.start()
    pictures = 0
    while not done.is_set() or pictures < 3:
        assert session.generate("a red cat", mix, 1, 2).image.tobytes() == alone
        pictures += 1
    thread.join()
    assert not faults and [card.name for card in library.cards] == ["bluefire", "paintings"]


# -------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("does not fit:\n  - a\n  - b"), "does not fit"),
        (ValueError("one line"), "one line"),
        (KeyError(), "KeyError"),
    ],
)
def test_an_error_is_told_in_one_sentence(error: Exception, sentence: str) -> None:
    assert one_sentence(error) == sentence


def test_suggestions_are_read_from_the_first_folder_that_has_some(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "suggestions.txt").write_text("\n")
    assert read_suggestions(tmp_path, folders.base) == SUGGESTIONS
    assert read_suggestions(tmp_path) == FALLBACK_SUGGESTIONS


def test_the_page_opens_with_the_bundled_pair_that_shows_both_or_else_the_first_style() -> None:
    assert first_mix(["bluefire", "gold", "paintings", "blorp"]) == {"bluefire": 1.0, "paintings": 1.0}
    assert first_mix(["bluefire", "gold"]) == {"bluefire": 1.0} and first_mix([]) == {}
    assert first_pair(["bluefire", "gold", "paintings", "blorp"]) == ["bluefire", "paintings"]
    assert first_pair(["bluefire", "gold", "moss"]) == ["bluefire", "gold"] and first_pair([]) == []
