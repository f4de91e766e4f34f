"""Sheets: which pictures axes and series of prompts make, and what is refused."""

from typing import Any

import pytest

from app.settings.axes import KINDS, Axis, sheet_of
from app.settings.checks import SettingsError
from app.settings.series import prompt_series
from app.settings.settings import MAX_SEED, Settings

SETTINGS = Settings.checked("a red cat", {"bluefire": 1.0, "gold": 0.8}, 7, 20, 3)


def drawn(axis: Axis, what: str) -> list[Any]:
    return [settings.as_dict()[what] for _, settings in sheet_of(SETTINGS, [axis]).cells]


@pytest.mark.parametrize(
    ("kind", "values", "what", "expected"),
    [
        ("seed", "7, 8", "seed", [7, 8]),
        ("seed", "1 to 3 (3)", "seed", [1, 2, 3]),
        ("steps", [2, 4.0], "steps", [2, 4]),
        ("guidance", "0 to 3 (3), 7.5", "guidance", [0, 1.5, 3, 7.5]),
        ("method", "sum", "method", ["sum"]),
        ("size", "128x192, 64 x 64", "width", [128, 64]),
        ("change", "0.5\n0.75", "change", [0.5, 0.75]),
        ("negative_mix", "1, 0.5", "negative_mix", [1, 0.5]),
        ("negative", '"dark, blurred", bright', "negative", ["dark, blurred", "bright"]),
        ("negative", "dark, blurred\nbright", "negative", ["dark, blurred", "bright"]),
        ("words", "red cat, big dog", "prompt", ["a red cat", "a big dog"]),
        ("prompt", "an owl, a fox", "prompt", ["an owl", "a fox"]),
        ("prompt", "an owl\ra fox", "prompt", ["an owl", "a fox"]),
        ("style", "gold, paintings", "mix", [{"gold": 0.8}, {"paintings": 1.0}]),
    ],
)
def test_an_axis_changes_one_thing(kind: str, values: Any, what: str, expected: list[Any]) -> None:
    assert drawn(Axis.checked(kind, values), what) == expected


def test_a_style_at_several_strengths_leaves_the_others() -> None:
    assert drawn(Axis.checked("strength", "-0.5 to 0.5 (3)", "bluefire"), "mix") == [
        {"bluefire": strength, "gold": 0.8} for strength in (-0.5, 0.0, 0.5)
    ]


