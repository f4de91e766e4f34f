"""Stable Diffusion 3 and Flux: the loss against diffusers' scripts written out, and whole runs on tiny bases."""

import json
import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from PIL import Image
from torch import Tensor

from shira_diffusers import ShiraAdapter, ShiraError, build_masks, load_adapter
from shira_diffusers.dreambooth.base_model import complete, load_base
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.data import Batch, collate
from shira_diffusers.dreambooth.data_parallel import Share
from shira_diffusers.dreambooth.families import FAMILIES, embed
from shira_diffusers.dreambooth.loss import Objective
from shira_diffusers.dreambooth.model_card import CARD_NAME
from shira_diffusers.dreambooth.noising import Draws, noising_of
from shira_diffusers.dreambooth.pictures import find_pictures
from shira_diffusers.dreambooth.prepare import prepare_examples
from shira_diffusers.dreambooth.train import train
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
TOKENS = 12  # of T5
MADE = {
    "sd3": tiny.whole_sd3_pipeline,
    "sd3 without t5": lambda: tiny.whole_sd3_pipeline(with_t5=False),
    "flux": tiny.flux_pipeline,
    "flux schnell": lambda: tiny.flux_pipeline(guided=False),
}


@cache
def made(base: str) -> DiffusionPipeline:
    """A base that no test changes."""
    return MADE[base]()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each base, and ``pictures``, of which there is one."""
    folder = tmp_path_factory.mktemp("bases")
    for name in MADE:
        made(name).save_pretrained(folder / name)
    (folder / "pictures").mkdir()
    Image.effect_noise((20, 17), 90).save(folder / "pictures" / "0.png")
    return folder


def settings(bases: Path, base: str, **others: object) -> TrainingConfig:
    given = {
        "pretrained_model_name_or_path": str(bases / base), "instance_data_dir": str(bases / "pictures"),
        "instance_prompt": "a sks cat", "resolution": 16, "train_batch_size": 1, "max_train_steps": 2,
        "learning_rate": 1e-2, "seed": 7, "report_to": "none", "max_sequence_length": TOKENS, "center_crop": True,
    }  # fmt: skip
    return TrainingConfig(**(given | others))


def run(bases: Path, base: str, output: Path, **others: object) -> ShiraAdapter:
    return load_adapter(train(settings(bases, base, output_dir=str(output), **others)))


# ---------------------------------------------------------------- the loss of diffusers' scripts


def ids_of(tokenizer: Any, prompts: list[str], length: int) -> Tensor:
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    return tokenizer(prompts, **options).input_ids


def sd3_texts(pipe: StableDiffusion3Pipeline, prompts: list[str]) -> tuple[Tensor, Tensor]:
    hidden, pooled = [], []
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        output = encoder(ids_of(tokenizer, prompts, 16), output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
        pooled.append(output[0])
    clip = torch.cat(hidden, dim=-1)
    if pipe.text_encoder_3 is None:
        t5 = torch.zeros(len(prompts), TOKENS, 64)
    else:
        t5 = pipe.text_encoder_3(ids_of(pipe.tokenizer_3, prompts, TOKENS))[0]
    return torch.cat([F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], dim=-2), torch.cat(pooled, dim=-1)


def sd3_prediction(pipe: StableDiffusion3Pipeline, noisy: Tensor, timesteps: Tensor, prompts: list[str]) -> Tensor:
    hidden, pooled = sd3_texts(pipe, prompts)
    given = {"encoder_hidden_states": hidden, "pooled_projections": pooled, "return_dict": False}
    return pipe.transformer(hidden_states=noisy, timestep=timesteps, **given)[0]


def flux_prediction(
    pipe: FluxPipeline, noisy: Tensor, timesteps: Tensor, prompts: list[str], guidance: float
) -> Tensor:
    pooled = pipe.text_encoder(ids_of(pipe.tokenizer, prompts, 16), output_hidden_states=False).pooler_output
    hidden = pipe.text_encoder_2(ids_of(pipe.tokenizer_2, prompts, TOKENS))[0]
    count, channels, height, width = noisy.shape
    packed = FluxPipeline._pack_latents(noisy, count, channels, height, width)
    predicted = pipe.transformer(
        hidden_states=packed,
        timestep=timesteps / 1000,
        guidance=torch.tensor([guidance]).expand(count) if pipe.transformer.config.guidance_embeds else None,
        pooled_projections=pooled,
        encoder_hidden_states=hidden,
        txt_ids=torch.zeros(hidden.shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, CPU, torch.float32),
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(predicted, height * 2, width * 2, 2)


@torch.no_grad()
def loss_by_hand(pipe: DiffusionPipeline, given: Batch, config: TrainingConfig) -> Tensor:
    """As diffusers' ``train_dreambooth_lora_sd3.py`` and ``train_dreambooth_lora_flux.py`` compute it."""
    generator = torch.Generator().manual_seed(5)
    distribution = pipe.vae.encode(given.tensors).latent_dist
    latents = distribution.mean + distribution.std * torch.randn(distribution.mean.shape, generator=generator)
    latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator)
    u = compute_density_for_timestep_sampling(
        config.weighting_scheme, len(latents), config.logit_mean, config.logit_std, config.mode_scale,
        generator=generator,
    )  # fmt: skip
    timesteps = pipe.scheduler.timesteps[(u * 1000).long()]
    places = [(pipe.scheduler.timesteps == t).nonzero().item() for t in timesteps]
    sigmas = pipe.scheduler.sigmas[places].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    if isinstance(pipe, FluxPipeline):
        predicted = flux_prediction(pipe, noisy, timesteps, given.prompts, config.guidance_scale)
    else:
        predicted = sd3_prediction(pipe, noisy, timesteps, given.prompts)
    target = noise - latents
    if config.precondition_outputs:
        predicted, target = predicted * (-sigmas) + noisy, latents
    weighting = compute_loss_weighting_for_sd3(config.weighting_scheme, sigmas)
    return (weighting.float() * (predicted - target) ** 2).reshape(len(latents), -1).mean(1).mean()


