"""Training pictures from data sets of the ``datasets`` library: folders of pictures, and tables."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shira_diffusers import ShiraError
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.pictures import Picture, instance_pictures
from tests.dreambooth import colour_science as science

datasets = pytest.importorskip("datasets")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What ``datasets`` calls an imagefolder, with captions for two of three pictures."""
    place = tmp_path / "set"
    place.mkdir()
    captions = ["a red  square\n", None, "ein Kätzchen"]
    for number in range(3):
        Image.new("RGB", (8 + number, 8), (255 * (number == 0), 0, 10 * number)).save(place / f"{number}.png")
    rows = [{"file_name": f"{number}.png", "text": caption} for number, caption in enumerate(captions)]
    lines = "\n".join(json.dumps(row) for row in rows)
    (place / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return place


def load(name: Path | str, cache: Path, **others: object) -> list[Picture]:
    settings = {"pretrained_model_name_or_path": "base", "instance_prompt": "a sks cat", "cache_dir": str(cache)}
    return instance_pictures(TrainingConfig(**settings, dataset_name=str(name), **others))


def table(place: Path, rows: dict[str, list[object]], features: object) -> Path:
    """A folder that holds one Parquet file."""
    place.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(place / "train.parquet"))
    return place


def test_a_folder_of_pictures_with_captions(folder: Path, cache: Path) -> None:
    found = load(folder, cache, caption_column="text")
    assert [picture.prompt for picture in found] == ["a red square", "a sks cat", "ein Kätzchen"]
    assert [picture.size for picture in found] == [(8, 8), (9, 8), (10, 8)]
    for number, picture in enumerate(found):
        np.testing.assert_array_equal(np.asarray(picture.read()), np.asarray(Image.open(folder / f"{number}.png")))
    assert {picture.prompt for picture in load(folder, cache)} == {"a sks cat"}
    assert cache.is_dir()


def test_pictures_and_captions_are_counted(folder: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load(folder, cache, caption_column="text")
    assert f"3 pictures, 2 with captions, in data set '{folder}'" in caplog.text


def test_colour_profiles_in_a_table_are_applied(tmp_path: Path, cache: Path) -> None:
    profile = science.rgb_profile(science.DISPLAY_P3, science.SRGB_CURVE)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile)
    content = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    place = table(tmp_path / "table", {"image": [content]}, datasets.Features({"image": datasets.Image()}))
    (found,) = load(place, cache)
    expected = science.rgb_to_srgb(pixels, science.DISPLAY_P3, science.SRGB_CURVE)
    np.testing.assert_allclose(found.read(), expected, atol=0.75)


def test_a_table_of_pictures(tmp_path: Path, cache: Path) -> None:
    """Any mode and orientation, read from the bytes in the table; columns by other names."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4), (255, 0, 0)).save(tmp_path / "turned.jpg", exif=exif, quality=100)
    pictures = [{"bytes": (tmp_path / "turned.jpg").read_bytes(), "path": None}, Image.new("RGBA", (3, 3))]
    features = datasets.Features({"photo": datasets.Image(), "words": datasets.Value("string")})
    place = table(tmp_path / "table", {"photo": pictures, "words": ["one", ""]}, features)
    found = load(place, cache, image_column="photo", caption_column="words")
    assert [(picture.size, picture.prompt) for picture in found] == [((4, 8), "one"), ((3, 3), "a sks cat")]
    assert np.asarray(found[1].read()).min() == 255  # transparent
    assert len({picture.path for picture in found}) == 2


def test_repeats_count_each_picture_several_times(folder: Path, cache: Path) -> None:
    found = load(folder, cache, repeats=3)
    assert len(found) == 9
    assert found[0] == found[1] == found[2] != found[3]
    local = TrainingConfig(
        pretrained_model_name_or_path="base", instance_data_dir=str(folder), instance_prompt="x", repeats=2
    )
    assert [picture.path.name for picture in instance_pictures(local)] == [
        "0.png",
        "0.png",
        "1.png",
        "1.png",
        "2.png",
        "2.png",
    ]


def test_bad_rows_are_named_or_skipped(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures = [{"bytes": b"hello", "path": "a.png"}, None, Image.new("RGB", (3, 3))]
    place = table(tmp_path / "table", {"image": pictures}, datasets.Features({"image": datasets.Image()}))
    message = (
        r"2 of 3 pictures in data set(.|\n)*image of row 0: not a picture(.|\n)*image of row 1: no picture in this"
    )
    with pytest.raises(ShiraError, match=message):
        load(place, cache)
    assert [picture.size for picture in load(place, cache, on_bad_image="skip")] == [(3, 3)]
    assert "image of row 0" in caplog.text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image_column": "photo"}, r"has the columns image, text: image_column 'photo' does not exist; pictures with"),
        ({"image_column": "text"}, r"image_column 'text' holds Value(.|\n)*expected pictures"),
        (
            {"image_column": "photo", "caption_column": "words"},
            "image_column 'photo' does not exist; caption_column 'words' does not exist",
        ),
        ({"caption_column": "image"}, "caption_column 'image' holds Image(.|\n)*expected captions"),
    ],
)
def test_wrong_columns_are_all_named(folder: Path, cache: Path, columns: dict[str, str], message: str) -> None:
    with pytest.raises(ShiraError, match=message):
        load(folder, cache, **columns)


def test_what_cannot_be_loaded_says_so(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "missing", tmp_path / "empty"):
        with pytest.raises(ShiraError, match=rf"cannot load the data set '{name}', expected a Hub id"):
            load(name, cache)
    place = tmp_path / "tests"
    (place / "test").mkdir(parents=True)
    Image.new("RGB", (3, 3)).save(place / "test" / "a.png")
    with pytest.raises(ShiraError, match="has no split 'train', but test"):
        load(place, cache)


def test_without_the_library_the_remedy_is_told(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ShiraError, match="pip install datasets"):
        load(folder, cache)


def test_pictures_come_from_one_source(tmp_path: Path) -> None:
    base = {"pretrained_model_name_or_path": "base", "instance_prompt": "x"}
    with pytest.raises(ShiraError, match="give instance_data_dir or dataset_name"):
        TrainingConfig(**base)
    with pytest.raises(ShiraError, match="are both given"):
        TrainingConfig(**base, instance_data_dir="a", dataset_name="b")
    with pytest.raises(ShiraError, match=r"dataset_config_name has no effect(.|\n)*caption_column has no effect"):
        TrainingConfig(**base, instance_data_dir="a", dataset_config_name="x", caption_column="text")
