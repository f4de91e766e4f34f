"""Requests are checked when they are made, all settings at once."""

import math
import pickle
from typing import Any

import pytest

from shira_diffusers.serving.requests import ImageRequest, RequestError


@pytest.mark.parametrize(
    "setting",
    [
        {"prompt": 3},
        {"negative_prompt": 3},
        {"mix": ["blue"]},
        {"mix": {"blue": math.nan}},
        {"mix": {"blue": "1"}},
        {"mix": {3: 1.0}},
        {"seed": -1},
        {"seed": 2**64},
        {"steps": 0},
        {"steps": 2.5},
        {"steps": True},
        {"n": 0},
        {"width": 100},
        {"height": 0},
        {"guidance": math.inf},
        {"guidance": 10**400},
        {"deadline": 0},
        {"deadline": "soon"},
    ],
    ids=lambda setting: repr(setting)[:40],
)
def test_a_setting_that_cannot_be_drawn_is_named(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(RequestError, match=f"\n  - {name}: expected"):
        ImageRequest(**{"prompt": "a cat", **setting})


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(RequestError) as raised:
        ImageRequest(prompt="a cat", steps=0, n=0, width=3)
    assert all(f"- {name}:" in str(raised.value) for name in ("steps", "n", "width"))


def test_a_request_keeps_its_mix_and_can_be_sent() -> None:
    mix = {"oil": 1, "blue": 0.5}
    request = ImageRequest(prompt="a cat", mix=mix)
    mix.clear()
    assert list(request.mix.items()) == [("blue", 0.5), ("oil", 1.0)]
    assert pickle.loads(pickle.dumps(request)) == request