def batch(prompts: list[str]) -> Batch:
    pixels = torch.rand(len(prompts), 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return Batch(pixels, prompts, torch.zeros(len(prompts), 6))


@pytest.mark.parametrize("base", MADE)
@pytest.mark.parametrize(
    "others",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"weighting_scheme": "sigma_sqrt", "precondition_outputs": False}, id="sigma_sqrt"),
        pytest.param({"weighting_scheme": "cosmap", "precondition_outputs": True}, id="cosmap"),
        pytest.param({"weighting_scheme": "mode", "mode_scale": 0.5, "guidance_scale": 1.0}, id="mode"),
        pytest.param({"weighting_scheme": "logit_normal", "logit_mean": -1.0, "logit_std": 0.5}, id="logit_normal"),
    ],
)
def test_loss_is_that_of_diffusers_script(bases: Path, base: str, others: dict[str, object]) -> None:
    pipe, config = made(base), complete(settings(bases, base, **others))
    given = batch(["a cat", "a red dog"])
    expected = loss_by_hand(pipe, given, config)
    loss = Objective(pipe, config, None, cached=False).loss(given, torch.Generator().manual_seed(5))
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
    known = {p: {n: t[0].detach() for n, t in embed(pipe, [p], TOKENS).items()} for p in given.prompts}
    ahead = Objective(pipe, config, known, cached=False).loss(given, torch.Generator().manual_seed(5))
    torch.testing.assert_close(ahead.detach(), expected, rtol=1e-5, atol=0)


