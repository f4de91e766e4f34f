"""Pictures as tensors, and the order in which a run sees them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shira_diffusers import ShiraError
from shira_diffusers.training.data import (
    Batches,
    Examples,
    Framing,
    Picture,
    PixelReader,
    View,
    collate,
    find_pictures,
    read_picture,
)

RED = (255, 0, 0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_captions_beside_pictures_else_the_prompt(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.webp"):
        Image.new("RGB", (4, 4), RED).save(tmp_path / name)
    (tmp_path / "b.txt").write_text("a red\n square \n", encoding="utf-8")
    (tmp_path / "c.txt").write_text("  \n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not a picture", encoding="utf-8")
    (tmp_path / ".hidden.png").write_bytes(b"not a picture")
    found = find_pictures(tmp_path, "a picture of sks")
    assert [(p.path.name, p.prompt) for p in found] == [
        ("a.JPG", "a picture of sks"),
        ("b.png", "a red square"),
        ("c.webp", "a picture of sks"),
    ]


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShiraError, match=r"no folder of pictures at '.*missing'"):
        find_pictures(tmp_path / "missing", "x")
    with pytest.raises(ShiraError, match=r"no pictures in .*expected files such as"):
        find_pictures(tmp_path, "x")


def test_corrupt_pictures_are_all_named(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("hello", encoding="utf-8")
    with pytest.raises(ShiraError, match=r"2 of 3 pictures(.|\n)*half.png(.|\n)*text.jpg: not a picture"):
        find_pictures(tmp_path, "x")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I", "F"])
def test_every_mode_reads_as_the_same_grey(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "picture.tiff"
    if mode in ("I;16", "I", "F"):
        levels = {"I;16": (65535, np.uint16), "I": (65535, np.int32), "F": (1.0, np.float32)}[mode]
        Image.fromarray(np.full((4, 4), levels[0], levels[1])).save(path)
    elif mode == "YCbCr":
        path = path.with_suffix(".jpg")  # which is stored so
        Image.new("YCbCr", (4, 4), (255, 128, 128)).save(path)
    elif mode in ("HSV", "LA", "P"):
        path = path.with_suffix(".png")
        Image.new("RGB", (4, 4), "white").convert("RGB" if mode == "HSV" else mode).save(path)
    else:
        Image.new("RGB", (4, 4), "white").convert("L" if mode == "1" else "RGB").convert(mode).save(path)
    image = read_picture(path)
    assert image.mode == "RGB"
    assert np.asarray(image).min() >= 250


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "grey.png")
    assert np.asarray(read_picture(tmp_path / "grey.png"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparent_parts_are_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (*RED, 255))
    path = tmp_path / "clear.png"
    image.convert(mode).save(path)
    assert np.asarray(read_picture(path))[0].tolist() == [[255, 255, 255], list(RED)]


def test_exif_orientation_turns_the_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    Image.new("RGB", (8, 4), RED).save(tmp_path / "phone.jpg", exif=exif)
    assert read_picture(tmp_path / "phone.jpg").size == (4, 8)


def columns(width: int, height: int) -> Image.Image:
    """Each column's level is its number."""
    return Image.fromarray(np.tile(np.arange(width, dtype=np.uint8), (height, 1))).convert("RGB")


def fake_view(picture: Picture, position: int) -> View:
    return View(torch.tensor([position]), torch.tensor([position]))


def levels(pixels: torch.Tensor) -> list[int]:
    return ((pixels[0, 0] + 1) * 127.5).round().int().tolist()


def test_pixels_are_in_minus_one_to_one() -> None:
    image = Image.new("RGB", (4, 4), (255, 0, 51))
    pixels = Framing(4, center_crop=True, random_flip=False)(image, generator()).tensor
    assert pixels.shape == (3, 4, 4)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([1.0, -1.0, -0.6]))


def test_center_crop_takes_the_middle_and_random_crops_move() -> None:
    image = columns(12, 4)
    assert levels(Framing(4, True, False)(image, generator()).tensor) == [4, 5, 6, 7]
    lefts = {levels(Framing(4, False, False)(image, generator(seed)).tensor)[0] for seed in range(60)}
    assert lefts == set(range(9))


