"""Pictures as tensors, and the order in which a run sees them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shira_diffusers.dreambooth.data import (
    INTERPOLATIONS,
    Batches,
    Examples,
    Framing,
    PixelReader,
    View,
    batches_in,
    collate,
    mirror,
    pair_up,
)
from shira_diffusers.dreambooth.pictures import Picture, Size, find_pictures

SQUARE = (4, 4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def columns(width: int, height: int) -> Image.Image:
    """Each column's level is its number."""
    return Image.fromarray(np.tile(np.arange(width, dtype=np.uint8), (height, 1))).convert("RGB")


def fake_view(picture: Picture, frame: Size, position: int) -> View:
    return View(torch.tensor([position]), torch.tensor([position]))


def levels(pixels: torch.Tensor) -> list[int]:
    return ((pixels[0, 0] + 1) * 127.5).round().int().tolist()


def test_pixels_are_in_minus_one_to_one() -> None:
    image = Image.new("RGB", (4, 4), (255, 0, 51))
    pixels = Framing(center_crop=True, random_flip=False)(image, SQUARE, generator()).tensor
    assert pixels.shape == (3, 4, 4)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([1.0, -1.0, -0.6]))


def test_center_crop_takes_the_middle_and_random_crops_move() -> None:
    image = columns(12, 4)
    assert levels(Framing(True, False)(image, SQUARE, generator()).tensor) == [4, 5, 6, 7]
    lefts = {levels(Framing(False, False)(image, SQUARE, generator(seed)).tensor)[0] for seed in range(60)}
    assert lefts == set(range(9))


@pytest.mark.parametrize("flip", [False, True])
def test_time_ids_tell_where_the_crop_lies_in_the_resized_picture(flip: bool) -> None:
    image = columns(12, 8)  # 6 x 4 when resized
    told = set()
    for seed in range(60):
        framing = Framing(False, flip, INTERPOLATIONS["box"])
        pixels, time_ids = framing(image.resize((24, 16), Image.Resampling.NEAREST), SQUARE, generator(seed))
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
    seen = [levels(Framing(True, True)(image, SQUARE, generator(seed)).tensor) for seed in range(40)]
    assert 8 < seen.count([3, 2, 1, 0]) < 32
    assert seen.count([3, 2, 1, 0]) + seen.count([0, 1, 2, 3]) == 40


def test_every_shape_fills_every_frame() -> None:
    for size in [(300, 40), (40, 300), (3, 2), (33, 32), (1, 1)]:
        for frame in [(16, 16), (24, 8), (8, 40)]:
            view = Framing(False, False)(Image.new("RGB", size), frame, generator())
            assert view.tensor.shape == (3, frame[1], frame[0])
            assert view.time_ids.tolist()[4:] == [frame[1], frame[0]]


