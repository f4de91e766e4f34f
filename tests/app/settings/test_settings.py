"""Settings come from strangers: each that is wrong is named, and whole floats are whole."""

import math
from typing import Any

import pytest

from app.settings.checks import SettingsError
from app.settings.settings import MAX_PROMPT, MAX_SEED, Settings, size_of

PICTURE = "ab" * 32


def checked(**changed: Any) -> Settings:
    return Settings.checked(**{"prompt": "a cat", "mix": {}, "seed": 1, "steps": 20, "guidance": 3.0} | changed)


def test_good_settings_are_kept() -> None:
    settings = checked(prompt="  a cat\n", mix={"b": 2, "a": -1.0}, seed=MAX_SEED, steps=100, guidance=30)
    assert settings == Settings("a cat", {"a": -1.0, "b": 2.0}, MAX_SEED, 100, 30.0)
    assert list(settings.mix) == ["a", "b"]  # so that the same mix reads the same
    assert isinstance(settings.guidance, float) and isinstance(settings.mix["b"], float)


def test_whole_floats_are_whole_numbers() -> None:
    settings = checked(seed=7.0, steps=20.0)
    assert (settings.seed, settings.steps) == (7, 20)
    assert type(settings.seed) is int and type(settings.steps) is int


def test_half_a_character_is_no_prompt() -> None:
    with pytest.raises(SettingsError, match="half a character"):
        checked(prompt="an owl \ud83d")


@pytest.mark.parametrize("none", [None, -1, -1.0])
def test_without_a_seed_one_is_drawn(none: Any) -> None:
    seeds = {checked(seed=none).seed for _ in range(8)}
    assert len(seeds) > 1
    assert all(0 <= seed <= MAX_SEED for seed in seeds)


def test_what_is_left_out_has_no_effect() -> None:
    settings = checked(negative=None, width=None, height=None, start_image=None)
    assert (settings.negative, settings.width, settings.height, settings.start_image) == ("", 0, 0, "")
    assert Settings.checked(**checked(negative=" dark ", width=128.0).as_dict()) == checked(negative="dark", width=128)


def test_steps_from_a_picture_are_those_that_are_left() -> None:
    assert checked(change=0.5).steps_drawn == 20
    assert checked(change=0.5, start_image=PICTURE).steps_drawn == 10
    with pytest.raises(SettingsError, match=r"a change of 0\.01 needs more steps, got 20"):
        checked(change=0.01, start_image=PICTURE)


def test_sizes_as_people_write_them() -> None:
    assert [size_of(text) for text in ("128 × 192", "128x192", " 64X32 ", "", None)] == [  # noqa: RUF001
        (128, 192), (128, 192), (64, 32), (0, 0), (0, 0),
    ]  # fmt: skip
    for wrong in ("big", "128", "128 x -1", 128):
        with pytest.raises(SettingsError, match="the size must be like 128 x 192, got"):
            size_of(wrong)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": ""}, "prompt must say what to draw, got ''"),
        ({"prompt": " \n"}, "prompt must say what to draw"),
        ({"prompt": None}, "prompt must say what to draw, got None"),
        ({"prompt": 5}, "prompt must say what to draw, got 5"),
        ({"prompt": "x" * (MAX_PROMPT + 1)}, f"too long: {MAX_PROMPT} characters at most, got {MAX_PROMPT + 1}"),
        ({"mix": [1]}, r"mix must map each style to its strength.*got \[1\]"),
        ({"mix": "bluefire"}, "mix must map each style"),
        ({"mix": {1: 1.0}}, "mix must name each style by text, got 1"),
        ({"mix": {"a": math.nan}}, "strength of 'a' must be a number from -1 to 2, got nan"),
        ({"mix": {"a": math.inf}}, "got inf"),
        ({"mix": {"a": 2.01}}, "from -1 to 2, got 2.01"),
        ({"mix": {"a": -1.01}}, "from -1 to 2"),
        ({"mix": {"a": "1"}}, "strength of 'a' must be a number"),
        ({"mix": {"a": True}}, "strength of 'a' must be a number"),
        ({"mix": {"a": None}}, "strength of 'a' must be a number"),
        ({"mix": {"a": 10**400}}, "strength of 'a' must be a number from -1 to 2, got 1000"),
        ({"seed": -2}, f"seed must be a whole number from 0 to {MAX_SEED}, or -1 to draw one, got -2"),
        ({"seed": MAX_SEED + 1}, "seed must be a whole number"),
        ({"seed": 10**400}, "seed must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number.*got 1.5"),
        ({"seed": math.nan}, "seed must be a whole number"),
        ({"seed": math.inf}, "seed must be a whole number"),
        ({"seed": "7"}, "seed must be a whole number.*got '7'"),
        ({"seed": True}, "seed must be a whole number"),
        ({"steps": 0}, "steps must be a whole number from 1 to 100, got 0"),
        ({"steps": 101}, "steps must be a whole number"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"steps": None}, "steps must be a whole number"),
        ({"guidance": -0.1}, "guidance must be a number from 0 to 30, got -0.1"),
        ({"guidance": 30.1}, "guidance must be a number"),
        ({"guidance": math.nan}, "guidance must be a number"),
        ({"guidance": None}, "guidance must be a number"),
        ({"negative": 5}, "negative prompt must be text, got 5"),
        ({"negative": "x" * (MAX_PROMPT + 1)}, "negative prompt is too long: 2000 characters"),
        ({"width": 5000}, "width must be a whole number from 0 to 4096, got 5000"),
        ({"height": "8"}, "height must be a whole number"),
        ({"start_image": "../../etc/passwd"}, "picture to start from must be named by its SHA-256"),
        ({"start_image": PICTURE.upper()}, "named by its SHA-256"),
        ({"change": 0}, r"the change must be a number from 0\.01 to 1, got 0"),
        ({"change": None}, "the change must be a number"),
    ],
)
def test_a_wrong_setting_is_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        checked(**changed)
    assert len(str(caught.value)) < 200