def test_a_sheet_has_labels_and_what_is_shared() -> None:
    axes = [
        Axis.checked("strength", [0, 1], "bluefire"),
        Axis.checked("words", "red, blue, big"),
        Axis.checked("seed", [7, -1]),
    ]
    sheet = sheet_of(SETTINGS, axes)
    assert (sheet.columns, sheet.rows, sheet.axes) == (
        ("0", "1"),
        ("red", "blue", "big"),
        ("bluefire", "words", "seed"),
    )
    assert sheet.tables[0] == "7" and len(sheet.cells) == 12
    label, settings = sheet.cells[5]
    assert label == "bluefire 1, words big, seed 7"
    assert (settings.prompt, settings.mix, settings.seed) == ("a big cat", {"bluefire": 1.0, "gold": 0.8}, 7)
    drawn_seeds = {settings.seed for _, settings in sheet.cells[6:]}
    assert drawn_seeds == {int(sheet.tables[1])}  # one for the whole table
    assert sheet.shared == "gold 0.8 · steps 20 · guidance 3"
    assert sheet_of(SETTINGS, axes[:1]).shared == "a red cat · gold 0.8 · seed 7 · steps 20 · guidance 3"


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ([("colour", [1], None)], f"a sheet changes one of {', '.join(KINDS)}, got 'colour'"),
        ([("seed", [], None)], r"the axis 'seed' needs values, like 0 to 1 \(5\), got \[\]"),
        ([("style", " ", None)], "the axis 'style' needs values, like fox, owl"),
        ([("seed", "many", None)], "the axis 'seed' needs numbers, like 0, 0.5, 1 .* got 'many'"),
        ([("seed", "1 to 9 (1)", None)], "the number of values must be a whole number from 2 to 100"),
        ([("seed", "-7", None)], "the seed must be a whole number"),
        ([("strength", "0, 3", "gold")], "the strength of 'gold' must be a number from -1 to 2, got 3"),
        ([("style", [["a"]], None)], r"a value of the axis 'style' must be text, got \['a'\]"),
        ([("prompt", "a" * 200_000, None)], "the values of the axis 'prompt' are too long: 100000 characters at most"),
        ([("seed", f"{'9' * 400} to 1 (2)", None)], "the axis 'seed' needs numbers, like 0, 0.5, 1 .* got '999"),
        ([("seed", "9" * 400, None)], "the axis 'seed' needs numbers, like 0, 0.5, 1 .* got '999"),
        ([("seed", f"0 to 1 ({'9' * 5000})", None)], "the axis 'seed' needs numbers, like 0, 0.5, 1 .* got '0 to 1"),
        ([("seed", "0 to 1 (101)", None)], "the number of values must be a whole number from 2 to 100, got 101"),
        ([("strength", "0, 1", None)], "needs the name of a style, got None"),
        ([("size", "big", None)], "the size must be like 128 x 192, got 'big'"),
        ([("words", "dog, owl", None)], "the first words must be in the prompt, got 'dog'"),
        ([("method", "magic", None)], "merge method must be one of"),
        ([("seed", "1, 2", None), ("seed", "3, 4", None)], "each axis must change something else, got 'seed' twice"),
        ([("strength", [0, 1], "gold")] * 2, "two different styles, got 'gold' twice"),
        ([("seed", "1 to 101 (101)", None)], "from 2 to 100"),
        ([("seed", "1 to 11 (11)", None), ("steps", "1 to 10 (10)", None)], "100 pictures at most, got 110"),
    ],
)
def test_what_is_no_sheet_is_a_sentence(axes: list[tuple[Any, Any, Any]], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        sheet_of(SETTINGS, [Axis.checked(*each) for each in axes])


def test_a_series_counts_seeds_as_asked() -> None:
    text = "an owl\n\n  a fox \n"

    def seeds(count: int, how: str, first: int = 7) -> list[int]:
        settings = Settings.checked("a", {}, first)
        return [each.seed for _, each in prompt_series(settings, text, count, how).cells]

    assert seeds(2, "next") == [7, 8, 9, 10] and seeds(2, "fixed") == [7, 8, 7, 8]
    assert seeds(1, "fixed") == [7, 7] and seeds(1, "next", MAX_SEED) == [MAX_SEED, 0]
    random = seeds(2, "random")
    assert random[0] != 7 and seeds(2, "next", random[0]) == random  # what was drawn is drawn again
    sheet = prompt_series(SETTINGS, text, 2, "next")
    assert sheet.rows == ("an owl", "a fox") and sheet.captions == ("seed 7", "seed 8", "seed 9", "seed 10")
    assert sheet.cells[2][0] == "a fox · seed 9" and sheet.cells[2][1].prompt == "a fox"
    assert sheet.shared == "bluefire · gold 0.8 · steps 20 · guidance 3"


@pytest.mark.parametrize(
    ("prompts", "count", "seeds", "message"),
    [
        (" \n", 1, "next", "no prompt: write one per line"),
        ([1], 1, "next", r"prompts must be a list of texts, or text with one per line, got \[1\]"),
        ("a", 0, "next", "the number of pictures must be a whole number from 1 to 100, got 0"),
        ("a\nb", 51, "next", "100 pictures at most, got 2 prompts x 51"),
        ("a", 1, "up", "seeds must be one of fixed, next, random, got 'up'"),
        ("a\n" + "x" * 2001, 1, "next", "the prompt is too long"),
    ],
)
def test_what_is_no_series_is_a_sentence(prompts: Any, count: Any, seeds: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        prompt_series(SETTINGS, prompts, count, seeds)
