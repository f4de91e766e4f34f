"""SDXL beside Stable Diffusion: what the denoiser is given, which components are adapted, which defaults hold."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, EDMEulerScheduler, StableDiffusionXLPipeline
from PIL import Image

from shira_diffusers import ShiraError, load_adapter
from shira_diffusers.dreambooth.base_model import cast, complete, load_base
from shira_diffusers.dreambooth.config import TrainingConfig
from shira_diffusers.dreambooth.data import Batch
from shira_diffusers.dreambooth.families import embed
from shira_diffusers.dreambooth.loss import Objective, encode
from shira_diffusers.dreambooth.noising import training_schedule
from shira_diffusers.dreambooth.sampling import decode
from shira_diffusers.dreambooth.train import train
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``sd`` and ``xl``, ``vae`` of another autoencoder, and ``pictures``."""
    folder = tmp_path_factory.mktemp("bases")
    tiny.pipeline().save_pretrained(folder / "sd")
    tiny.sdxl_pipeline().save_pretrained(folder / "xl")
    (folder / "pictures").mkdir()
    for number in range(3):
        Image.effect_noise((20, 16 + number), 90).save(folder / "pictures" / f"{number}.png")
    return folder


def settings(bases: Path, base: str, **others: object) -> TrainingConfig:
    given = {
        "pretrained_model_name_or_path": str(bases / base), "instance_data_dir": str(bases / "pictures"),
        "instance_prompt": "a sks cat", "resolution": 16, "train_batch_size": 2, "max_train_steps": 2,
        "learning_rate": 1e-2, "seed": 7, "report_to": "none", "calibration_steps": 1,
    }  # fmt: skip
    return TrainingConfig(**(given | others))


def xl_batch(prompts: list[str]) -> Batch:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(len(prompts), 3, 16, 16, generator=generator) * 2 - 1
    return Batch(pixels, prompts, torch.randint(64, (len(prompts), 6), generator=generator).float())