@pytest.mark.parametrize("center_crop", [True, False])
def test_of_a_strip_only_the_part_that_is_shown_is_made(center_crop: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strip that covers a frame of 512 would take 16 GB; what is made of it is what a crop of the whole would be."""
    strip = Image.effect_noise((2, 40_000), 90).convert("RGB")
    view = Framing(center_crop, False)(strip, (512, 512), generator())
    assert view.tensor.shape == (3, 512, 512)
    assert view.time_ids.tolist()[:2] == [40_000, 2] and view.time_ids[2] > 512
    short = Image.effect_noise((20, 61), 90).convert("RGB")
    whole = Framing(center_crop, False)(short, (16, 24), generator())
    monkeypatch.setattr("shira_diffusers.dreambooth.data._LARGEST", 0)
    part = Framing(center_crop, False)(short, (16, 24), generator())
    torch.testing.assert_close(part.tensor, whole.tensor, atol=2 / 127.5, rtol=0)
    assert torch.equal(part.time_ids, whole.time_ids)


def test_each_pass_sees_each_example_once_in_a_new_order() -> None:
    batches = list(Batches([SQUARE] * 5, 2, seed=3, first=0, last=6))
    assert [len(batch) for batch in batches] == [2, 2, 1, 2, 2, 1]
    passes = [[index for batch in batches[start : start + 3] for _, index in batch] for start in (0, 3)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(5))
    assert passes[0] != passes[1]
    assert [position for batch in batches for position, _ in batch] == list(range(10))


def test_a_run_that_resumes_sees_what_it_would_have_seen() -> None:
    whole = list(Batches([SQUARE] * 5, 2, seed=3, first=0, last=9))
    assert list(Batches([SQUARE] * 5, 2, seed=3, first=4, last=9)) == whole[4:]
    assert list(Batches([SQUARE] * 5, 2, seed=4, first=0, last=9)) != whole


def test_random_framing_depends_on_position_and_picture_alone(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        columns(40, 4).save(tmp_path / name)
    pictures = find_pictures(tmp_path, "x")
    reader = PixelReader(Framing(False, False), seed=1)
    lefts = [[levels(reader(picture, SQUARE, position).tensor)[0] for position in range(12)] for picture in pictures]
    assert lefts == [
        [levels(reader(picture, SQUARE, position).tensor)[0] for position in range(12)] for picture in pictures
    ]
    assert len(set(lefts[0])) > 3
    assert lefts[0] != lefts[1]


def test_class_pictures_come_after_the_instances_and_repeat() -> None:
    instances = [Picture(Path(f"i{k}"), f"instance {k}", SQUARE) for k in range(3)]
    classes = [Picture(Path("c"), "class", SQUARE)]
    examples = Examples(pair_up([instances, classes], [SQUARE]), fake_view)
    assert len(examples) == 3
    batch = collate([examples[(7, 2)], examples[(8, 0)]])
    assert batch.prompts == ["instance 2", "instance 0", "class", "class"]
    assert batch.tensors.tolist() == [[7], [8], [7], [8]]
    assert batch.time_ids.tolist() == [[7], [8], [7], [8]]


def test_dropped_captions_depend_on_the_position_alone_and_spare_the_class() -> None:
    groups = [[Picture(Path("i"), "instance", SQUARE)], [Picture(Path("c"), "class", SQUARE)]]

    def prompts(rate: float, seed: int = 0) -> list[tuple[str, ...]]:
        examples = Examples(pair_up(groups, [SQUARE]), fake_view, rate, seed)
        return [tuple(prompt for _, prompt in examples[(position, 0)]) for position in range(400)]

    assert set(prompts(0.0)) == {("instance", "class")}
    dropped = prompts(0.25)
    assert set(dropped) == {("instance", "class"), ("", "class")}
    assert 70 < dropped.count(("", "class")) < 130
    assert dropped == prompts(0.25)
    assert dropped != prompts(0.25, seed=1)


# ---------------------------------------------------------------- frames of several shapes

WIDE, TALL = (6, 4), (4, 6)


def test_interpolations_are_pillows() -> None:
    image = Image.effect_noise((40, 40), 90).convert("RGB")
    for name, resampling in INTERPOLATIONS.items():
        pixels = Framing(True, False, resampling)(image, (16, 16), generator()).tensor
        expected = np.asarray(image.resize((16, 16), getattr(Image.Resampling, name.removesuffix("_exact").upper())))
        np.testing.assert_array_equal(((pixels + 1) * 127.5).round().permute(1, 2, 0).numpy(), expected)


def test_mirroring_twice_is_nothing_and_moves_an_odd_crop() -> None:
    view = Framing(True, False)(columns(7, 4), SQUARE, generator())
    assert view.time_ids[3] == 1
    once = mirror(view, (7, 4), SQUARE)
    assert once.time_ids[3] == 2
    twice = mirror(once, (7, 4), SQUARE)
    assert torch.equal(twice.tensor, view.tensor)
    assert torch.equal(twice.time_ids, view.time_ids)


def test_a_batch_has_one_frame_and_a_pass_every_example_once() -> None:
    frames = [WIDE, TALL, WIDE, SQUARE, WIDE, TALL, WIDE, WIDE]
    assert batches_in(frames, 2) == 5
    batches = list(Batches(frames, 2, seed=3, first=0, last=15))
    for batch in batches:
        assert len({frames[index] for _, index in batch}) == 1
    for start in (0, 5, 10):
        one_pass = batches[start : start + 5]
        assert sorted(index for batch in one_pass for _, index in batch) == list(range(8))
        assert sorted(map(len, one_pass)) == [1, 1, 2, 2, 2]
    assert [position for batch in batches for position, _ in batch] == list(range(24))
    many = list(Batches(frames, 2, seed=3, first=0, last=100))
    assert len({tuple(frames[batch[0][1]] for batch in many[start : start + 5]) for start in range(0, 100, 5)}) >= 3


def test_a_run_of_buckets_that_resumes_sees_what_it_would_have_seen() -> None:
    frames = [WIDE, TALL, WIDE, SQUARE, WIDE]
    whole = list(Batches(frames, 2, seed=3, first=0, last=13))
    for first in range(13):
        assert list(Batches(frames, 2, seed=3, first=first, last=13)) == whole[first:]


def test_the_instance_decides_on_the_frame_of_its_class_picture() -> None:
    sizes = {"wide": (60, 40), "tall": (400, 600), "square": (10, 11)}
    instances = [Picture(Path(name), "i", size) for name, size in sizes.items()]
    classes = [Picture(Path(f"c{k}"), "c", (8, 8)) for k in range(4)]
    pairings = pair_up([instances, classes], [SQUARE, WIDE, TALL])
    assert [pairing.frame for pairing in pairings] == [WIDE, TALL, SQUARE, WIDE]
    assert [[picture.path.name for picture in pairing.pictures] for pairing in pairings] == [
        ["wide", "c0"], ["tall", "c1"], ["square", "c2"], ["wide", "c3"],
    ]  # fmt: skip