@pytest.mark.parametrize("flip", [False, True])
def test_time_ids_tell_where_the_crop_lies_in_the_resized_picture(flip: bool) -> None:
    image = columns(12, 8)  # 6 x 4 when resized
    told = set()
    for seed in range(60):
        pixels, time_ids = Framing(4, False, flip)(image.resize((24, 16), Image.Resampling.NEAREST), generator(seed))
        resized = image.resize((6, 4), Image.Resampling.BOX)
        mirrored = levels(pixels)[0] > levels(pixels)[-1]
        assert flip or not mirrored
        row = np.asarray(resized)[0, :, 0]
        left = int(time_ids[3])
        expected = (row[::-1] if mirrored else row)[left : left + 4]  # mirrored first, then cropped
        np.testing.assert_allclose(levels(pixels), expected, atol=1)
        told.add(tuple(time_ids.int().tolist()))
    assert told == {(16, 24, 0, left, 4, 4) for left in range(3)}


def test_flips_mirror_half_of_the_pictures() -> None:
    image = columns(4, 4)
    seen = [levels(Framing(4, True, True)(image, generator(seed)).tensor) for seed in range(40)]
    assert 8 < seen.count([3, 2, 1, 0]) < 32
    assert seen.count([3, 2, 1, 0]) + seen.count([0, 1, 2, 3]) == 40


def test_the_shorter_side_is_resized_whatever_the_shape() -> None:
    for size in [(300, 40), (40, 300), (3, 2), (33, 32), (1, 1)]:
        assert Framing(16, False, False)(Image.new("RGB", size), generator()).tensor.shape == (3, 16, 16)


def test_each_pass_sees_each_example_once_in_a_new_order() -> None:
    batches = list(Batches(5, 2, seed=3, first=0, last=6))
    assert [len(batch) for batch in batches] == [2, 2, 1, 2, 2, 1]
    passes = [[index for batch in batches[start : start + 3] for _, index in batch] for start in (0, 3)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(5))
    assert passes[0] != passes[1]
    assert [position for batch in batches for position, _ in batch] == list(range(10))


def test_a_run_that_resumes_sees_what_it_would_have_seen() -> None:
    whole = list(Batches(5, 2, seed=3, first=0, last=9))
    assert list(Batches(5, 2, seed=3, first=4, last=9)) == whole[4:]
    assert list(Batches(5, 2, seed=4, first=0, last=9)) != whole


def test_random_framing_depends_on_position_and_picture_alone(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        columns(40, 4).save(tmp_path / name)
    pictures = find_pictures(tmp_path, "x")
    reader = PixelReader(Framing(4, False, False), seed=1)
    lefts = [[levels(reader(picture, position).tensor)[0] for position in range(12)] for picture in pictures]
    assert lefts == [[levels(reader(picture, position).tensor)[0] for position in range(12)] for picture in pictures]
    assert len(set(lefts[0])) > 3
    assert lefts[0] != lefts[1]


def test_class_pictures_come_after_the_instances_and_repeat() -> None:
    instances = [Picture(Path(f"i{k}"), f"instance {k}") for k in range(3)]
    classes = [Picture(Path("c"), "class")]
    examples = Examples([instances, classes], fake_view)
    assert len(examples) == 3
    batch = collate([examples[(7, 2)], examples[(8, 0)]])
    assert batch.prompts == ["instance 2", "instance 0", "class", "class"]
    assert batch.tensors.tolist() == [[7], [8], [7], [8]]
    assert batch.time_ids.tolist() == [[7], [8], [7], [8]]


def test_dropped_captions_depend_on_the_position_alone_and_spare_the_class() -> None:
    groups = [[Picture(Path("i"), "instance")], [Picture(Path("c"), "class")]]

    def prompts(rate: float, seed: int = 0) -> list[tuple[str, ...]]:
        examples = Examples(groups, fake_view, rate, seed)
        return [tuple(prompt for _, prompt in examples[(position, 0)]) for position in range(400)]

    assert set(prompts(0.0)) == {("instance", "class")}
    dropped = prompts(0.25)
    assert set(dropped) == {("instance", "class"), ("", "class")}
    assert 70 < dropped.count(("", "class")) < 130
    assert dropped == prompts(0.25)
    assert dropped != prompts(0.25, seed=1)