def test_guidance_reaches_dev_and_there_is_none_in_schnell(bases: Path) -> None:
    given = batch(["a cat"])

    def loss(base: str, scale: float) -> Tensor:
        config = complete(settings(bases, base, guidance_scale=scale))
        return Objective(made(base), config, None, cached=False).loss(given, torch.Generator().manual_seed(5))

    assert not torch.equal(loss("flux", 1.0), loss("flux", 7.0))
    assert torch.equal(loss("flux schnell", 1.0), loss("flux schnell", 7.0))


def test_validation_in_between_does_not_change_the_noise_levels(bases: Path) -> None:
    pipe, config = tiny.whole_sd3_pipeline(), complete(settings(bases, "sd3"))
    objective = Objective(pipe, config, None, cached=False)
    before = objective.loss(batch(["a cat"]), torch.Generator().manual_seed(5))
    pipe.scheduler.set_timesteps(3)
    assert torch.equal(objective.loss(batch(["a cat"]), torch.Generator().manual_seed(5)), before)
    other = Objective(pipe, config, None, cached=False).loss(batch(["a cat"]), torch.Generator().manual_seed(5))
    assert torch.equal(other, before)


def test_a_share_draws_the_noise_levels_of_its_part_of_the_batch(bases: Path) -> None:
    config = complete(settings(bases, "sd3"))

    def places(share: Share, count: int) -> Tensor:
        return Draws(torch.Generator().manual_seed(5), share, 2).places(config, 1000, torch.zeros(count))

    whole = places(Share(), 8).view(2, 4)
    parts = [places(Share(start, start + 2, 4), 4).view(2, 2) for start in (0, 2)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("others", [{"weighting_scheme": "mode", "mode_scale": 9.0}, {"logit_std": 80.0}])
def test_extreme_draws_stay_within_the_noise_levels(bases: Path, others: dict[str, object]) -> None:
    config = complete(settings(bases, "sd3", **others))
    drawn = Draws(torch.Generator().manual_seed(0), Share(), 1).places(config, 1000, torch.zeros(500))
    assert int(drawn.min()) == 0
    assert int(drawn.max()) == 999


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("base", MADE)
def test_the_adapter_lowers_the_loss_and_changes_the_picture(bases: Path, base: str, tmp_path: Path) -> None:
    options = {"density": 0.3, "max_train_steps": 25, "mask_type": "grad", "calibration_steps": 2}
    adapter = run(bases, base, tmp_path, **options)
    assert adapter.component_names() == ["transformer"]
    assert all(bool(delta.values.any()) for delta in adapter.deltas.values())
    config = complete(settings(bases, base))
    pipe = load_base(config, CPU)
    examples, objective = prepare_examples(pipe, config, [find_pictures(bases / "pictures", "a sks cat")], seed=0)
    given = collate([examples[(0, 0)]])

    @torch.no_grad()
    def error() -> float:
        return sum(float(objective.loss(given, torch.Generator().manual_seed(seed))) for seed in range(10))

    def picture() -> Tensor:
        options = {"height": 16, "width": 16, "num_inference_steps": 2, "max_sequence_length": TOKENS}
        seeded = torch.Generator().manual_seed(1)
        return pipe("a sks cat", generator=seeded, output_type="latent", **options).images.clone()

    before, drawn, bits = error(), picture(), tiny.snapshot(pipe)
    pipe.load_shira(tmp_path)
    assert error() < 0.97 * before
    assert not torch.equal(picture(), drawn)
    pipe.unload_shira()
    tiny.assert_same_bits(pipe, bits)
    assert torch.equal(picture(), drawn)


@pytest.mark.parametrize("base", ["sd3", "flux"])
def test_resuming_equals_never_having_stopped(bases: Path, base: str, tmp_path: Path) -> None:
    options = {"max_train_steps": 4, "checkpointing_steps": 2, "gradient_accumulation_steps": 2, "random_flip": True}
    whole = run(bases, base, tmp_path, **options, train_text_encoder=True)
    again = run(bases, base, tmp_path, **options, train_text_encoder=True, resume_from_checkpoint="checkpoint-2")
    tiny.assert_same_adapter(again, whole)
    assert not all(load_adapter(tmp_path / "checkpoint-2").deltas[name] == d for name, d in whole.deltas.items())


@pytest.mark.parametrize(
    ("base", "encoders"), [("sd3", ["text_encoder", "text_encoder_2"]), ("flux", ["text_encoder"])]
)
def test_clips_are_trained_where_asked_for(bases: Path, base: str, encoders: list[str], tmp_path: Path) -> None:
    options = {"train_text_encoder": True, "text_encoder_lr": 1e-2, "gradient_checkpointing": True}
    adapter = run(bases, base, tmp_path, **options)
    assert adapter.component_names() == [*encoders, "transformer"]
    assert all(bool(delta.values.any()) for delta in adapter.deltas.values())
    pipe = DiffusionPipeline.from_pretrained(bases / base)
    pipe.load_shira(tmp_path)
    assert set(pipe.list_shira()["default_0"]) == {*encoders, "transformer"}


@pytest.mark.parametrize("base", ["sd3", "flux"])
def test_all_attention_and_feed_forward_layers_that_can_learn_are_trained(
    bases: Path, base: str, tmp_path: Path
) -> None:
    adapter = run(bases, base, tmp_path, max_train_steps=1)
    pipe = made(base)
    expected = set(build_masks({"transformer": pipe.transformer}, "wm", 0.02))
    # the last block of SD3 drops the text, so nothing reads what it asks for
    dead = {name for name in expected if re.search(r"transformer_blocks\.1\.attn\.add_q_proj", name)}
    assert len(dead) == (base == "sd3")
    assert adapter.deltas.keys() == expected - dead


@pytest.mark.parametrize("base", ["sd3", "flux"])
def test_pictures_are_made_and_told_of(bases: Path, base: str, tmp_path: Path) -> None:
    prior = {
        "with_prior_preservation": True, "class_data_dir": str(tmp_path / "class"), "class_prompt": "a cat",
        "num_class_images": 2,
    }  # fmt: skip
    options = {"cache_latents": True, "validation_prompt": "a dog", "num_validation_images": 2}
    run(bases, base, tmp_path / "out", **options, **prior)
    pictures = [*(tmp_path / "out" / "validation").iterdir(), *(tmp_path / "class").iterdir()]
    assert len(pictures) == 4
    assert all(Image.open(path).size == (16, 16) for path in pictures)
    card = (tmp_path / "out" / CARD_NAME).read_text()
    assert ("- flux\n" if base == "flux" else "- sd3\n") in card
    assert ("- stable-diffusion\n" in card) == (base == "sd3")


@pytest.mark.parametrize("base", ["sd3", "flux"])
def test_the_base_is_read_in_half_precision(bases: Path, base: str) -> None:
    pipe = load_base(settings(bases, base), CPU, torch.bfloat16)
    kinds = {name: module.dtype for name, module in tiny.modules_of(pipe).items()}
    assert kinds.pop("vae") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
    pipe = load_base(settings(bases, base), CPU, torch.float16)
    t5 = pipe.text_encoder_2 if base == "flux" else pipe.text_encoder_3
    kept = {name.rpartition(".wo")[1] for name, p in t5.named_parameters() if p.dtype == torch.float32}
    assert kept == {".wo"}  # which overflows in float16


@pytest.mark.parametrize("base", ["sd3", "flux"])
def test_a_run_in_bf16(bases: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    AcceleratorState._reset_state(reset_partial_state=True)  # one process has one precision
    options = {"mask_type": "grad", "calibration_steps": 1, "validation_prompt": "a dog", "num_validation_images": 1}
    try:
        adapter = run(bases, base, tmp_path, mixed_precision="bf16", **options)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert all(bool(delta.values.any()) for delta in adapter.deltas.values())
    assert list((tmp_path / "validation").iterdir())


# ---------------------------------------------------------------- settings and refusals


def test_defaults_are_those_of_the_familys_script(bases: Path) -> None:
    bare = {"resolution": None, "learning_rate": None, "max_sequence_length": None}
    sd3, flux = (complete(settings(bases, base, **bare)) for base in ("sd3", "flux"))
    names = ("weighting_scheme", "precondition_outputs", "max_sequence_length")
    assert [getattr(sd3, name) for name in names] == ["logit_normal", True, 77]
    assert [getattr(flux, name) for name in names] == ["none", False, 512]
    shared = ("resolution", "learning_rate", "text_encoder_lr", "adam_weight_decay", "adam_weight_decay_text_encoder")
    assert all([getattr(config, name) for name in shared] == [512, 1e-4, 5e-6, 1e-4, 1e-3] for config in (sd3, flux))
    assert (sd3.logit_mean, sd3.logit_std, sd3.mode_scale, flux.guidance_scale) == (0.0, 1.0, 1.29, 3.5)
    assert {(each.mask_type, each.mask_budget) for each in (sd3, flux)} == {("wm", "weight")}
    assert complete(settings(bases, "sd3", precondition_outputs=False)).precondition_outputs is False


def test_settings_of_the_other_way_to_train_have_no_effect(
    bases: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = run(bases, "sd3", tmp_path / "plain")
    with caplog.at_level(logging.WARNING):
        others = {"snr_gamma": 5.0, "validation_scheduler": "DDPMScheduler", "guidance_scale": 2.0}
        tiny.assert_same_adapter(run(bases, "sd3", tmp_path / "other", **others), plain)
    told = "has no effect on a base that is trained by flow matching"
    assert all(f"--{name} {told}" in caplog.text for name in others)
    tiny.pipeline().save_pretrained(tmp_path / "sd")
    config = settings(bases, str(tmp_path / "sd"), weighting_scheme="mode", guidance_scale=1.0)
    assert complete(config).weighting_scheme is None
    with caplog.at_level(logging.WARNING):
        run(bases, str(tmp_path / "sd"), tmp_path / "unet", weighting_scheme="mode", max_sequence_length=None)
    assert "--weighting_scheme has no effect on a base of this kind" in caplog.text


def test_what_cannot_be_trained_is_named(bases: Path, tmp_path: Path) -> None:
    with pytest.raises(ShiraError, match="resolution must be a multiple of 4, got 18"):
        load_base(settings(bases, "flux", resolution=18), CPU)
    pipe = tiny.flux_pipeline()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ShiraError, match="scheduler is a DDIMScheduler, expected one of flow matching"):
        noising_of(pipe, complete(settings(bases, "flux")))
    index = json.loads((bases / "flux" / "model_index.json").read_text()) | {"text_encoder_2": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ShiraError, match=r"has no text_encoder_2; expected a whole pipeline"):
        complete(settings(bases, str(tmp_path)))
    with pytest.raises(ShiraError, match=r"(?s)max_sequence_length must be at least 1.*logit_std must not be neg"):
        settings(bases, "sd3", max_sequence_length=0, logit_std=-1.0)
    with pytest.raises(ShiraError, match="max_sequence_length must be at most 512, as in drawing, got 513"):
        settings(bases, "flux", max_sequence_length=513)


def test_buckets_are_multiples_of_the_packed_latents(bases: Path, tmp_path: Path) -> None:
    buckets = {"enable_bucket": True, "bucket_reso_steps": 4, "min_bucket_reso": 8, "max_bucket_reso": 32}
    assert run(bases, "flux", tmp_path / "good", **buckets).nnz
    with pytest.raises(ShiraError, match="bucket_reso_steps must be a multiple of 4, which the model divides sides by"):
        run(bases, "flux", tmp_path / "bad", **buckets | {"bucket_reso_steps": 2})


def test_every_family_names_settings_that_there_are() -> None:
    for family in FAMILIES.values():
        assert all(hasattr(TrainingConfig, name) for name in (*family.idle, *family.defaults))
