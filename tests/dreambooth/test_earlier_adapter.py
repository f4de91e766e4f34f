"""Going on from an earlier adapter: its entries and values, on its own base and at its own density."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shira_diffusers import ShiraAdapter, ShiraError, load_adapter, save_adapter
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.train import train
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def settings(run_settings: dict[str, object]) -> dict[str, object]:
    return run_settings | {"max_train_steps": 2, "mask_type": "rand", "mask_seed": 3, "density": 0.05}


def run(settings: dict[str, object], **others: object) -> ShiraAdapter:
    return load_adapter(train(TrainingConfig(**(settings | others))))


@pytest.fixture
def earlier(settings: dict[str, object], tmp_path: Path) -> Path:
    run(settings, output_dir=str(tmp_path / "earlier"))
    return tmp_path / "earlier"


def test_it_goes_on_with_the_entries_and_from_the_values(settings: dict[str, object], earlier: Path) -> None:
    """Where nothing is learned, the result is the earlier adapter; otherwise its entries have other values."""
    before = load_adapter(earlier)
    bare = {"mask_type": "wm", "mask_seed": 0, "resume_from_adapter": str(earlier)}
    still = run(settings, **bare, learning_rate=0.0)
    tiny.assert_same_adapter(still, before)
    after = run(settings, **bare)
    assert after.deltas.keys() == before.deltas.keys()
    for name, delta in after.deltas.items():
        assert torch.equal(delta.indices, before.deltas[name].indices)
        assert not torch.equal(delta.values, before.deltas[name].values)
    told = {"mask": "rand", "mask_seed": "3", "density": "0.05", "resumed_from": "earlier", "steps": "2"}
    assert {name: after.metadata[name] for name in told} == told


def test_a_run_that_went_on_is_resumed_bit_for_bit(settings: dict[str, object], earlier: Path) -> None:
    options = {"resume_from_adapter": str(earlier), "max_train_steps": 4, "checkpointing_steps": 2}
    whole = run(settings, **options)
    again = run(settings, **options, resume_from_checkpoint="checkpoint-2")
    tiny.assert_same_adapter(again, whole)
    assert again.metadata == whole.metadata


def test_another_density_is_refused(settings: dict[str, object], earlier: Path, tmp_path: Path) -> None:
    expected = r"the adapter '.*' has density 0.05, got --density 0.02: .* give --density 0.05$"
    with pytest.raises(ShiraError, match=expected):
        run(settings, resume_from_adapter=str(earlier), density=0.02)
    adapter = load_adapter(earlier)
    bare = save_adapter(replace(adapter, metadata={}), tmp_path / "bare")  # as of another tool
    with pytest.raises(ShiraError, match=expected):
        run(settings, resume_from_adapter=str(bare), density=0.02)
    tiny.assert_same_adapter(run(settings, resume_from_adapter=str(bare), learning_rate=0.0), adapter)
    assert not (tmp_path / "out" / "checkpoint-1").exists()


def test_another_base_is_refused(settings: dict[str, object], earlier: Path, tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    pipe.unet = tiny.unet(seed=8)
    pipe.save_pretrained(tmp_path / "other")
    with pytest.raises(ShiraError, match=r"the adapter '.*' was trained on another base \('.*'\) than '.*other': go"):
        run(settings, resume_from_adapter=str(earlier), pretrained_model_name_or_path=str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()


def test_components_that_are_not_trained_are_named(settings: dict[str, object], tmp_path: Path) -> None:
    run(settings, output_dir=str(tmp_path / "both"), train_text_encoder=True)
    options = {"resume_from_adapter": str(tmp_path / "both")}
    with pytest.raises(ShiraError, match=r"changes text_encoder, expected unet alone: add --train_text_encoder"):
        run(settings, **options)
    assert run(settings, **options, train_text_encoder=True).component_names() == ["text_encoder", "unet"]


@pytest.mark.parametrize("other", [{"avoid_adapters": ("a",)}, {"use_dora": True}])
def test_what_contradicts_it_is_refused(settings: dict[str, object], other: dict[str, object]) -> None:
    with pytest.raises(ShiraError, match=f"entries and values: drop {next(iter(other))}"):
        TrainingConfig(**settings, **other, resume_from_adapter="x")


def test_a_file_that_is_not_there_is_named(settings: dict[str, object]) -> None:
    with pytest.raises(FileNotFoundError, match=r"no adapter at nowhere\.safetensors"):
        run(settings, resume_from_adapter="nowhere.safetensors")
