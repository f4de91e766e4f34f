"""Guidance's negative half under a part of the mix has the bits of two models that hold the two mixes."""

import copy
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from shira_diffusers import ResidentStateError, ShiraError
from tests import tiny

PROMPTS = ["a red cat", "a dog"]


def loaded(pipe: Any) -> Any:
    for seed, name in enumerate("ab"):
        pipe.load_shira(
            tiny.adapter_for(pipe, seed, only=("",), size=0.1),
            name,
            activate=False,
        )
    return pipe


def draw(pipe: Any, negative: float | None, **options: Any) -> Tensor:
    own = {} if negative is None else {"cross_attention_kwargs": {"shira_negative": negative}}
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return tiny.picture(pipe, prompt=PROMPTS, latents=latents, **(own | options))


def by_two_models(pipe: StableDiffusionPipeline, mix: dict[str, float], part: float, guidance: float = 7.5) -> Tensor:
    """The loop of the pipeline, with one UNet per half."""
    halves = []
    for share in (part, 1.0):
        with pipe.shira({name: share * scale for name, scale in mix.items()}):
            halves.append(copy.deepcopy(pipe.unet))
    with pipe.shira(mix):
        prompted, negative = pipe.encode_prompt(PROMPTS, pipe.device, 1, True)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(2)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        x = scheduler.scale_model_input(latents, time)
        with torch.no_grad():
            empty, asked = (unet(x, time, text)[0] for unet, text in zip(halves, (negative, prompted), strict=True))
        latents = scheduler.step(empty + guidance * (asked - empty), time, latents).prev_sample
    return latents


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_the_bits_are_those_of_two_models(pipe: StableDiffusionPipeline, part: float) -> None:
    mix = {"a": 0.7, "b": 1.1}
    loaded(pipe).set_shira(mix)
    before = tiny.snapshot(pipe.unet)
    expected = by_two_models(pipe, mix, part)
    assert torch.equal(draw(pipe, part), expected)
    assert (part == 1) == torch.allclose(draw(pipe, None), expected, atol=1e-5)
    tiny.assert_same_bits(pipe.unet, before)
    assert pipe.get_active_shira() == mix and "forward" not in vars(pipe.unet)


def test_steps_without_guidance_are_as_without_it(pipe: StableDiffusionPipeline) -> None:
    loaded(pipe).set_shira("a")
    assert torch.equal(draw(pipe, 0.5, guidance_scale=1.0), draw(pipe, None, guidance_scale=1.0))


def test_strengths_by_component_and_what_diffusers_adds(pipe: StableDiffusionPipeline) -> None:
    loaded(pipe).set_shira("a", {"unet": 0.5, "text_encoder": 2.0})
    expected = draw(pipe, 0.5)
    pipe.enable_attention_slicing()
    diffusers.hooks.apply_layerwise_casting(pipe.vae, storage_dtype=torch.float16, compute_dtype=torch.float32)
    torch.testing.assert_close(draw(pipe, 0.5), expected, rtol=1e-4, atol=1e-4)


def test_sdxl(pipe: StableDiffusionPipeline) -> None:
    xl = loaded(tiny.sdxl_pipeline())
    xl.set_shira("a")
    assert not torch.allclose(draw(xl, 0.5), draw(xl, None), atol=1e-3)
    torch.testing.assert_close(draw(xl, 1.0), draw(xl, None), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", [np.float32(0.5), np.array(0.5), torch.tensor(0.5)], ids=repr)
def test_numbers_of_numpy_and_torch(pipe: StableDiffusionPipeline, part: Any) -> None:
    loaded(pipe).set_shira("a")
    assert torch.equal(draw(pipe, part), draw(pipe, 0.5))


@pytest.mark.parametrize("wrong", [1.5, -0.1, float("nan"), True, "half", torch.tensor([0.5])])
def test_a_part_that_is_none_is_refused(pipe: StableDiffusionPipeline, wrong: Any) -> None:
    loaded(pipe).set_shira("a")
    with pytest.raises(ShiraError, match=r"shira_negative is the part of the mix .* expected 0 to 1, got"):
        draw(pipe, wrong)
    assert pipe.get_active_shira() == {"a": 1.0}


def test_what_has_no_halves_is_refused(pipe: StableDiffusionPipeline) -> None:
    loaded(pipe).set_shira("a", {"unet": {"down": 0.5}})
    with pytest.raises(ShiraError, match="strengths per block"):
        draw(pipe, 0.5)
    with pytest.raises(ShiraError, match="both"):
        tiny.picture(pipe, cross_attention_kwargs={"shira_negative": 0.5, "shira_adapters": ["a"]})
    with pytest.raises(ShiraError, match="FluxPipeline has no negative half"):
        tiny.flux_pipeline()("a cat", height=16, width=16, joint_attention_kwargs={"shira_negative": 0.5})
    pipe.set_shira("a")
    pipe.unet.compile(backend="eager")
    with pytest.raises(ResidentStateError, match="unet is compiled"):
        draw(pipe, 0.5)


def test_an_error_in_a_step_leaves_the_mix(pipe: StableDiffusionPipeline) -> None:
    loaded(pipe).set_shira("a")
    before = tiny.snapshot(pipe.unet)

    def stop(*_: object) -> None:
        raise RuntimeError("stopped")

    handle = pipe.unet.mid_block.register_forward_hook(stop)
    with pytest.raises(RuntimeError, match="stopped"):
        draw(pipe, 0.5)
    handle.remove()
    tiny.assert_same_bits(pipe.unet, before)
    assert pipe.get_active_shira() == {"a": 1.0} and "forward" not in vars(pipe.unet)