@torch.no_grad()
def loss_by_hand(pipe: StableDiffusionXLPipeline, given: Batch) -> torch.Tensor:
    """As diffusers' script computes it: both encoders' layer before the last, the second's pooled output, time ids."""
    generator = torch.Generator().manual_seed(5)
    distribution = pipe.vae.encode(given.tensors).latent_dist
    latents = distribution.mean + distribution.std * torch.randn(distribution.mean.shape, generator=generator)
    latents = latents * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(0, 1000, (len(latents),), generator=generator)
    alpha = pipe.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    hidden = []
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        ids = tokenizer(given.prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        output = encoder(ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
    predicted = pipe.unet(
        alpha.sqrt() * latents + (1 - alpha).sqrt() * noise,
        timesteps,
        encoder_hidden_states=torch.cat(hidden, dim=-1),
        added_cond_kwargs={"text_embeds": output.text_embeds, "time_ids": given.time_ids},
    ).sample
    return (predicted - noise).square().mean()


@pytest.mark.parametrize("known", [False, True], ids=["encoded", "encoded in advance"])
def test_sdxl_is_told_both_texts_and_the_framing(known: bool) -> None:
    pipe = tiny.sdxl_pipeline()
    given = xl_batch(["a cat", "a red dog"])
    embeddings = {p: {n: t[0].detach() for n, t in embed(pipe, [p]).items()} for p in given.prompts} if known else None
    config = TrainingConfig(pretrained_model_name_or_path="x", instance_data_dir="y", instance_prompt="z")
    loss = Objective(pipe, config, embeddings, cached=False).loss(given, torch.Generator().manual_seed(5))
    torch.testing.assert_close(loss.detach(), loss_by_hand(pipe, given), rtol=1e-5, atol=0)
    elsewhere = Batch(given.tensors, given.prompts, given.time_ids + 1)
    other = Objective(pipe, config, embeddings, cached=False).loss(elsewhere, torch.Generator().manual_seed(5))
    assert not torch.equal(loss, other)


def test_sdxl_trains_the_unet_and_both_text_encoders(bases: Path, tmp_path: Path) -> None:
    options = {"train_text_encoder": True, "text_encoder_lr": 1e-2, "gradient_checkpointing": True}
    adapter = load_adapter(train(settings(bases, "xl", output_dir=str(tmp_path), **options)))
    assert adapter.component_names() == ["text_encoder", "text_encoder_2", "unet"]
    assert all(bool(delta.values.any()) for delta in adapter.deltas.values())
    # SDXL reads the layer before the last, so the first encoder's last layer cannot learn; the second's is pooled
    encoders = [{n for n in adapter.deltas if n.startswith(part)} for part in ("text_encoder.", "text_encoder_2.")]
    assert [{n.split("layers.")[1][0] for n in names} for names in encoders] == [{"0"}, {"0", "1"}]
    pipe = StableDiffusionXLPipeline.from_pretrained(bases / "xl")
    before = tiny.snapshot(pipe)
    pipe.load_shira(tmp_path)
    assert set(pipe.list_shira()["default_0"]) == {"unet", "text_encoder", "text_encoder_2"}
    pipe.unload_shira()
    tiny.assert_same_bits(pipe, before)


def test_sdxl_caches_latents_and_makes_pictures(bases: Path, tmp_path: Path) -> None:
    options = {"center_crop": True, "cache_latents": True, "validation_prompt": "a dog", "num_validation_images": 1}
    prior = {
        "with_prior_preservation": True, "class_data_dir": str(tmp_path / "class"), "class_prompt": "a cat",
        "num_class_images": 2,
    }  # fmt: skip
    train(settings(bases, "xl", output_dir=str(tmp_path / "out"), **options, **prior))
    pictures = [*(tmp_path / "out" / "validation").iterdir(), *(tmp_path / "class").iterdir()]
    assert len(pictures) == 3
    assert all(Image.open(path).size == (16, 16) for path in pictures)


def test_defaults_are_those_of_the_familys_script(bases: Path) -> None:
    bare = {"resolution": None, "learning_rate": None}
    plain, xl = (complete(settings(bases, base, **bare)) for base in ("sd", "xl"))
    names = ("resolution", "learning_rate", "text_encoder_lr", "adam_weight_decay", "adam_weight_decay_text_encoder")
    assert [getattr(plain, name) for name in names] == [512, 5e-4, None, 1e-2, None]
    assert [getattr(xl, name) for name in names] == [1024, 1e-4, 5e-6, 1e-4, 1e-3]
    assert {(each.mask_type, each.mask_budget) for each in (plain, xl)} == {("grad_mean", "global")}
    assert complete(settings(bases, "sd", mask_type="grad")).mask_budget == "weight"
    assert complete(settings(bases, "xl", adam_weight_decay=0.0)).adam_weight_decay == 0.0


def test_the_autoencoder_stays_in_float32_when_the_rest_is_halved(bases: Path) -> None:
    pipe = load_base(settings(bases, "xl"), CPU)
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = encode(pipe, pixels)
    cast(pipe, torch.bfloat16)
    kinds = {name: module.dtype for name, module in tiny.modules_of(pipe).items()}
    assert kinds.pop("vae") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode(pipe, pixels), moments)


@pytest.mark.parametrize("base", ["sd", "xl"])
def test_pictures_are_those_of_the_pipeline_itself(bases: Path, base: str) -> None:
    pipe = load_base(settings(bases, base), CPU)
    options = {"height": 16, "width": 16, "num_inference_steps": 2}
    expected = pipe("a cat", generator=torch.Generator().manual_seed(1), **options).images[0]
    latents = pipe("a cat", generator=torch.Generator().manual_seed(1), output_type="latent", **options).images
    assert decode(pipe, latents)[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("inside", [False, True], ids=["autoencoder", "pipeline"])
@pytest.mark.parametrize("base", ["sd", "xl"])
def test_another_autoencoder_takes_the_place_of_the_bases(bases: Path, base: str, inside: bool, tmp_path: Path) -> None:
    other = tiny.autoencoder()
    torch.nn.init.normal_(other.encoder.conv_in.weight)
    other.save_pretrained(tmp_path / "vae" if inside else tmp_path)
    pipe = load_base(settings(bases, base, pretrained_vae_model_name_or_path=str(tmp_path)), CPU)
    assert torch.equal(pipe.vae.encoder.conv_in.weight, other.encoder.conv_in.weight)
    assert not any(parameter.requires_grad for parameter in pipe.vae.parameters())
    own = AutoencoderKL.from_pretrained(bases / base / "vae")
    assert not torch.equal(own.encoder.conv_in.weight, other.encoder.conv_in.weight)


def test_what_a_base_lacks_is_named(bases: Path, tmp_path: Path) -> None:
    with pytest.raises(ShiraError, match="cannot load the autoencoder '/nowhere', expected a folder"):
        load_base(settings(bases, "sd", pretrained_vae_model_name_or_path="/nowhere"), CPU)
    index = json.loads((bases / "xl" / "model_index.json").read_text())
    index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ShiraError, match=r"the base '.*' has no text_encoder, tokenizer; expected a whole pipeline"):
        complete(settings(bases, str(tmp_path)))


def test_bases_of_edm_are_refused() -> None:
    pipe = tiny.sdxl_pipeline()
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(ShiraError, match="is a EDMEulerScheduler, expected one of diffusion timesteps"):
        training_schedule(pipe)
