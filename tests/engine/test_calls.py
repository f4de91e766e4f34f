"""A warm switch does constant work in Python per component: nothing per weight."""

import sys
from collections.abc import Callable
from types import FrameType

import pytest
import torch

from shira_diffusers import Resident, ShiraAdapter, SparseDelta, build_masks
from shira_diffusers.weights import sweep_cpu
from tests import tiny

WEIGHTS = 160  # those of Stable Diffusion 1.5, in small
BAR = 500


def python_calls(act: Callable[[], object]) -> int:
    """How many Python functions are called, generators resumed included."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        act()
    finally:
        sys.setprofile(None)
    return calls


@pytest.fixture(scope="module")
def resident() -> Resident:
    model = tiny.unet(
        layers_per_block=2,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    resident = Resident(model)
    for seed, name in enumerate("abc"):
        masks = build_masks(model, "rand", 0.05, "attention+ff", seed=seed)
        assert len(masks) == WEIGHTS
        shapes = {n: tuple(model.get_parameter(n).shape) for n in masks}
        resident.add(
            ShiraAdapter({n: SparseDelta(m, torch.randn(m.numel()), shapes[n]) for n, m in masks.items()}), name
        )
    return resident


@pytest.mark.parametrize("small", [0, sweep_cpu._SMALL], ids=["tiles", "range"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"a": 1.0}, {"b": 1.0}),
        ({"a": 1.0}, {"a": 0.5}),
        ({}, {"a": 1.0}),
        ({"a": 1.0, "b": 0.5}, {"a": 0.2, "b": 0.3}),
        ({"a": 1.0, "b": 0.5}, {"c": 1.0}),
    ],
)
def test_a_warm_switch_of_160_weights(
    before: dict[str, float], after: dict[str, float], small: int, resident: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_cpu, "_SMALL", small)
    for mix in (before, after, before):
        resident.set(mix)
    # a tile that is not in a range has one call of its own, and one tile per weight here
    assert python_calls(lambda: resident.set(after)) <= (BAR if small else BAR + WEIGHTS)
