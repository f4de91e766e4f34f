"""Negative prompts, sizes and pictures to start from: what diffusers draws, and what a base does not allow."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image, ImageOps

from app.drawing.abilities import Abilities
from app.drawing.restore import restore, to_keep
from app.drawing.session import Session
from app.drawing.start_pictures import StartPictures
from app.settings.checks import SettingsError
from tests import tiny
from tests.app.conftest import SUGGESTION, Folders, assert_bits, bits_of


@pytest.fixture(scope="module")
def pipe(folders: Folders) -> Any:
    """What draws beside the app."""
    pipe = StableDiffusionPipeline.from_pretrained(folders.base)
    pipe.load_shira(folders.adapters / "bluefire.safetensors", "bluefire")
    return pipe


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture that is larger than the model's, and not square."""
    image = Image.effect_noise((48, 20), 80).convert("RGB")
    image.save(tmp_path / "photo.webp", lossless=True)
    return tmp_path / "photo.webp"


def draw(pipe: Any, **options: Any) -> Image.Image:
    generator = torch.Generator().manual_seed(3)
    image: Image.Image = pipe(
        SUGGESTION, num_inference_steps=4, guidance_scale=3.0, generator=generator, **options
    ).images[0]
    return image


def test_a_negative_prompt_and_a_size_are_the_pipelines(session: Session, pipe: Any) -> None:
    bits = bits_of(session)
    picture = session.generate(SUGGESTION, {"bluefire": 1.0}, 3, 4, negative="a big dog", width=24, height=16)
    expected = draw(pipe, negative_prompt="a big dog", width=24, height=16)
    assert picture.image.size == (24, 16) and picture.image.tobytes() == expected.tobytes()
    assert picture.report["negative"] == "a big dog"
    assert picture.image.tobytes() != draw(pipe, width=24, height=16).tobytes()
    assert_bits(session, bits)


def test_a_part_of_the_mix_in_the_negative_half_is_the_pipelines(session: Session, pipe: Any, photo: Path) -> None:
    bits = bits_of(session)
    drawing = {"prompt": SUGGESTION, "mix": {"bluefire": 1.0}, "seed": 3, "steps": 4}
    picture = session.generate(**drawing, negative_mix=0.5)
    weaker = {"cross_attention_kwargs": {"shira_negative": 0.5}}
    assert picture.image.tobytes() == draw(pipe, **weaker).tobytes() != draw(pipe).tobytes()
    assert picture.report["negative_mix"] == 0.5
    started = session.generate(**drawing, negative_mix=0.5, start_image=session.starts.add(photo))
    image = ImageOps.fit(Image.open(photo).convert("RGB"), (16, 16))
    expected = draw(StableDiffusionImg2ImgPipeline(**pipe.components), image=image, strength=0.6, **weaker)
    assert started.image.tobytes() == expected.tobytes()
    assert_bits(session, bits)


def test_a_picture_to_start_from_is_diffusers_image_to_image(session: Session, pipe: Any, photo: Path) -> None:
    start = session.starts.add(photo)
    steps: list[tuple[int, int]] = []
    settings = session.checked(SUGGESTION, {"bluefire": 1.0}, 3, 4, start_image=start, change=0.5)
    picture = session.submit(settings, lambda done, of: steps.append((done, of))).result(60)
    image = ImageOps.fit(Image.open(photo).convert("RGB"), (16, 16))
    expected = draw(StableDiffusionImg2ImgPipeline(**pipe.components), image=image, strength=0.5)
    assert picture.image.tobytes() == expected.tobytes()
    assert steps == [(0, 2), (1, 2), (2, 2)] and session.active == {}
    wide = session.draw(replace(settings, width=24))
    assert wide.image.size == (24, 16)


