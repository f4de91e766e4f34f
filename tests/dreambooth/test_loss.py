"""The loss against the formulas written out."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline

from shira_diffusers import ShiraError
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.data import Batch
from shira_diffusers.dreambooth.families import embed
from shira_diffusers.dreambooth.loss import Objective, encode
from shira_diffusers.dreambooth.noising import snr_weights, training_schedule

ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def config(**settings: object) -> TrainingConfig:
    needed = {"pretrained_model_name_or_path": "base", "instance_data_dir": "pictures", "instance_prompt": "a cat"}
    return TrainingConfig(**(needed | settings))


def batch(prompts: list[str]) -> Batch:
    pixels = torch.rand(len(prompts), 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return Batch(pixels, prompts, torch.tensor([[20.0, 30.0, 1.0, 2.0, 16.0, 16.0]]).repeat(len(prompts), 1))


@torch.no_grad()
def errors_by_hand(pipe: StableDiffusionPipeline, given: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared error of each example, and its timestep, with the draws in the objective's order."""
    generator = torch.Generator().manual_seed(5)
    distribution = pipe.vae.encode(given.tensors).latent_dist
    latents = distribution.mean + distribution.std * torch.randn(distribution.mean.shape, generator=generator)
    latents = (latents - (pipe.vae.config.shift_factor or 0.0)) * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(0, 1000, (len(latents),), generator=generator)
    alpha = pipe.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    ids = pipe.tokenizer(given.prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    predicted = pipe.unet(noisy, timesteps, pipe.text_encoder(ids)[0]).sample
    target = velocity if pipe.scheduler.config.prediction_type == "v_prediction" else noise
    return (predicted - target).square().mean((1, 2, 3)), timesteps


@pytest.mark.parametrize("options", [{}, ZERO_SNR], ids=["epsilon", "v_prediction"])
def test_loss_is_the_mean_squared_error(pipe: StableDiffusionPipeline, options: dict[str, object]) -> None:
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **options)
    given = batch(["a cat", "a red dog"])
    expected, _ = errors_by_hand(pipe, given)
    loss = Objective(pipe, config(), None, cached=False).loss(given, torch.Generator().manual_seed(5))
    torch.testing.assert_close(loss.detach(), expected.mean(), rtol=1e-5, atol=0)


def test_encoding_in_advance_changes_nothing(pipe: StableDiffusionPipeline) -> None:
    given = batch(["a cat", "a red dog"])
    known = {p: {name: t[0] for name, t in embed(pipe, [p]).items()} for p in given.prompts}
    cached = Batch(encode(pipe, given.tensors), given.prompts, given.time_ids)
    losses = [
        Objective(pipe, config(), embeddings, cached=is_cached).loss(data, torch.Generator().manual_seed(5))
        for embeddings, data, is_cached in ((None, given, False), (known, cached, True))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def test_latents_are_shifted_and_scaled_as_the_autoencoder_says(pipe: StableDiffusionPipeline) -> None:
    given = batch(["a cat"])
    pipe.vae.register_to_config(shift_factor=5.0, scaling_factor=0.7)
    expected, _ = errors_by_hand(pipe, given)
    loss = Objective(pipe, config(), None, cached=False).loss(given, torch.Generator().manual_seed(5))
    torch.testing.assert_close(loss.detach(), expected.mean(), rtol=1e-5, atol=0)


def test_prior_loss_is_weighted(pipe: StableDiffusionPipeline) -> None:
    given = batch(["a sks cat", "a sks cat", "a cat", "a cat"])
    errors, _ = errors_by_hand(pipe, given)
    settings = config(with_prior_preservation=True, prior_loss_weight=0.3, class_data_dir="c", class_prompt="a cat")
    loss = Objective(pipe, settings, None, cached=False).loss(given, torch.Generator().manual_seed(5))
    torch.testing.assert_close(loss.detach(), errors[:2].mean() + 0.3 * errors[2:].mean(), rtol=1e-5, atol=0)


def test_snr_gamma_weights_each_example(pipe: StableDiffusionPipeline) -> None:
    given = batch(["a cat", "a red dog"])
    errors, timesteps = errors_by_hand(pipe, given)
    alpha = pipe.scheduler.alphas_cumprod[timesteps]
    snr = alpha / (1 - alpha)
    loss = Objective(pipe, config(snr_gamma=0.7), None, cached=False).loss(given, torch.Generator().manual_seed(5))
    torch.testing.assert_close(loss.detach(), (errors * snr.clamp(max=0.7) / snr).mean(), rtol=1e-4, atol=0)


def test_noise_offset_moves_whole_channels(pipe: StableDiffusionPipeline) -> None:
    seen = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    given = batch(["a cat", "a red dog"])
    for offset in (0.0, 0.5):
        Objective(pipe, config(noise_offset=offset), None, cached=False).loss(given, torch.Generator().manual_seed(5))
    handle.remove()
    generator = torch.Generator().manual_seed(5)
    shape = seen[0][0].shape
    for _ in range(2):  # of the latents, and the noise
        torch.randn(shape, generator=generator)
    moved = torch.randn((*shape[:2], 1, 1), generator=generator)
    timesteps = torch.randint(0, 1000, shape[:1], generator=generator)
    assert torch.equal(seen[1][1], timesteps)
    # the plain run drew other timesteps: compare the noise, with the latents taken away
    plain, offset = (with_noise_alone(pipe, sample, steps, given) for sample, steps in seen)
    torch.testing.assert_close(offset - plain, (0.5 * moved).expand(shape), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def with_noise_alone(
    pipe: StableDiffusionPipeline, noisy: torch.Tensor, timesteps: torch.Tensor, given: Batch
) -> torch.Tensor:
    distribution = pipe.vae.encode(given.tensors).latent_dist
    draws = torch.randn(distribution.mean.shape, generator=torch.Generator().manual_seed(5))
    latents = (distribution.mean + distribution.std * draws) * pipe.vae.config.scaling_factor
    alpha = pipe.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return (noisy - alpha.sqrt() * latents) / (1 - alpha).sqrt()


@pytest.mark.parametrize(
    ("prediction", "last"),
    [pytest.param("epsilon", 1.0, id="epsilon"), pytest.param("v_prediction", 0.0, id="v_prediction")],
)
def test_snr_weights_are_finite_where_only_noise_is_left(prediction: str, last: float) -> None:
    schedule = DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True, prediction_type=prediction)
    weights = snr_weights(schedule, torch.tensor([0, 500, 999]), 5.0)
    assert bool(torch.isfinite(weights).all())
    assert float(weights[2]) == last
    alpha = schedule.alphas_cumprod[0]
    expected = 5.0 / (alpha / (1 - alpha) + (prediction == "v_prediction"))
    torch.testing.assert_close(weights[0], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **ZERO_SNR),
        PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True),
    ],
    ids=["ddim", "pndm"],
)
def test_training_noise_is_that_of_the_bases_scheduler(pipe: StableDiffusionPipeline, scheduler: object) -> None:
    pipe.scheduler = scheduler
    schedule = training_schedule(pipe)
    assert torch.equal(schedule.alphas_cumprod, scheduler.alphas_cumprod)
    assert schedule.config.prediction_type == scheduler.config.prediction_type


def test_other_predictions_are_refused(pipe: StableDiffusionPipeline) -> None:
    pipe.scheduler = DDIMScheduler(prediction_type="sample")
    with pytest.raises(ShiraError, match="predicts 'sample', expected 'epsilon' or 'v_prediction'"):
        training_schedule(pipe)
