"""Frames of several shapes: which there are, which a picture gets, and whole runs with them."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from shira_diffusers import ShiraAdapter, ShiraError, load_adapter
from shira_diffusers.dreambooth.base_model import load_base
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.data import bounds_of, bucket_frames, frames_of, nearest_frame
from shira_diffusers.dreambooth.loss import encode
from shira_diffusers.dreambooth.pictures import find_pictures
from shira_diffusers.dreambooth.prepare import load_shares, prepare_examples
from shira_diffusers.dreambooth.train import train
from tests import tiny

DEMO = Path(__file__).parents[2] / "assets" / "emoji-diffusion"


def test_frames_keep_the_area_and_the_steps() -> None:
    frames = bucket_frames(512, 256, 1024, 64)
    assert (512, 512) in frames
    assert {(256, 1024), (1024, 256), (448, 576), (576, 448), (384, 640), (640, 384)} <= set(frames)
    for width, height in frames:
        assert width % 64 == height % 64 == 0
        assert 256 <= min(width, height) <= max(width, height) <= 1024
        assert 0.75 * 512**2 < width * height <= 512**2
        assert (height, width) in frames


def test_frames_within_narrow_bounds() -> None:
    assert bucket_frames(512, 512, 512, 64) == [(512, 512)]
    assert bucket_frames(100, 90, 120, 32) == [(96, 96)]  # no multiple of 32 is in bounds but this
    assert bucket_frames(128, 100, 200, 64) == [(128, 128)]


def test_a_picture_gets_the_frame_of_the_nearest_shape() -> None:
    frames = bucket_frames(512, 256, 1024, 64)
    assert nearest_frame(frames, (3000, 3000)) == (512, 512)
    assert nearest_frame(frames, (3, 4)) == (448, 576)
    assert nearest_frame(frames, (4, 3)) == (576, 448)
    assert nearest_frame(frames, (9000, 10)) == (1024, 256)
    assert nearest_frame([(64, 64), (128, 128)], (5, 5)) == (128, 128)


def with_buckets(resolution: int, **others: object) -> TrainingConfig:
    needed = {"pretrained_model_name_or_path": "base", "instance_data_dir": "pictures", "instance_prompt": "x"}
    return TrainingConfig(**needed, resolution=resolution, enable_bucket=True, **others)


def test_bounds_suit_the_resolution_unless_they_are_given() -> None:
    assert bounds_of(with_buckets(512)) == (256, 1024, 64)
    assert bounds_of(with_buckets(1024)) == (512, 2048, 64)
    assert bounds_of(with_buckets(128)) == (64, 256, 16)
    assert bounds_of(with_buckets(128, min_bucket_reso=96, bucket_reso_steps=8)) == (96, 256, 8)
    assert bounds_of(with_buckets(128, max_bucket_reso=160)) == (64, 160, 16)


@pytest.mark.parametrize("resolution", [8, 16, 64, 96, 104, 128, 200, 256, 384, 512, 640, 768, 1024, 2048])
def test_frames_of_every_resolution_keep_its_area_and_go_through_the_autoencoder(resolution: int) -> None:
    frames = frames_of(with_buckets(resolution))
    assert (resolution, resolution) in frames
    for width, height in frames:
        assert width % 8 == height % 8 == 0
        assert 0.7 * resolution**2 < width * height <= resolution**2
    if resolution >= 64:  # photographs keep their shape, less a sixth
        for aspect in (2 / 3, 3 / 4, 4 / 3, 16 / 9):
            width, height = nearest_frame(frames, (round(1200 * aspect), 1200))
            assert 5 / 6 < width / height / aspect < 6 / 5


@pytest.mark.skipif(not DEMO.is_dir(), reason="the demo model (assets/emoji-diffusion) is not in this checkout")
def test_buckets_with_the_demo_model(tmp_path: Path) -> None:
    """With no other flag of buckets; frames whose latents the UNet cannot halve to the end."""
    for number, size in enumerate([(200, 150), (150, 200), (100, 320)]):
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / f"{number}.png")
    config = TrainingConfig(
        pretrained_model_name_or_path=str(DEMO), instance_data_dir=str(tmp_path), instance_prompt="a picture",
        output_dir=str(tmp_path / "out"), resolution=128, enable_bucket=True, max_train_steps=3, mask_type="rand",
        train_batch_size=1, report_to="none", seed=0, checkpointing_steps=10,
    )  # fmt: skip
    assert {nearest_frame(frames_of(config), size) for size in [(200, 150), (150, 200), (100, 320)]} == {
        (144, 112), (112, 144), (64, 208),
    }  # fmt: skip
    assert load_adapter(train(config)).metadata["steps"] == "3"


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> dict[str, object]:
    for folder, sizes in {
        "pictures": [(40, 20), (20, 41), (23, 22), (44, 20), (30, 62)],
        "class": [(18, 18)] * 2,
    }.items():
        (tmp_path / folder).mkdir()
        for number, size in enumerate(sizes):
            Image.effect_noise(size, 90).save(tmp_path / folder / f"{number}.png")
    return {
        "pretrained_model_name_or_path": str(base), "instance_data_dir": str(tmp_path / "pictures"),
        "instance_prompt": "a sks cat", "output_dir": str(tmp_path / "out"), "resolution": 16, "enable_bucket": True,
        "min_bucket_reso": 8, "max_bucket_reso": 32, "bucket_reso_steps": 4, "train_batch_size": 2, "seed": 7,
        "learning_rate": 1e-2, "report_to": "none", "random_flip": True, "calibration_steps": 1,
    }  # fmt: skip


def prior(tmp_path: Path) -> dict[str, object]:
    return {
        "with_prior_preservation": True, "class_data_dir": str(tmp_path / "class"), "class_prompt": "a cat",
        "num_class_images": 2,
    }  # fmt: skip


def run(settings: dict[str, object], **others: object) -> ShiraAdapter:
    return load_adapter(train(TrainingConfig(**(settings | others))))


@pytest.mark.parametrize("cached", [False, True], ids=["pixels", "cached"])
def test_batches_have_one_shape_class_pictures_too(settings: dict[str, object], tmp_path: Path, cached: bool) -> None:
    config = TrainingConfig(**settings, **prior(tmp_path), center_crop=True, cache_latents=cached)
    pipe = load_base(config, torch.device("cpu"))
    groups = [find_pictures(tmp_path / name, name) for name in ("pictures", "class")]
    examples, _ = prepare_examples(pipe, config, groups, seed=3)
    factor = 2 if cached else 1
    shapes = set()
    for batch, _ in load_shares(examples, config, 3, 0, 9):
        height, width = batch.tensors.shape[2:]
        assert len(batch.tensors) == 2 * batch.prompts.count("pictures") == 2 * batch.prompts.count("class")
        assert {tuple(ids) for ids in batch.time_ids[:, 4:].int().tolist()} == {(height * factor, width * factor)}
        shapes.add((width * factor, height * factor))
    assert shapes == {(20, 12), (12, 20), (16, 16)}  # of 2:1, 1:2 and nearly square ones
    assert shapes <= set(frames_of(config))


def test_cached_latents_are_those_of_the_framed_pictures(settings: dict[str, object], tmp_path: Path) -> None:
    """Each class picture in each frame of the pictures that it is paired with, mirrored or not."""
    config = TrainingConfig(**settings, **prior(tmp_path), center_crop=True)
    pipe = load_base(config, torch.device("cpu"))
    groups = [find_pictures(tmp_path / name, name) for name in ("pictures", "class")]
    plain, _ = prepare_examples(pipe, config, groups, seed=3)
    cached, _ = prepare_examples(pipe, replace(config, cache_latents=True), groups, seed=3)
    for draw in [(position, index) for position in range(6) for index in range(len(plain))]:
        for one, other in zip(plain[draw], cached[draw], strict=True):
            torch.testing.assert_close(encode(pipe, one.view.tensor.unsqueeze(0)).squeeze(0), other.view.tensor)
            assert torch.equal(one.view.time_ids, other.view.time_ids)


def test_a_run_with_buckets_resumes_bit_for_bit(settings: dict[str, object], tmp_path: Path) -> None:
    options = {**prior(tmp_path), "max_train_steps": 8, "checkpointing_steps": 3, "dataloader_num_workers": 1}
    whole = run(settings, **options)
    for checkpoint in ("checkpoint-3", "checkpoint-6"):
        tiny.assert_same_adapter(run(settings, **options, resume_from_checkpoint=checkpoint), whole)
    square = run(settings, **options | {"enable_bucket": False})
    assert any(square.deltas[name] != whole.deltas[name] for name in whole.deltas)


def test_an_epoch_counts_the_batches_of_all_buckets(settings: dict[str, object]) -> None:
    adapter = run(settings, num_train_epochs=2)
    assert adapter.metadata["steps"] == "6"  # 2 wide, 2 tall, 1 nearly square: a batch each


def test_what_may_surprise_is_told(
    settings: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.effect_noise((10, 10), 90).save(tmp_path / "pictures" / "small.png")
    with caplog.at_level(logging.WARNING):
        run(settings, max_train_steps=1, train_batch_size=4)
    assert "1 picture is smaller than its frame and is enlarged" in caplog.text
    assert "small.png (10 x 10)" in caplog.text
    assert "batches hold 2 examples at most, since there are no more of one shape" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_bucket_reso": 24}, "min_bucket_reso <= resolution <= max_bucket_reso, got 24, 16, 32"),
        ({"max_bucket_reso": 12}, "min_bucket_reso <= resolution <= max_bucket_reso, got 8, 16, 12"),
        ({"bucket_reso_steps": 64}, "bucket_reso_steps 64 is above resolution 16"),
        ({"bucket_reso_steps": 3}, "bucket_reso_steps must be a multiple of 2"),
        ({"cache_latents": True}, r"the crop of .*0.png \(40 x 20\) is random: add center_crop"),
    ],
)
def test_wrong_buckets_are_refused(settings: dict[str, object], wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ShiraError, match=message):
        run(settings, **wrong)


def test_random_crops_can_be_cached_where_nothing_is_cropped(settings: dict[str, object], tmp_path: Path) -> None:
    for path in (tmp_path / "pictures").iterdir():
        Image.effect_noise((20, 12), 90).save(path)
    assert run(settings, cache_latents=True, max_train_steps=1).nnz