def test_settings_travel_whole_and_without_what_is_not_here(session: Session, photo: Path) -> None:
    start = session.starts.add(photo)
    picture = session.generate(
        SUGGESTION, {}, 3, 4, negative="dark", width=24, height=24, start_image=start, change=0.5, negative_mix=0.25
    )
    restored = restore(picture.report, session)
    assert restored.notes == () and session.draw(restored.settings).image.tobytes() == picture.image.tobytes()
    assert restore(to_keep(restored.settings, session), session).settings == restored.settings
    gone = restore({**picture.report, "start_image": "0" * 64, "width": 512}, session)
    assert gone.settings == replace(restored.settings, start_image="", width=0)
    assert gone.notes == (
        "The width must be a multiple of 8 from 8 to 32 for this model, got 512; this was left out.",
        "The picture to start from is not kept here, add it again; this was left out.",
    )
    old = {key: picture.report[key] for key in ("prompt", "mix", "seed", "steps", "guidance", "method")}
    assert restore(old, session).settings == session.checked(SUGGESTION, {}, 3, 4)  # of an earlier version


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"negative": "abcdefghijklmno"}, "the negative prompt is too long: the model reads 16 tokens, got 17"),
        ({"width": 20}, "the width must be a multiple of 8 from 8 to 32 for this model, got 20"),
        ({"height": 40}, "the height must be a multiple of 8 from 8 to 32 for this model, got 40"),
        ({"start_image": "0" * 64}, "the picture to start from is not kept here"),
        ({"negative_mix": 1.5}, "the part of the mix in the negative half must be a number from 0 to 1, got 1.5"),
        (
            {"negative_mix": 0.5, "mix": {"bluefire": {"unet": {"up": 0.5}}}},
            "takes a part of one strength per style, not of down, mid and up",
        ),
    ],
)
def test_what_cannot_be_drawn_is_a_sentence(session: Session, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        session.checked(SUGGESTION, **changed)


def test_what_a_base_allows(session: Session) -> None:
    flux, sd3 = Abilities.of(tiny.flux_pipeline()), Abilities.of(tiny.sd3_pipeline())
    assert (flux.negative, sd3.negative) == (False, True) and flux.image_to_image and sd3.image_to_image
    settings = session.checked(SUGGESTION, negative="dark")
    assert list(flux.problems(settings)) == [("this model takes no negative prompt", {"negative": ""})]
    assert (flux.negative_mix, sd3.negative_mix) == ("", "joint_attention_kwargs")
    weaker = session.checked(SUGGESTION, negative_mix=0.5)
    assert list(flux.problems(weaker)) == [
        ("this model has no negative half of guidance with other styles", {"negative_mix": 1.0})
    ]
    fixed = replace(session.abilities, side=0, image_to_image=None)
    told = [problem for problem, _ in fixed.problems(replace(settings, width=8, start_image="0" * 64))]
    assert told == ["this model cannot start from a picture", "this model draws pictures of one width, got 8"]


def test_tokens_are_counted_with_begin_and_end(session: Session) -> None:
    assert session.tokens("") == (2, 16) and session.tokens("a cat") == (6, 16)


def test_pictures_to_start_from_are_kept_by_their_pixels(tmp_path: Path, photo: Path) -> None:
    starts = StartPictures(tmp_path / "starts", most=2)
    first = starts.add(photo)
    Image.open(photo).save(tmp_path / "same.png")
    assert starts.add(tmp_path / "same.png") == first  # the same pixels
    others = []
    for color in ("red", "blue"):
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{color}.png")
        starts.read(first)  # it was used, so another goes
        others.append(starts.add(tmp_path / f"{color}.png"))
    assert starts.path(first) and starts.path(others[1]) and starts.path(others[0]) is None
    with pytest.raises(SettingsError, match="not kept here"):
        starts.read(others[0])
    (tmp_path / "broken.png").write_bytes(b"PK\x03\x04")
    with pytest.raises(SettingsError, match="no picture to start from: not a picture of PNG"):
        starts.add(tmp_path / "broken.png")
    with pytest.raises(SettingsError, match="need a data folder"):
        StartPictures(None).add(photo)
