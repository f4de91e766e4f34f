"""The shelf shows what fits and says why the rest does not."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from app.shelf import FALLBACK_SUGGESTIONS, load_shelf, one_sentence, read_suggestions
from shira_diffusers import ShiraAdapter, save_adapter
from shira_diffusers.probes import probe_base
from tests import tiny
from tests.app.conftest import SUGGESTIONS, Folders


def test_what_fits_is_loaded_and_described(pipe: StableDiffusionPipeline, folders: Folders) -> None:
    before = tiny.snapshot(pipe)
    shelf = load_shelf(pipe, folders.adapters)
    assert [card.name for card in shelf.cards] == ["bluefire", "paintings"] == sorted(pipe.list_shira())
    assert pipe.get_active_shira() == {}
    tiny.assert_same_bits(pipe, before)

    bluefire = shelf.cards[0]
    adapter = tiny.adapter_for(pipe, 1)
    assert (bluefire.entries, bluefire.density) == (adapter.nnz, adapter.density)
    assert bluefire.megabytes == (folders.adapters / "bluefire.safetensors").stat().st_size / 1e6
    assert (bluefire.trigger, bluefire.mask, bluefire.note) == ("sks fire", "rand", "")
    assert bluefire.metadata["base_model"] == "tiny"
    assert shelf.cards[1].trigger == ""
    assert json.loads(json.dumps(bluefire.as_dict()))["metadata"]["base_model"] == "tiny"


def test_what_does_not_fit_is_left_out_with_the_reason(pipe: StableDiffusionPipeline, folders: Folders) -> None:
    refused = dict(load_shelf(pipe, folders.adapters).refused)
    assert refused.keys() == {"broken", "stranger"}
    assert "does not fit" in refused["stranger"]
    assert refused["broken"].startswith("broken.safetensors cannot be read")
    assert not any("\n" in reason for reason in refused.values())


def test_a_name_that_is_taken_is_left_out(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    save_adapter(tiny.adapter_for(pipe, 1), tmp_path / "bluefire.safetensors")
    save_adapter(tiny.adapter_for(pipe, 2), tmp_path / "bluefire")
    shelf = load_shelf(pipe, tmp_path)
    assert [card.name for card in shelf.cards] == ["bluefire"]
    assert [name for name, _ in shelf.refused] == ["bluefire"]
    assert "is in use" in shelf.refused[0][1]


def test_a_warning_at_loading_is_noted_on_the_card(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    adapter = tiny.adapter_for(pipe, 1)
    other = {name: torch.randn_like(weight) for name, weight in tiny.weights_of(pipe).items()}
    probed = ShiraAdapter(adapter.deltas, adapter.metadata, probe_base(adapter.deltas, other))
    save_adapter(probed, tmp_path / "foreign.safetensors")
    (card,) = load_shelf(pipe, tmp_path).cards
    assert "another model" in card.note


def test_an_empty_folder_is_an_empty_shelf(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    shelf = load_shelf(pipe, tmp_path)
    assert (shelf.cards, shelf.refused) == ((), ())


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
