"""Strengths by component: what is taken, what is refused, and what they draw."""

from typing import Any

import pytest

from app.drawing.session import Session
from app.settings.checks import SettingsError
from app.settings.strengths import checked_mix, strength_text
from tests.app.conftest import SUGGESTION


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        ({}, "must be a number, or a number for each component"),
        ({"unet": "1"}, "in 'unet' must be a number from -1 to 2, got '1'"),
        ({"unet": 2.5}, "from -1 to 2, got 2.5"),
        ({"unet": {"side": 1.0}}, "one for each of down, mid, up, got 'side'"),
        ({"unet": {}}, "one for each of down, mid, up"),
        ({"unet": {"up": float("nan")}}, "up must be a number from -1 to 2, got nan"),
        ({"unet": {"up": {"up": 1.0}}}, "up must be a number"),
        ({3: 1.0}, "must name each component by text, got 3"),
    ],
)
def test_what_is_no_strength_is_refused(strength: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        checked_mix({"bluefire": strength})


@pytest.mark.parametrize("component", ["tail", "vae"])
def test_a_component_that_an_adapter_does_not_change_is_refused_before_anything_is_drawn(
    session: Session, component: str
) -> None:
    said = f"'bluefire' names no component that it changes: '{component}'; it changes 'text_encoder', 'unet'"
    with pytest.raises(SettingsError, match=said):
        session.checked(SUGGESTION, {"bluefire": {component: 1.0}})


def test_components_have_strengths_of_their_own(session: Session) -> None:
    def drawn(strength: Any) -> bytes:
        return session.generate(SUGGESTION, {"bluefire": strength}, 3, 2).image.tobytes()

    whole, base = drawn(1.0), session.generate(SUGGESTION, {}, 3, 2).image.tobytes()
    assert drawn({"unet": 1.0}) == drawn({"unet": {"down": 1.0, "mid": 1, "up": 1.0}}) == whole
    assert drawn({"unet": 0.0, "text_encoder": 0.0}) == base
    parts = [drawn({"text_encoder": 0.0}), drawn({"unet": 0.0}), drawn({"unet": {"up": 0.0}})]
    assert len({whole, base, *parts}) == 5


def test_strengths_in_a_few_letters() -> None:
    assert [strength_text(each) for each in (1.0, 0.5, {"unet": 0.5, "text_encoder": {"down": 1.0, "up": 0.0}})] == [
        "",
        "0.5",
        "unet 0.5, text_encoder 1/0",
    ]


def test_an_unknown_merge_method_is_refused(session: Session) -> None:
    with pytest.raises(SettingsError, match="merge method must be one of sum"):
        session.checked(SUGGESTION, {}, method="magic")
