"""A pipeline where a module is expected: taken where its meaning is clear, else one sentence with the remedy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shira_diffusers
from shira_diffusers import (
    AdapterLibrary,
    Resident,
    ShiraAdapter,
    ShiraError,
    build_masks,
    mask_gradients,
    remove_shira_attn_processors,
    set_shira_attn_processors,
)
from shira_diffusers.training.tuner import SparseTuner
from tests import tiny


def test_the_difference_of_pipelines_is_that_of_their_models() -> None:
    before, after = tiny.pipeline(), tiny.pipeline()
    with torch.no_grad():
        after.unet.conv_in.weight[0, 0, 0, 0] += 1
    found = ShiraAdapter.from_difference(before, after)
    assert list(found.deltas) == ["unet.conv_in.weight"]
    assert found.nnz == 1


def test_a_resident_of_a_pipeline_has_its_models() -> None:
    pipe = tiny.pipeline()
    resident = Resident(pipe)
    assert resident.models.keys() == {"unet", "text_encoder", "vae"}
    resident.add(tiny.adapter_for(pipe), "a")
    assert set(pipe.list_shira()["a"]) == {"unet", "text_encoder"}


def test_gradients_of_a_pipeline_are_masked() -> None:
    pipe = tiny.pipeline()
    masks = build_masks({"unet": pipe.unet}, "rand", 0.1)
    with mask_gradients(pipe, masks):
        trained = {f"unet.{name}" for name, p in pipe.unet.named_parameters() if p.requires_grad}
        assert trained == masks.keys()
        assert not any(p.requires_grad for p in pipe.vae.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe, _: build_masks(pipe, "rand"), r"got StableDiffusionPipeline, which has .*\{\"unet\": pipe\.unet"),
        (lambda pipe, a: set_shira_attn_processors(pipe, a), r"expected a module, got Stable.*\(pipe\.unet, "),
        (lambda pipe, a: set_shira_attn_processors({"unet": pipe.unet}, a), r"expected a module, got dict"),
        (lambda pipe, _: remove_shira_attn_processors(pipe), r"expected a module, got Stable"),
        (lambda pipe, _: mask_gradients("unet", {"x": torch.zeros(1)}), "or a pipeline, got str"),
        (lambda pipe, _: ShiraAdapter.from_difference("a", "b"), "or a pipeline, got str"),
        (lambda pipe, _: Resident("unet"), "got str"),
        (lambda pipe, _: build_masks(None, "rand"), "got NoneType"),
        (lambda pipe, _: AdapterLibrary(Path(".")).use(pipe.scheduler, {}), "expected a pipeline.*got DDIMScheduler"),
        (lambda pipe, _: AdapterLibrary(Path(".")).use("pipe", {}), "expected a pipeline.*got str"),
    ],
)
def test_others_are_told_what_to_do(call: Callable[[Any, ShiraAdapter], object], message: str) -> None:
    pipe = tiny.pipeline()
    with pytest.raises(ShiraError, match=message):
        call(pipe, tiny.adapter_for(pipe))


@pytest.mark.parametrize(
    "call",
    [
        Resident,
        lambda parts: build_masks(parts, "rand", 0.1, "all"),
        lambda parts: SparseTuner(parts, {"unet.mid_block.0.weight": torch.arange(2)}),
        lambda parts: mask_gradients(parts, {"unet.mid_block.0.weight": torch.arange(2)}),
    ],
    ids=["Resident", "build_masks", "SparseTuner", "mask_gradients"],
)
def test_components_with_dots_are_refused(call: Callable[[Any], object]) -> None:
    with pytest.raises(ShiraError) as told:
        call({"unet.mid_block": tiny.linears(), "vae": tiny.linears()})
    assert str(told.value) == (
        "expected names of components without a dot, which ends them in names of parameters, got 'unet.mid_block': "
        'rename them, for instance {"unet": module}'
    )


def test_the_package_lists_public_names_only() -> None:
    assert dir(shira_diffusers) == sorted(shira_diffusers.__all__)
    assert all(hasattr(shira_diffusers, name) for name in shira_diffusers.__all__)
